"""Queues of requests: latency by batching policy, one chart per kind of arrivals and load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...visualize.figures import plain_text
from .charts import Chart, bars, colour, pale_bar, svg, titled, write_at_ends
from .words import ARRIVALS, POLICIES, percent, three_digits

#: colours by batching policy: those of the methods for step-level batching, and a third for the other policies
_COLOURS = {"step": "guided", "cfg": "cfg"}


@plain_text()
def serving_charts(doc: Mapping[str, Any]) -> list[Chart]:
    """Bars to p50 within pale bars to p95, in seconds from arrival to image."""
    charts = []
    for place, serving in enumerate(doc.get("serving") or ()):
        groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
        for row in serving["queues"]:
            groups.setdefault((row["arrivals"], row["load"]), []).append(row)
        engine = f", {serving['engine']}" if len(doc["serving"]) > 1 else ""
        charts += [_chart(rows, f"{place}-{number}", engine) for number, rows in enumerate(groups.values())]
    return charts


def _chart(rows: Sequence[Mapping[str, Any]], name: str, engine: str) -> Chart:
    plot, axis = bars(len(rows))
    ends, texts = [], []
    for place, row in enumerate(rows):
        latency = row["latency_s"]
        if latency is None:
            ends.append(0.0)
            texts.append("above its capacity")
            continue
        paint = colour(_COLOURS.get(row["policy"], ""))
        pale_bar(axis, place, latency["p95"], paint)
        axis.barh(place, latency["p50"], height=0.5, color=paint, linewidth=0)
        ends.append(latency["p95"])
        texts.append(f"{three_digits(latency['p50'])} / {three_digits(latency['p95'])} s")
    axis.set_yticks(range(len(rows)), [POLICIES.get(row["policy"], row["policy"]) for row in rows])
    arrivals, load = ARRIVALS.get(rows[0]["arrivals"], rows[0]["arrivals"]), percent(rows[0]["load"], 0)
    titled(axis, f"{arrivals}, {load} load{engine}", "s from arrival to image")
    write_at_ends(plot, axis, ends, texts)
    return svg(plot, f"serving-{name}", f"Seconds from arrival to image, p50 and p95: {arrivals}, {load} load{engine}")
