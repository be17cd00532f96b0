"""Formatting for readers: units, decimals, intervals and names of methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...sampling.methods import GUIDED, METHODS

DASH = "–"
#: labels and descriptions of other toolkits
_PEERS = {
    "diffusers": ("diffusers, eager", "diffusers' StableDiffusionPipeline, eager, CFG"),
    "diffusers-compile": ("diffusers, torch.compile", "the same with torch.compile"),
    "optimum-onnx": ("optimum-onnx", "optimum's ONNX Runtime pipeline, CFG"),
}


#: labels of batching policies in tables and charts
POLICIES = {"one": "one at a time", "whole": "whole requests", "step": "step by step", "cfg": "CFG, step by step"}
#: labels of kinds of arrivals
ARRIVALS = {"poisson": "Poisson", "bursts": "Bursts"}


def method_labels() -> dict[str, str]:
    """Every method's label in tables, peers last."""
    return {m.name: m.label for m in METHODS.values()} | {name: label for name, (label, _) in _PEERS.items()}


def method_legend() -> dict[str, str]:
    """Description of each method, for the legend of tables that show short names."""
    return {m.name: m.description for m in METHODS.values()} | {name: text for name, (_, text) in _PEERS.items()}


def number(value: float | None, decimals: int, scale: float = 1) -> str:
    """Format the value in units of `scale`; a dash if it was not measured."""
    return DASH if value is None else f"{value / scale:,.{decimals}f}"


def percent(share: float | None, decimals: int = 1) -> str:
    """Format a share as "51.0 %"."""
    return DASH if share is None else f"{100 * share:.{decimals}f} %"


def plural(count: int, word: str) -> str:
    """ "1 step", "2 steps"."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def interval(row: Mapping[str, Any], decimals: int) -> str | None:
    """Format the interval of a row's ratio to CFG as "0.53–0.56"; None for the reference itself.

    If both ends would look the same, they get more decimals.
    """
    bounds = row.get("ratio_to_cfg_interval")
    if is_reference(row):
        return None
    if not bounds:
        return None
    while decimals < 4 and f"{bounds[0]:.{decimals}f}" == f"{bounds[1]:.{decimals}f}":
        decimals += 1
    return DASH.join(f"{bound:.{decimals}f}" for bound in bounds)


def is_reference(row: Mapping[str, Any]) -> bool:
    """Whether a latency row is its own CFG reference."""
    return bool(row.get("ratio_reference") == f"{row['engine']}/{row['method']}")


def ratio(row: Mapping[str, Any], decimals: int) -> str:
    """Format a row's ratio to CFG with its interval: "0.535 [0.523, 0.536]"; "1" for the reference itself."""
    value, bounds = row.get("ratio_to_cfg"), row.get("ratio_to_cfg_interval")
    if value is None:
        return DASH
    if is_reference(row):
        return "1"
    text = f"{value:.{decimals}f}"
    return text if not bounds else f"{text} [{bounds[0]:.{decimals}f}, {bounds[1]:.{decimals}f}]"


def estimate(value: Mapping[str, Any] | None, decimals: int, scale: float = 1, *, sign: bool = False) -> str:
    """Format a measured value as "0.102 [0.096, 0.108]"; a dash if there is none."""
    if value is None:
        return DASH
    middle, low, high = (value[key] * scale for key in ("value", "low", "high"))
    plus = "+" if sign else ""
    return f"{middle:{plus}.{decimals}f} [{low:{plus}.{decimals}f}, {high:{plus}.{decimals}f}]".replace("-", "−")


def file_size(count: float | None) -> str:
    """Format bytes as "26.1 MiB"."""
    if count is None:
        return DASH
    name, size = next(((n, s) for n, s in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)) if count >= s), ("B", 1))
    return f"{count / size:.3g} {name}" if count < 1000 * size else f"{count / size:,.0f} {name}"


def three_digits(value: float) -> str:
    """Format with three significant digits and without exponent: "0.520", "13.6", "1,498"."""
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.{decimals_of([value])}f}"


def decimals_of(values: Sequence[float | None]) -> int:
    """Return the decimals, from 0 to 4, that give the smallest value three significant digits."""
    smallest = min((abs(value) for value in values if value), default=1.0)
    return max(0, min(4, 2 - math.floor(math.log10(smallest))))


def unit_of(values: Sequence[float]) -> tuple[str, float, int]:
    """Return the unit prefix for the largest value, its factor, and the decimals for the smallest value."""
    largest = max(values, default=0)
    prefix, scale = next(((name, size) for name, size in (("T", 1e12), ("G", 1e9)) if largest >= size), ("M", 1e6))
    return prefix, scale, max(1, decimals_of([value / scale for value in values]))


def method_name(row: Mapping[str, Any]) -> str:
    """Return the label of a row's method, with its guide if the row names one: "teacher + guide-tiny"."""
    guide = row.get("guide")
    if row["method"] == GUIDED.name and guide:
        return f"teacher + {guide}"
    return method_labels().get(row["method"], row["method"])
