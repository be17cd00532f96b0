"""Selection of fidelity figures for charts: metric, scale w, and positions by compute or time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...sampling.methods import METHODS, uses_guidance
from ..metric import Metric, axis_metrics

Document = Mapping[str, Any]
HEADLINE_W = 3.0


@dataclass(frozen=True)
class Point:
    """A point in a Pareto plot: y with its interval at x."""

    engine: str
    method: str
    steps: int
    x: float
    y: float
    low: float
    high: float


def measure_of(doc: Document) -> Metric | None:
    """Return the first measured axis metric: quality if available, else similarity to CFG; None if neither."""
    return next((metric for metric in axis_metrics() if any(row.get(metric.key) for row in doc["fidelity"])), None)


def headline_w(doc: Document) -> float | None:
    """Return the most frequent w, or the one nearest to 3 if tied, ignoring rows without guidance."""
    counts = Counter(
        float(row["guidance"])
        for row in doc["fidelity"]
        if uses_guidance(row["method"]) and row["guidance"] is not None
    )
    return max(counts, key=lambda w: (counts[w], -abs(w - HEADLINE_W)), default=None)


def _same_loop(method: str) -> list[str]:
    """Return this method and the others that run the same loop at the same number of steps."""
    if method not in METHODS:
        return [method]
    loop = METHODS.get(method).of_pipeline
    return [method, *(m.name for m in METHODS.values() if m.of_pipeline == loop and m.name != method)]


def compute_points(doc: Document, measure: Metric) -> list[Point]:
    """Fidelity against MACs of one image, at the headline w."""
    return _points(doc, measure, lambda row: row.get("macs_per_image"))


def latency_points(doc: Document, measure: Metric) -> list[Point]:
    """Fidelity against milliseconds per image as measured: same engine, method and steps, at the smallest batch."""
    timed: dict[tuple[str, str, int], Mapping[str, Any]] = {}
    for row in doc["latency"]:
        key = (row["engine"], row["method"], row["steps"])
        if key not in timed or row["batch"] < timed[key]["batch"]:
            timed[key] = row

    def time_of(row: Mapping[str, Any]) -> float | None:
        names = _same_loop(row["method"])
        match = next((timed[k] for name in names if (k := (row["engine"], name, row["steps"])) in timed), None)
        return None if match is None else match.get("p50_ms_per_image")

    return _points(doc, measure, time_of)


def _points(doc: Document, measure: Metric, place: Any) -> list[Point]:
    w = headline_w(doc)
    points: dict[tuple[str, str, int], Point] = {}
    for row in doc["fidelity"]:
        value, x = row.get(measure.key), place(row)
        # rows without guidance suit every w
        if value and x and (row["guidance"] == w or not uses_guidance(row["method"])):
            key = (row["engine"], row["method"], row["steps"])
            points.setdefault(key, Point(*key, x, value["value"], value["low"], value["high"]))
    return list(points.values())


def front(points: Iterable[Point], measure: Metric) -> list[Point]:
    """Return the Pareto-optimal points, cheapest first."""
    sign = -1 if measure.higher_is_better else 1
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, sign * p.y)):
        if not best or sign * point.y < sign * best[-1].y:
            best.append(point)
    return best


def series(rows: Sequence[Any]) -> dict[tuple[str, str], str]:
    """Map (engine, method) of points or rows, in their order, to a name: the method, and the engine if ambiguous."""
    keys = list(dict.fromkeys(_key(row) for row in rows))
    several = Counter(method for _, method in keys)
    return {(engine, m): m if several[m] == 1 else f"{m}, {engine}" for engine, m in keys}


def _key(row: Any) -> tuple[str, str]:
    return (row["engine"], row["method"]) if isinstance(row, Mapping) else (row.engine, row.method)
