"""The result of a comparison: changes between two results documents."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = "pnp-trt/bench-compare/1"


#: Relative change up to which two runs of the same code may differ: the required repeatability of the ratios.
FLOOR = 0.03


@dataclass(frozen=True)
class Change:
    """One figure in both documents.

    Attributes:
        part: the document's key for the rows.
        key: identifies the row: engine, method, batch and so on.
        figure: the row's key, such as "ratio_to_cfg".
        old: value in the old document.
        new: value in the new document.
        old_interval: 95 % interval of the old value; None if it is exact.
        new_interval: 95 % interval of the new value; None if it is exact.
        verdict: "better", "worse" or "same", by significance.
        evidence: "exact", "interval", or "weak" for absolute times, which are only a hint.
    """

    part: str
    key: dict[str, Any]
    figure: str
    old: float
    new: float
    old_interval: tuple[float, float] | None
    new_interval: tuple[float, float] | None
    verdict: str
    evidence: str

    @property
    def relative(self) -> float | None:
        """new / old - 1; None if the old value is 0, or so small that the ratio is not finite."""
        ratio = self.new / self.old - 1 if self.old else math.inf
        return ratio if math.isfinite(ratio) else None


@dataclass(frozen=True)
class Comparison:
    """The comparison of two documents.

    Attributes:
        old: command, date and commit of the old document.
        new: command, date and commit of the new document.
        differences: other differences, as sentences: device, versions, commit, settings.
        absolute: whether absolute times were compared, which needs the same device and versions.
        figures: every figure that is in both documents.
        only_old: rows that are only in the old document, as {"part", "key"}.
        only_new: rows that are only in the new document, as {"part", "key"}.
    """

    old: dict[str, Any]
    new: dict[str, Any]
    differences: list[str]
    absolute: bool
    figures: list[Change]
    only_old: list[dict[str, Any]] = field(default_factory=list)
    only_new: list[dict[str, Any]] = field(default_factory=list)

    def of(self, verdict: str, *, weak: bool = False) -> list[Change]:
        """Return the figures with one verdict ("better", "worse", "same"), by firm or by weak evidence."""
        return [change for change in self.figures if change.verdict == verdict and (change.evidence == "weak") == weak]

    @property
    def regressed(self) -> bool:
        """Whether any figure got significantly worse; absolute times do not count."""
        return bool(self.of("worse"))

    def as_dict(self) -> dict[str, Any]:
        """The comparison as a JSON object, with the schema `compare-schema.json` beside this file."""
        figures = [asdict(change) | {"relative_change": change.relative} for change in self.figures]
        return {
            "schema": SCHEMA, "old": self.old, "new": self.new, "regressed": self.regressed,
            "differences": self.differences, "absolute_times_compared": self.absolute, "floor": FLOOR,
            "figures": figures, "only_old": self.only_old, "only_new": self.only_new,
        }  # fmt: skip
