"""Queues of requests: latency by batching policy, a chart for each kind of arrivals and load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...visualize.figures import plain_text
from .charts import Chart, bars, colour, pale_bar, svg, titled, write_at_ends
from .words import ARRIVALS, POLICIES, percent, three_digits

#: colours by batching policy: those of the methods whose images it makes, and a third for what other servers do
_COLOURS = {"step": "guided", "cfg": "cfg"}


@plain_text()
def serving_charts(doc: Mapping[str, Any]) -> list[Chart]:
    """Bars to p50 within pale bars to p95, in seconds from arrival to image."""
    found = []
    for place, held in enumerate(doc.get("serving") or ()):
        groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
        for row in held["queues"]:
            groups.setdefault((row["arrivals"], row["load"]), []).append(row)
        several = f", {held['engine']}" if len(doc["serving"]) > 1 else ""
        found += [_chart(rows, f"{place}-{number}", several) for number, rows in enumerate(groups.values())]
    return found


def _chart(rows: Sequence[Mapping[str, Any]], name: str, engine: str) -> Chart:
    made, axis = bars(len(rows))
    ends, texts = [], []
    for place, row in enumerate(rows):
        held = row["latency_s"]
        if held is None:
            ends.append(0.0)
            texts.append("above its capacity")
            continue
        paint = colour(_COLOURS.get(row["policy"], ""))
        pale_bar(axis, place, held["p95"], paint)
        axis.barh(place, held["p50"], height=0.5, color=paint, linewidth=0)
        ends.append(held["p95"])
        texts.append(f"{three_digits(held['p50'])} / {three_digits(held['p95'])} s")
    axis.set_yticks(range(len(rows)), [POLICIES.get(row["policy"], row["policy"]) for row in rows])
    arrivals, load = ARRIVALS.get(rows[0]["arrivals"], rows[0]["arrivals"]), percent(rows[0]["load"], 0)
    titled(axis, f"{arrivals}, {load} load{engine}", "s from arrival to image")
    write_at_ends(made, axis, ends, texts)
    return svg(made, f"serving-{name}", f"Seconds from arrival to image, p50 and p95: {arrivals}, {load} load{engine}")
