"""The result of a comparison: changes between two results documents."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = "pnp-trt/bench-compare/1"


#: Relative change below which two runs of the same code may differ: the repeatability that is asked of the ratios.
FLOOR = 0.03


@dataclass(frozen=True)
class Change:
    """One figure in both documents.

    Attributes:
        part: the document's key that the rows stand under.
        key: what the row is: engine, method, batch and so on.
        figure: the row's key, such as "ratio_to_cfg".
        old: value of the old document.
        new: value of the new one.
        old_interval: 95 % interval of the old value; None where it is exact.
        new_interval: that of the new one.
        verdict: "better", "worse" or "same", by significance.
        evidence: "exact", "interval", or "weak" for absolute times, which are no more than a hint.
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
        """new / old - 1; None where the old value is 0, or so near it that the ratio is no number of JSON."""
        ratio = self.new / self.old - 1 if self.old else math.inf
        return ratio if math.isfinite(ratio) else None


@dataclass(frozen=True)
class Comparison:
    """The comparison of two documents.

    Attributes:
        old: command, date and commit of the old document.
        new: those of the new one.
        differences: sentences on what else differs: device, versions, commit, settings.
        absolute: whether absolute times were compared: same device, same versions.
        figures: every figure that both have.
        only_old: rows of the old document alone, as {"part", "key"}.
        only_new: rows of the new one alone.
    """

    old: dict[str, Any]
    new: dict[str, Any]
    differences: list[str]
    absolute: bool
    figures: list[Change]
    only_old: list[dict[str, Any]] = field(default_factory=list)
    only_new: list[dict[str, Any]] = field(default_factory=list)

    def of(self, verdict: str, *, weak: bool = False) -> list[Change]:
        """The figures of one verdict ("better", "worse", "same"), by firm evidence or by weak."""
        return [one for one in self.figures if one.verdict == verdict and (one.evidence == "weak") == weak]

    @property
    def regressed(self) -> bool:
        """Whether anything got significantly worse; absolute times do not count."""
        return bool(self.of("worse"))

    def as_dict(self) -> dict[str, Any]:
        """The comparison as JSON holds it, in the shape of `compare-schema.json` beside this file."""
        figures = [asdict(one) | {"relative_change": one.relative} for one in self.figures]
        return {
            "schema": SCHEMA, "old": self.old, "new": self.new, "regressed": self.regressed,
            "differences": self.differences, "absolute_times_compared": self.absolute, "floor": FLOOR,
            "figures": figures, "only_old": self.only_old, "only_new": self.only_new,
        }  # fmt: skip
