"""The tables of a comparison: what differs around it, significant changes, what one document alone has."""

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
_MOST = 12  # rows of one document alone that are named


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Tables in reading order; those that would be empty are left out."""
    tables = []
    if comparison.differences:
        note = () if comparison.absolute else ("Absolute times were not compared: device or versions differ.",)
        tables.append(Table("The runs differ in", ["what"], [[one] for one in comparison.differences], 1, note))
    for title, verdict, weak in (
        ("Significantly worse", "worse", False),
        ("Significantly better", "better", False),
        ("Slower by absolute times: a hint, not a proof", "worse", True),
        ("Faster by absolute times: a hint, not a proof", "better", True),
    ):
        if changes := comparison.of(verdict, weak=weak):
            together = _common(comparison) if weak and verdict == "worse" else None
            notes = () if together is None else (together,)
            head = ["what", "figure", "old", "new", "change"]
            tables.append(Table(title, head, [_row(one) for one in changes], 2, notes))
    for title, rows in (
        ("In the old results only", comparison.only_old),
        ("In the new results only", comparison.only_new),
    ):
        if rows:
            more = len(rows) - _MOST
            notes = (f"and {more} more; the JSON has them all",) if more > 0 else ()
            cells = [[row["part"].replace("_", " "), said(row["key"])] for row in rows[:_MOST]]
            tables.append(Table(title, ["part", "row"], cells, 2, notes))
    return tables


def said(key: Mapping[str, Any]) -> str:
    """A row's key in words: "emoji-tiny guided, batch 4, 20 steps, w = 3"."""
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


def _row(one: Change) -> list[str]:
    values = [one.old, one.new, *(one.old_interval or ()), *(one.new_interval or ())]
    decimals = 0 if one.evidence == "exact" else max(2, decimals_of([max(map(abs, values))]))
    cells = [_cell(one.old, one.old_interval, decimals), _cell(one.new, one.new_interval, decimals)]
    if one.part == "fidelity" or one.relative is None:  # figures that may be 0 or below have no percentage
        change = f"{one.new - one.old:+,.{decimals}f}"
    else:
        change = f"{'+' if one.relative > 0 else ''}{percent(one.relative)}"
    return [said(one.key), _name(one.figure), *cells, change.replace("-", "−")]


def _name(figure: str) -> str:
    """A figure's name, in the unit that the document has it in."""
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
    """That all times moved together, which points to the machine rather than the code."""
    moves = [
        math.log(one.new / one.old) for one in comparison.figures if one.figure == "p50_ms" and one.old and one.new
    ]
    if len(moves) < 3 or max(moves) - min(moves) > 2 * FLOOR:
        return None
    middle = math.exp(sorted(moves)[len(moves) // 2])
    return f"All loops moved together, by {middle:.2f} ×: that looks like the machine, or what all methods share."
