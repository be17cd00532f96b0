"""Compare two results documents: significant changes, unchanged figures, and rows that only one of them has.

Each change is labelled with the strength of its evidence. Counts are exact. A ratio to CFG, paired by round within one
run, and a fidelity figure have 95 % intervals; they changed if the old and the new interval do not overlap. A time
ratio must also change by more than `FLOOR`, because an interval over the rounds of one run does not include the
variation between runs. Absolute times are compared only between runs on the same device with the same versions, and
even then they are a hint, as they include other load on the machine. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InputError
from ...sampling.methods import uses_guidance
from ..metric import METRICS
from ..report.words import plural
from .changes import FLOOR, Change, Comparison

if TYPE_CHECKING:
    from rich.console import RenderableType

_RESAMPLES = 2000
Document = Mapping[str, Any]
Row = Mapping[str, Any]

_COST = ("parameters", "macs", "macs_without_attention")
_METHOD_COST = ("macs_per_image", "macs_per_image_without_attention")
#: Keys that identify a row of a part.
_KEYS: dict[str, tuple[str, ...]] = {
    "cost": ("network",),
    "methods_cost": ("method", "guide", "steps"),
    "latency": ("engine", "method", "batch", "steps", "guidance", "guided_interval"),
    "cold_start": ("engine",),
    "fidelity": ("engine", "method", "steps", "guidance"),
}


def compare(old: Document, new: Document) -> Comparison:
    """Compare `old` with `new`; both are documents of `pnp-trt/bench/3`.

    Raises:
        InputError: if they measured different base models.
    """
    check_base(old, new)
    absolute = not _elsewhere(old, new)
    comparison = Comparison(_origin(old), _origin(new), _elsewhere(old, new) + _otherwise(old, new), absolute, [])
    for part in _KEYS:
        before, after = _by_key(old, part), _by_key(new, part)
        for key, row in before.items():
            if key in after:
                comparison.figures.extend(
                    _figures(part, dict(zip(_KEYS[part], key, strict=True)), row, after[key], absolute)
                )
        for rows, others, into in ((before, after, comparison.only_old), (after, before, comparison.only_new)):
            into.extend(
                {"part": part, "key": dict(zip(_KEYS[part], key, strict=True))} for key in rows if key not in others
            )
    return comparison


def check_base(old: Document, new: Document) -> None:
    """Raise InputError if two documents are of different base models; `new` may still lack its measurements."""
    bases = [doc["settings"].get("base") for doc in (old, new)]
    if None not in bases and bases[0] != bases[1]:
        raise InputError(
            f"the old results are of base '{bases[0]}', the new ones of '{bases[1]}'; "
            f"compare with results of the same base: pnp-trt bench --base {bases[1]} --json FILE"
        )
    sizes = [{r["parameters"] for r in doc.get("cost", []) if r["network"] == "teacher"} for doc in (old, new)]
    if all(sizes) and sizes[0] != sizes[1]:
        (before,), (after,) = sizes
        raise InputError(
            f"the teachers differ, {before:,} parameters in the old results and {after:,} in the new ones; "
            "compare results of the same base"
        )


def _by_key(doc: Document, part: str) -> dict[tuple[Any, ...], Row]:
    rows = {}
    for row in doc[part]:
        key = [row.get(name) for name in _KEYS[part]]
        if "guidance" in _KEYS[part] and not uses_guidance(row["method"]):
            key[_KEYS[part].index("guidance")] = None  # its images do not depend on w
        rows[tuple(tuple(value) if isinstance(value, list) else value for value in key)] = row
    return rows


def _figures(part: str, key: dict[str, Any], old: Row, new: Row, absolute: bool) -> Iterable[Change]:
    """Compare every figure that both rows have."""
    if part in ("cost", "methods_cost"):
        for name in _COST if part == "cost" else _METHOD_COST:
            if name in old and name in new:
                verdict = "same" if old[name] == new[name] else "worse" if new[name] > old[name] else "better"
                yield Change(part, key, name, old[name], new[name], None, None, verdict, "exact")
    elif part == "fidelity":
        for metric in METRICS.values():
            name = metric.key
            before, after = old.get(name), new.get(name)
            if before and after:
                was, now = (before["low"], before["high"]), (after["low"], after["high"])
                verdict = _verdict(was, now, metric.higher_is_better)
                yield Change(part, key, name, before["value"], after["value"], was, now, verdict, "interval")
    elif part == "latency":
        yield from _ratio(key, old, new)
        if absolute:
            yield from _times(
                part, key, "p50_ms", [[one["loop_ms"] for one in row.get("raw", [])] for row in (old, new)]
            )
    elif absolute:
        yield from _times(part, key, "p50_s", [old["seconds"], new["seconds"]])


def _ratio(key: dict[str, Any], old: Row, new: Row) -> Iterable[Change]:
    """Compare the ratio to CFG paired by round; CFG itself has none."""
    own = f"{new['engine']}/{new['method']}"
    was, now = old.get("ratio_to_cfg_interval"), new.get("ratio_to_cfg_interval")
    if was is None or now is None or own in (old.get("ratio_reference"), new.get("ratio_reference")):
        return
    before, after = old["ratio_to_cfg"], new["ratio_to_cfg"]
    verdict = _verdict(was, now, False) if _moved(before, after) else "same"
    yield Change("latency", key, "ratio_to_cfg", before, after, tuple(was), tuple(now), verdict, "interval")


def _times(part: str, key: dict[str, Any], figure: str, observed: Sequence[Sequence[float]]) -> Iterable[Change]:
    """Compare medians of raw observations by bootstrap, if there are at least three in each document."""
    if min(map(len, observed)) < 3:
        return
    before, was = _median(np.asarray(observed[0], dtype=float))
    after, now = _median(np.asarray(observed[1], dtype=float))
    verdict = _verdict(was, now, False) if _moved(before, after) else "same"
    yield Change(part, key, figure, before, after, was, now, verdict, "weak")


def _median(values: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Return the median and its seeded 95 % bootstrap interval."""
    draws = np.random.default_rng(0).integers(0, len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[draws], axis=1), [2.5, 97.5])
    return float(np.median(values)), (float(low), float(high))


