"""The tables of a results document as strings, with one unit and one number of decimals a column.

A table is {"title", "head", "rows" of strings, "words": how many leading columns hold words}, or None where the
document has nothing to show. The terminal and the HTML page draw the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

METHOD_NAMES = {"cfg": "teacher, CFG", "unguided": "teacher, no guidance", "guided": "teacher + guide"}


def cost_table(doc: Mapping[str, Any]) -> dict[str, Any] | None:
    rows = doc["cost"]
    if not rows:
        return None
    unit, scale, decimals = unit_of([row[key] for row in rows for key in ("macs", "macs_without_attention")])
    size, size_scale, size_decimals = unit_of([row["parameters"] for row in rows])
    return {
        "title": "Cost of one forward at batch 1",
        "head": ["network", "runs per", f"parameters, {size}", f"MACs, {unit}", f"MACs without attention, {unit}"],
        "words": 2,
        "rows": [
            [
                row["network"],
                row.get("per", "step"),
                f"{row['parameters'] / size_scale:,.{size_decimals}f}",
                f"{row['macs'] / scale:,.{decimals}f}",
                f"{row['macs_without_attention'] / scale:,.{decimals}f}",
            ]
            for row in rows
        ],
    }


def method_table(doc: Mapping[str, Any]) -> dict[str, Any] | None:
    rows = doc["methods_cost"]
    if not rows:
        return None
    keys = ("macs_per_step", "macs_per_step_without_attention")
    unit, scale, decimals = unit_of([row[key] for row in rows for key in keys if key in row])
    large, large_scale, large_decimals = unit_of([row["macs_per_picture"] for row in rows])
    steps = rows[0]["steps"]
    return {
        "title": f"Compute per method, pictures of {plural(steps, 'step')}",
        "head": [
            "method",
            "guide",
            f"MACs per step, {unit}",
            f"without attention, {unit}",
            "of CFG",
            f"MACs per picture, {large}",
        ],
        "words": 2,
        "rows": [
            [
                METHOD_NAMES.get(row["method"], row["method"]),
                row.get("guide") or "–",
                f"{row['macs_per_step'] / scale:,.{decimals}f}",
                _number(row.get("macs_per_step_without_attention"), decimals, scale),
                percent(row.get("ratio_to_cfg")),
                f"{row['macs_per_picture'] / large_scale:,.{large_decimals}f}",
            ]
            for row in rows
        ],
    }


def latency_table(doc: Mapping[str, Any], *, short: bool = False) -> dict[str, Any] | None:
    """Every latency figure, the ratio first; `short` leaves out what a terminal of 100 columns has no room for."""
    rows = doc["latency"]
    if not rows:
        return None
    decimals = _decimals([row.get("p50_ms_per_step", row["p50_ms"]) for row in rows])
    columns: dict[str, list[str]] = {
        "engine": [row["engine"] for row in rows],
        "method": [row["method"] for row in rows],
        "batch": [str(row["batch"]) for row in rows],
        "ratio to CFG": [_number(row["ratio_to_cfg"], 3) for row in rows],
        "95 % interval": [interval(row, 3) or "–" for row in rows],
        "per step": [_number(row.get("p50_ms_per_step"), decimals) for row in rows],
        "per picture": [_number(row.get("p50_ms_per_picture"), decimals) for row in rows],
        "loop p50": [_number(row["p50_ms"], decimals) for row in rows],
        "loop p90": [_number(row.get("p90_ms"), decimals) for row in rows],
        "loop p99": [_number(row.get("p99_ms"), decimals) for row in rows],
        "steps": [str(row["steps"]) for row in rows],
        "spread": [percent(row.get("spread")) for row in rows],
    }
    if short:
        for name in ("steps", "loop p90", "loop p99", "spread"):
            del columns[name]
    return {
        "title": "Latency in ms",
        "head": list(columns),
        "words": 2,
        "rows": [list(cells) for cells in zip(*columns.values(), strict=True)],
    }


def fidelity_table(doc: Mapping[str, Any]) -> dict[str, Any] | None:
    """Whatever the fidelity rows hold; a measured value with its interval is {"value", "low", "high"}."""
    rows = doc["fidelity"]
    if not rows:
        return None
    names = list(dict.fromkeys(key for row in rows for key, value in row.items() if _is_cell(value)))
    words = [name for name in names if any(isinstance(row.get(name), str) for row in rows)]
    names = words + [name for name in names if name not in words]
    return {
        "title": "Measured on the pictures, 95 % intervals in brackets",
        "head": [name.replace("_", " ") for name in names],
        "words": len(words),
        "rows": [[_cell(row.get(name)) for name in names] for row in rows],
    }


def _is_cell(value: Any) -> bool:
    return isinstance(value, (str, int, float)) or (isinstance(value, Mapping) and "value" in value)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping) and "value" in value:
        bounds = f" [{value['low']:.3f}, {value['high']:.3f}]" if "low" in value and "high" in value else ""
        return f"{value['value']:.3f}{bounds}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if _is_cell(value) else "–"


def _number(value: float | None, decimals: int, scale: float = 1) -> str:
    return "–" if value is None else f"{value / scale:,.{decimals}f}"


def percent(share: float | None) -> str:
    """A share as "51.0 %"."""
    return "–" if share is None else f"{100 * share:.1f} %"


def interval(row: Mapping[str, Any], decimals: int) -> str | None:
    """The interval of a row's ratio to CFG as "0.53–0.56"; None for the reference itself."""
    bounds = row.get("ratio_to_cfg_interval")
    if row.get("ratio_reference") == f"{row['engine']}/{row['method']}":
        return None
    return None if not bounds else "–".join(f"{bound:.{decimals}f}" for bound in bounds)


def plural(number: int, word: str) -> str:
    """ "1 step", "2 steps"."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _decimals(values: Sequence[float]) -> int:
    """So many decimals that the smallest value keeps three significant digits, from 0 to 4."""
    smallest = min((abs(value) for value in values if value), default=1.0)
    return max(0, min(4, 2 - math.floor(math.log10(smallest))))


def unit_of(values: Sequence[float]) -> tuple[str, float, int]:
    """The prefix that the largest value wants, its factor, and the decimals that the smallest one wants."""
    largest = max(values, default=0)
    prefix, scale = next(((name, size) for name, size in (("T", 1e12), ("G", 1e9)) if largest >= size), ("M", 1e6))
    return prefix, scale, max(1, _decimals([value / scale for value in values]))


def largest_batches(doc: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Per engine, the guided row with a ratio at the largest batch."""
    best: dict[str, Mapping[str, Any]] = {}
    for row in doc["latency"]:
        if row["method"] != "guided" or row["ratio_to_cfg"] is None:
            continue
        if row["engine"] not in best or row["batch"] > best[row["engine"]]["batch"]:
            best[row["engine"]] = row
    return list(best.values())
