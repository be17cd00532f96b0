"""Bar charts of a results document: latency with its observations, compute, and measured time with its lower bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...visualize.figures import plain_text
from .charts import INK, Chart, bars, colour, engine_names, label, pale_bar, svg, titled, write_at_ends
from .tables import loops
from .words import is_reference, percent, plural, three_digits, unit_of

_DOTS = 120  # maximum number of observations shown per bar
# the axis ends at this multiple of the largest 75th percentile, so that an outlier does not squeeze all bars
_REACH = 1.5


@plain_text()
def latency_charts(doc: Mapping[str, Any]) -> list[Chart]:
    """One chart per number of steps and batch size: bars to the median, boxes over the middle half, observations."""
    return [
        _latency_chart([row for row in rows if row["batch"] == batch], steps)
        for steps, rows in loops(doc).items()
        for batch in sorted({row["batch"] for row in rows})
    ]


def _latency_chart(rows: Sequence[Mapping[str, Any]], usual: int) -> Chart:
    batch = rows[0]["batch"]
    plot, axis = bars(len(rows))
    ends, texts = [], []
    samples = [np.array([one["loop_ms"] for one in row.get("raw", [])] or [row["p50_ms"]]) for row in rows]
    reach = _REACH * max(float(np.percentile(observed, 75)) for observed in samples)
    for place, (row, observed) in enumerate(zip(rows, samples, strict=True)):
        paint = colour(row["method"])
        low, high = np.percentile(observed, [25, 75])
        pale_bar(axis, place, row["p50_ms"], paint)
        axis.barh(place, high - low, left=low, height=0.5, color=paint, linewidth=0)
        axis.plot([row["p50_ms"]] * 2, [place - 0.25, place + 0.25], color=INK, linewidth=1.6)
        outliers = observed[observed > reach]
        dots = observed[observed <= reach][:_DOTS]
        height = place + 0.37 + 0.04 * np.resize([0, 1, -1], len(dots))
        axis.plot(dots, height, ".", color=INK, markersize=3.5, alpha=0.5, markeredgewidth=0)
        ends.append(max(row["p50_ms"], float(high), float(dots.max())))
        ratio_to_cfg = row["ratio_to_cfg"]
        ratio = "" if ratio_to_cfg is None or is_reference(row) else f" · {ratio_to_cfg:.2f}×"
        steps = "" if row["steps"] == usual else f" · {plural(row['steps'], 'step')}"
        beyond = f" · {len(outliers)} up to {three_digits(float(outliers.max()))}" if len(outliers) else ""
        texts.append(f"{three_digits(row['p50_ms'])} ms{ratio}{steps}{beyond}")
    names = [label(row["method"], name) for row, name in zip(rows, engine_names(rows), strict=True)]
    axis.set_yticks(range(len(rows)), names)
    titled(axis, f"batch {batch}, {plural(usual, 'step')}", "ms per denoising loop, whole batch")
    write_at_ends(plot, axis, ends, texts)
    title = f"Time of the denoising loop at batch {batch}, {plural(usual, 'step')}: median, middle half, observations"
    return svg(plot, f"latency-{usual}-{batch}", title)


def _usual_steps(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return the most frequent number of steps; the larger one if tied."""
    steps = [int(row["steps"]) for row in rows]
    return max(steps, key=lambda n: (steps.count(n), n))


@plain_text()
def compute_chart(doc: Mapping[str, Any]) -> Chart | None:
    """A bar per method: MACs of one image, with the attention products in a paler tone."""
    rows = [row for row in doc["methods_cost"] if "macs_per_image_without_attention" in row]
    if not rows:
        return None
    prefix, scale, _ = unit_of([row["macs_per_image"] for row in rows])
    plot, axis = bars(len(rows))
    usual = _usual_steps(rows)
    ends, texts = [], []
    for place, row in enumerate(rows):
        paint = colour(row["method"])
        base, total = row["macs_per_image_without_attention"] / scale, row["macs_per_image"] / scale
        pale_bar(axis, place, total, paint)
        axis.barh(place, base, height=0.5, color=paint, linewidth=0)
        ratio_to_cfg = row["macs_per_image"] / rows[0]["macs_per_image"] if rows[0]["method"] == "cfg" else None
        text = f"{three_digits(total)} {prefix}" + (
            "" if ratio_to_cfg is None or place == 0 else f" · {ratio_to_cfg:.2f}×"
        )
        texts.append(text + ("" if row["steps"] == usual else f" · {plural(row['steps'], 'step')}"))
        ends.append(total)
    axis.set_yticks(range(len(rows)), [label(row["method"], row.get("guide")) for row in rows])
    titled(axis, f"one image, {plural(usual, 'step')}", f"MACs per image, {prefix}")
    write_at_ends(plot, axis, ends, texts)
    return svg(plot, "compute", "Multiply-accumulates of one image by method, attention products in a paler tone")


@plain_text()
def roofline_charts(doc: Mapping[str, Any]) -> list[Chart]:
    """The longest loop at the smallest and largest batch size: measured time, with its lower bound inside."""
    for steps, latency_rows in loops(doc).items():
        rows = [row for row in latency_rows if row.get("least_ms") is not None]
        batches = sorted({row["batch"] for row in rows})
        if batches:
            ends = dict.fromkeys((batches[0], batches[-1]))
            return [_roofline_chart([row for row in rows if row["batch"] == batch], steps) for batch in ends]
    return []


def _roofline_chart(rows: Sequence[Mapping[str, Any]], steps: int) -> Chart:
    batch = rows[0]["batch"]
    plot, axis = bars(len(rows))
    ends, texts = [], []
    for place, row in enumerate(rows):
        paint = colour(row["method"])
        pale_bar(axis, place, row["p50_ms"], paint)
        axis.barh(place, row["least_ms"], height=0.5, color=paint, linewidth=0)
        share = row.get("share_of_least")
        text = f"{three_digits(row['least_ms'])} of {three_digits(row['p50_ms'])} ms"
        texts.append(text + ("" if share is None else f" · {percent(share, 0)}"))
        ends.append(max(row["p50_ms"], row["least_ms"]))
    names = [label(row["method"], name) for row, name in zip(rows, engine_names(rows), strict=True)]
    axis.set_yticks(range(len(rows)), names)
    titled(axis, f"batch {batch}, {plural(steps, 'step')}", "ms per denoising loop, whole batch")
    write_at_ends(plot, axis, ends, texts)
    return svg(
        plot, f"roofline-{batch}", f"Lower bound of the time on this device and measured median at batch {batch}"
    )