def _moved(old: float, new: float) -> bool:
    """Whether a time changed by more than `FLOOR`; symmetric, so that the order does not matter."""
    return abs(np.log(max(new, 1e-12) / max(old, 1e-12))) > np.log1p(FLOOR)


def _verdict(old: Sequence[float], new: Sequence[float], larger_is_better: bool) -> str:
    if old[0] <= new[1] and new[0] <= old[1]:
        return "same"
    return "better" if (new[0] > old[1]) == larger_is_better else "worse"


# ------------------------------------------------------------------------------------------- what else differs


def _origin(doc: Document) -> dict[str, Any]:
    return {key: doc["provenance"].get(key) for key in ("command", "date", "commit", "uncommitted_changes")}


def _elsewhere(old: Document, new: Document) -> list[str]:
    """Return differences that make absolute times incomparable: device and versions."""
    differences = []
    for name, get in _PLACES.items():
        before, after = get(old), get(new)
        if before != after:
            differences.append(f"{name}: {before or 'none'} → {after or 'none'}")
    versions = [doc["provenance"].get("packages", {}) for doc in (old, new)]
    for package in sorted(versions[0].keys() | versions[1].keys()):
        before, after = versions[0].get(package), versions[1].get(package)
        if before != after:
            differences.append(f"{package}: {before or 'not installed'} → {after or 'not installed'}")
    return differences


_PLACES: dict[str, Callable[[Document], Any]] = {
    "processor": lambda doc: doc["provenance"]["cpu"],
    "usable cores": lambda doc: doc["provenance"].get("usable_cores"),
    "accelerator": lambda doc: doc["provenance"].get("device"),
    "measured device": lambda doc: (doc["device"] or {}).get("name"),
    "platform": lambda doc: doc["provenance"]["platform"],
    "Python": lambda doc: doc["provenance"]["python"],
}


def _otherwise(old: Document, new: Document) -> list[str]:
    """Return differences in commit and settings, and a note on uncommitted changes."""
    differences = []
    commits = [doc["provenance"].get("commit") for doc in (old, new)]
    if commits[0] != commits[1]:
        differences.append(f"commit: {(commits[0] or 'none')[:12]} → {(commits[1] or 'none')[:12]}")
    if any(doc["provenance"].get("uncommitted_changes") for doc in (old, new)):
        differences.append("a run had uncommitted changes: its commit does not contain all of its code")
    settings = [doc["settings"] for doc in (old, new)]
    for name in sorted(settings[0].keys() | settings[1].keys()):
        before, after = settings[0].get(name), settings[1].get(name)
        if before != after:
            differences.append(f"setting {name.replace('_', ' ')}: {before} → {after}")
    return differences


def summary(comparison: Comparison) -> str:
    """Summarise the comparison in one or two sentences."""
    firm = [change for change in comparison.figures if change.evidence != "weak"]
    worse, better = len(comparison.of("worse")), len(comparison.of("better"))
    if not comparison.figures:
        return "The two results have no figures in common."
    text = f"{plural(len(firm), 'figure')} compared: {worse} worse, {better} better, the others within the noise."
    hints = len(comparison.of("worse", weak=True)), len(comparison.of("better", weak=True))
    if any(hints):
        text += f" Absolute times hint at {hints[0]} slower and {hints[1]} faster."
    return text


def render_terminal(comparison: Comparison) -> RenderableType:
    """The comparison as one rich renderable: differences of the runs, changes, and rows that only one of them has."""
    from ..report.terminal import Tables
    from .tables import comparison_tables

    return Tables(comparison_tables(comparison), [summary(comparison)])
