"""Which of a document's fidelity figures go into a chart, and where: measure, scale w, compute, time."""

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
    """One place in a Pareto plot: y with its interval at x."""

    engine: str
    method: str
    steps: int
    x: float
    y: float
    low: float
    high: float


def measure_of(doc: Document) -> Metric | None:
    """How good the images are where that was measured, else how close to CFG's; None where neither was."""
    return next((one for one in axis_metrics() if any(row.get(one.key) for row in doc["fidelity"])), None)


def headline_w(doc: Document) -> float | None:
    """The w that most rows have; of equals, the one nearest to 3. Unguided rows count for none."""
    counts = Counter(
        float(row["guidance"])
        for row in doc["fidelity"]
        if uses_guidance(row["method"]) and row["guidance"] is not None
    )
    return max(counts, key=lambda w: (counts[w], -abs(w - HEADLINE_W)), default=None)


def _same_loop(method: str) -> list[str]:
    """Methods that are the same loop as this one at the same number of steps, itself first."""
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
        found = next((timed[k] for name in names if (k := (row["engine"], name, row["steps"])) in timed), None)
        return None if found is None else found.get("p50_ms_per_image")

    return _points(doc, measure, time_of)


def _points(doc: Document, measure: Metric, place: Any) -> list[Point]:
    w = headline_w(doc)
    found: dict[tuple[str, str, int], Point] = {}
    for row in doc["fidelity"]:
        value, x = row.get(measure.key), place(row)
        if value and x and (row["guidance"] == w or not uses_guidance(row["method"])):  # which stands beside every w
            key = (row["engine"], row["method"], row["steps"])
            found.setdefault(key, Point(*key, x, value["value"], value["low"], value["high"]))
    return list(found.values())


def front(points: Iterable[Point], measure: Metric) -> list[Point]:
    """The points that no other beats in both, from the cheapest on."""
    sign = -1 if measure.higher_is_better else 1
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, sign * p.y)):
        if not best or sign * point.y < sign * best[-1].y:
            best.append(point)
    return best


def series(rows: Sequence[Any]) -> dict[tuple[str, str], str]:
    """(engine, method) of points or rows, in their order, with a name: the method's, and the engine's where needed."""
    keys = list(dict.fromkeys(_key(row) for row in rows))
    several = Counter(method for _, method in keys)
    return {(engine, m): m if several[m] == 1 else f"{m}, {engine}" for engine, m in keys}


def _key(row: Any) -> tuple[str, str]:
    return (row["engine"], row["method"]) if isinstance(row, Mapping) else (row.engine, row.method)
