"""The tables of a comparison: differences of the runs, significant changes, and rows that only one of them has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..metric import METRICS
from ..report.tables import Table
from ..report.words import decimals_of, percent
from .changes import FLOOR, Change, Comparison

_NAMES = {
    "ratio_to_cfg": "of CFG's time", "p50_ms": "loop, ms", "p50_s": "cold start, s",
    "macs_per_image": "MACs per image", "macs_without_attention": "MACs without attention", "macs": "MACs",
    "macs_per_image_without_attention": "MACs per image without attention",
}  # fmt: skip
_MOST = 12  # maximum number of listed rows that only one document has


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Tables in reading order; those that would be empty are left out."""
    tables = []
    if comparison.differences:
        note = () if comparison.absolute else ("Absolute times were not compared: device or versions differ.",)
        tables.append(Table("The runs differ in", ["what"], [[item] for item in comparison.differences], 1, note))
    for title, verdict, weak in (
        ("Significantly worse", "worse", False),
        ("Significantly better", "better", False),
        ("Slower by absolute times: a hint, not a proof", "worse", True),
        ("Faster by absolute times: a hint, not a proof", "better", True),
    ):
        if changes := comparison.of(verdict, weak=weak):
            common = _common(comparison) if weak and verdict == "worse" else None
            notes = () if common is None else (common,)
            head = ["what", "figure", "old", "new", "change"]
            tables.append(Table(title, head, [_row(item) for item in changes], 2, notes))
    for title, rows in (
        ("In the old results only", comparison.only_old),
        ("In the new results only", comparison.only_new),
    ):
        if rows:
            more = len(rows) - _MOST
            notes = (f"and {more} more; the JSON file lists all",) if more > 0 else ()
            cells = [[row["part"].replace("_", " "), describe(row["key"])] for row in rows[:_MOST]]
            tables.append(Table(title, ["part", "row"], cells, 2, notes))
    return tables


def describe(key: Mapping[str, Any]) -> str:
    """Format a row's key: "emoji-tiny guided, batch 4, 20 steps, w = 3"."""
    words = [str(key[name]) for name in ("network", "engine", "method", "guide") if key.get(name)]
    parts = [" ".join(words)]
    if key.get("batch") is not None:
        parts.append(f"batch\N{NO-BREAK SPACE}{key['batch']}")
    if key.get("steps") is not None:
        parts.append(f"{key['steps']}\N{NO-BREAK SPACE}steps")
    if key.get("guidance") is not None:
        parts.append(f"w = {key['guidance']:g}".replace(" ", "\N{NO-BREAK SPACE}"))
    if key.get("guided_interval") is not None:
        parts.append("t from {:g} to {:g}".format(*key["guided_interval"]))
    return ", ".join(parts)


def _row(change: Change) -> list[str]:
    values = [change.old, change.new, *(change.old_interval or ()), *(change.new_interval or ())]
    decimals = 0 if change.evidence == "exact" else max(2, decimals_of([max(map(abs, values))]))
    cells = [_cell(change.old, change.old_interval, decimals), _cell(change.new, change.new_interval, decimals)]
    if change.part == "fidelity" or change.relative is None:  # no percentage for figures that may be 0 or negative
        difference = f"{change.new - change.old:+,.{decimals}f}"
    else:
        difference = f"{'+' if change.relative > 0 else ''}{percent(change.relative)}"
    return [describe(change.key), _name(change.figure), *cells, difference.replace("-", "−")]


def _name(figure: str) -> str:
    """Return a figure's name, in the document's unit."""
    if figure in METRICS:
        metric = METRICS[figure]
        return metric.name if metric.scale == 1 else metric.label
    return _NAMES.get(figure, figure.replace("_", " "))


def _cell(value: float, interval: Sequence[float] | None, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    if interval:
        text += f" [{interval[0]:,.{decimals}f}, {interval[1]:,.{decimals}f}]"
    return text.replace("-", "−")


def _common(comparison: Comparison) -> str | None:
    """Return a note if all times changed by a similar factor, which suggests the machine rather than the code."""
    moves = [
        math.log(change.new / change.old)
        for change in comparison.figures
        if change.figure == "p50_ms" and change.old and change.new
    ]
    if len(moves) < 3 or max(moves) - min(moves) > 2 * FLOOR:
        return None
    middle = math.exp(sorted(moves)[len(moves) // 2])
    return (
        f"All loops changed together, by {middle:.2f} ×: the cause may be the machine, or code that all methods share."
    )
