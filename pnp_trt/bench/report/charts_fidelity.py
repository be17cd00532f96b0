"""Fidelity charts of a results document: against compute, against time, and over the guidance scale w."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ...sampling.methods import FEWER_STEPS, uses_guidance
from ...visualize.figures import plain_text
from ..metric import Metric
from .charts import FAINT, FONT, INK, PANEL, Chart, colour, figure, log_ticks, marker, svg, titled
from .fidelity_points import Point, compute_points, front, headline_w, latency_points, measure_of, series
from .words import plural, unit_of

_LINES = ("-", "--", ":", "-.")
#: Possible places of a label beside its point, best first: right, left or centred; upward offset in 0.75 lines.
_PLACES = tuple(
    (right, up) for up in (0, 1, -1, 1.6, -1.6, 2.4, -2.4) for right in (1, -1, 0) if right or abs(up) > 1.5
)
_PANELS = 4  # maximum number of charts over w, one per number of steps


@plain_text()
def pareto_charts(doc: Mapping[str, Any]) -> list[Chart]:
    """Fidelity against MACs per image and against measured time per image; each only with at least two points."""
    measure = measure_of(doc)
    if measure is None:
        return []
    w = headline_w(doc)
    at_w = "" if w is None else f", w = {w:g}"
    charts = []
    points = compute_points(doc, measure)
    if len(points) > 1:
        prefix, scale, _ = unit_of([point.x for point in points])
        name = f"MACs per image, {prefix} (log scale)"
        charts.append(_pareto(points, measure, scale, ("pareto-compute", f"Against compute{at_w}", name)))
    points = latency_points(doc, measure)
    if len(points) > 1:
        batch = min(row["batch"] for row in doc["latency"])
        name = f"ms per image, batch {batch} (log scale)"
        charts.append(_pareto(points, measure, 1, ("pareto-latency", f"Against time{at_w}", name)))
    return charts


def _pareto(points: Sequence[Point], measure: Metric, scale: float, words: tuple[str, str, str]) -> Chart:
    name, title, x_name = words
    names = series(points)
    plot, axis = figure(3.7)
    axis.grid(color=FAINT, linewidth=0.7)
    axis.set_xscale("log")
    best = front(points, measure)
    axis.plot(
        [p.x / scale for p in best], [p.y for p in best], color=INK, linewidth=5, alpha=0.16, label="Pareto front",
        solid_capstyle="round",
    )  # fmt: skip
    for number, (key, label) in enumerate(names.items()):
        own = sorted((p for p in points if (p.engine, p.method) == key), key=lambda p: p.x)
        x, y = [p.x / scale for p in own], [p.y for p in own]
        paint = colour(key[1])
        spread = [[p.y - p.low for p in own], [p.high - p.y for p in own]]
        axis.errorbar(x, y, spread, fmt="none", ecolor=paint, elinewidth=1, alpha=0.6, capsize=2)
        axis.plot(
            x, y, _LINES[_rank(names, key)], marker=marker(key[1]), color=paint, linewidth=1.2, markersize=5.5,
            markeredgecolor=PANEL, markeredgewidth=0.8, label=label, zorder=3 + number,
        )  # fmt: skip
    low, high = min(p.x for p in points) / scale, max(p.x for p in points) / scale
    axis.set_xlim(low / 1.3, high * 1.3)
    axis.margins(y=0.12)
    ticks = log_ticks(low / 1.3, high * 1.3)
    axis.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.locator_params(axis="y", nbins=6)
    titled(axis, title, x_name, measure.axis_title)
    _legend(plot, len(names) + 1)
    _label_steps(plot, axis, points, scale)
    label = (
        f"{measure.axis_title}, {title.lower()}: {plural(len(points), 'point')}, labelled by steps, with 95 % intervals"
    )
    return svg(plot, name, label)


def _rank(names: Mapping[tuple[str, str], str], key: tuple[str, str]) -> int:
    """Return the index among engines with the same method, which selects the line style."""
    return [other for other in names if other[1] == key[1]].index(key) % len(_LINES)


def _legend(plot: Any, entries: int) -> None:
    columns = entries if entries <= 3 else 2
    plot.legend(
        loc="outside upper left", ncols=columns, frameon=False, fontsize=FONT, labelcolor=INK, handlelength=1.6,
        columnspacing=1.2, handletextpad=0.5, borderaxespad=0,
    )  # fmt: skip


def _label_steps(plot: Any, axis: Any, points: Sequence[Point], scale: float) -> None:
    """Write the number of steps beside every point, where it overlaps other points and labels least."""
    plot.draw_without_rendering()  # computes the layout, and with it positions in pixels
    pixels = [tuple(axis.transData.transform((p.x / scale, p.y))) for p in points]
    unit = plot.dpi / 72  # pixels per point
    occupied = [(x - 4 * unit, y - 4 * unit, x + 4 * unit, y + 4 * unit) for x, y in pixels]
    for p, _ in zip(points, pixels, strict=True):
        x, low = axis.transData.transform((p.x / scale, p.low))
        _, high = axis.transData.transform((p.x / scale, p.high))
        occupied.append((x - unit, low, x + unit, high))
    for key in series(points):  # lines are obstacles too: approximate each by a chain of small boxes
        own = [xy for p, xy in zip(points, pixels, strict=True) if (p.engine, p.method) == key]
        for (x0, y0), (x1, y1) in pairwise(sorted(own)):
            for part in range(1, 30):
                x, y = x0 + (x1 - x0) * part / 30, y0 + (y1 - y0) * part / 30
                occupied.append((x - unit, y - unit, x + unit, y + unit))
    frame = axis.get_window_extent()
    # two CFG methods may share a point
    unique = {(p.steps, p.x, p.y): (p, xy) for p, xy in zip(points, pixels, strict=True)}
    for p, (x, y) in unique.values():
        width, height = 0.62 * (FONT - 1) * len(str(p.steps)) * unit, FONT * unit
        boxes = []
        for right, up in _PLACES:
            left = x - width / 2 + right * (6 * unit + width / 2)
            bottom = y - height / 2 + up * 0.75 * height
            box = (left, bottom, left + width, bottom + height)
            outside = left < frame.x0 or left + width > frame.x1 or bottom < frame.y0 or bottom + height > frame.y1
            boxes.append((sum(_overlap(box, one) for one in occupied) + 1e6 * outside, box))
        _, box = min(boxes, key=lambda one: one[0])
        occupied.append(box)
        place = ((box[0] - x) / unit, ((box[1] + box[3]) / 2 - y) / unit)
        axis.annotate(
            str(p.steps), (p.x / scale, p.y), place, textcoords="offset points", va="center_baseline", ha="left",
            fontsize=FONT - 1, color=INK, zorder=20,
        )  # fmt: skip


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Return the area of overlap of two boxes (left, bottom, right, top)."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


@plain_text()
def scale_charts(doc: Mapping[str, Any]) -> list[Chart]:
    """The metric over w, one chart per number of steps (the four largest), all with the same axes."""
    measure = measure_of(doc)
    if measure is None:
        return []
    judged = [row for row in doc["fidelity"] if row.get(measure.key)]
    rows = [row for row in judged if row["guidance"] is not None or not uses_guidance(row["method"])]
    curved = [row for row in rows if uses_guidance(row["method"])]
    if len({row["guidance"] for row in curved}) < 2:
        return []
    ends = [row[measure.key][end] for row in rows for end in ("low", "high")]
    margin = 0.06 * (max(ends) - min(ends))
    limits = (min(ends) - margin, max(ends) + margin)
    # CFG in half the steps has numbers of steps that no other method has
    shared = {row["steps"] for row in curved if row["method"] != FEWER_STEPS.name}
    panels = sorted(shared, reverse=True)[:_PANELS]
    rows = [row for row in rows if row["steps"] in panels]
    return [_over_w(rows, steps, measure, limits) for steps in panels]


def _over_w(rows: Sequence[Mapping[str, Any]], steps: int, measure: Metric, limits: tuple[float, float]) -> Chart:
    names = series(rows)  # from the rows of all charts, so that their legends and axes are the same
    plot, axis = figure(3.4)
    axis.grid(axis="y", color=FAINT, linewidth=0.7)
    scales = sorted({float(row["guidance"]) for row in rows if uses_guidance(row["method"])})
    for key, label in names.items():
        matching = [r for r in rows if (r["engine"], r["method"], r["steps"]) == (*key, steps)]
        own = sorted(matching, key=lambda r: r["guidance"] or 0.0)
        values = [row[measure.key] for row in own]
        paint, line = colour(key[1]), _LINES[_rank(names, key)]
        if values and not uses_guidance(key[1]):  # does not depend on w
            axis.axhspan(values[0]["low"], values[0]["high"], color=paint, alpha=0.18, linewidth=0)
            axis.axhline(values[0]["value"], color=paint, linewidth=1.4, linestyle="--", label=label)
            continue
        w = [float(row["guidance"]) for row in own]
        axis.fill_between(
            w, [v["low"] for v in values], [v["high"] for v in values], color=paint, alpha=0.18, linewidth=0
        )
        axis.plot(
            w, [v["value"] for v in values], line, marker=marker(key[1]), color=paint, linewidth=1.6, markersize=5,
            label=label,
        )  # fmt: skip
    axis.set_ylim(*limits)
    axis.set_xticks(scales, [f"{w:g}" for w in scales])
    axis.locator_params(axis="y", nbins=6)
    titled(axis, plural(steps, "step"), "guidance scale w", measure.axis_title)
    _legend(plot, len(names))
    return svg(plot, f"scale-{steps}", f"{measure.axis_title} over the guidance scale w at {plural(steps, 'step')}")
