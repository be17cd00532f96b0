"""The charts of a results document as inline SVG, drawn by matplotlib, coloured by the page's CSS variables."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pnp_trt.bench.tables import plural, unit_of

#: Colours that are drawn and then replaced by the page's variables, so that a chart follows light and dark.
_INK = "#010101"
_FAINT = "#020202"
_VARIABLES = {
    _INK: "currentColor",
    _FAINT: "var(--rule)",
    "#030301": "var(--cfg)",
    "#030302": "var(--unguided)",
    "#030303": "var(--guided)",
    "#030304": "var(--other)",
}
_METHOD_COLOUR = {"cfg": "#030301", "unguided": "#030302", "guided": "#030303"}
_OTHER = "#030304"
_DOTS = 100  # observations drawn per bar
_WIDTH = 4.9  # inches at 72 to the inch: 353 px, what a phone shows without scaling


def latency_charts(doc: Mapping[str, Any]) -> list[str]:
    """One per batch size: a bar per case for the median loop, a whisker to p90, a dot below per observation."""
    rows = doc["latency"]
    batches = sorted({row["batch"] for row in rows})
    return [_latency_chart([row for row in rows if row["batch"] == batch]) for batch in batches]


def _latency_chart(rows: Sequence[Mapping[str, Any]]) -> str:
    many = len({row["engine"] for row in rows}) > 1
    batch, steps = rows[0]["batch"], rows[0]["steps"]
    figure, axis = _figure(len(rows))
    limit = 0.0
    for place, row in enumerate(rows):
        p50, p90 = row["p50_ms"], row.get("p90_ms") or row["p50_ms"]
        axis.barh(place, p50, height=0.5, color=_METHOD_COLOUR.get(row["method"], _OTHER), linewidth=0)
        axis.plot([p50, p90], [place, place], color=_INK, linewidth=1.4)
        axis.plot([p90, p90], [place - 0.14, place + 0.14], color=_INK, linewidth=1.4)
        loops = [one["loop_ms"] for one in row.get("raw", [])][:_DOTS]
        axis.plot(loops, [place + 0.37] * len(loops), ".", color=_INK, markersize=4, alpha=0.4, markeredgewidth=0)
        limit = max(limit, p90, *loops)
    for place, row in enumerate(rows):
        ratio = "" if row["ratio_to_cfg"] is None else f" · {row['ratio_to_cfg']:.2f}×"
        start = max(row["p50_ms"], row.get("p90_ms") or 0) + 0.025 * limit
        axis.text(start, place, f"{_three_digits(row['p50_ms'])} ms{ratio}", va="center", color=_INK, fontsize=9)
    axis.set_yticks(range(len(rows)), [_name(row["method"], row["engine"] if many else None) for row in rows])
    axis.set_ylim(len(rows) - 0.45, -0.5)
    axis.set_xlim(0, 1.4 * limit)
    axis.set_title(f"batch {batch}, {plural(steps, 'step')}", loc="left", fontsize=10, color=_INK)
    axis.set_xlabel("ms per denoising loop, whole batch", color=_INK, fontsize=9)
    title = f"Median time of the denoising loop at batch {batch} by method, with 90th percentile and observations"
    return _svg(figure, f"latency-{batch}", title)


def compute_chart(doc: Mapping[str, Any]) -> str | None:
    """A bar per method: MACs of one picture, the attention products set off at its end."""
    rows = [row for row in doc["methods_cost"] if "macs_per_picture_without_attention" in row]
    if not rows:
        return None
    prefix, scale, _ = unit_of([row["macs_per_picture"] for row in rows])
    figure, axis = _figure(len(rows))
    limit = max(row["macs_per_picture"] for row in rows) / scale
    for place, row in enumerate(rows):
        colour = _METHOD_COLOUR.get(row["method"], _OTHER)
        base, total = row["macs_per_picture_without_attention"] / scale, row["macs_per_picture"] / scale
        axis.barh(place, base, height=0.5, color=colour, linewidth=0)
        axis.barh(place, total - base, left=base, height=0.5, color=colour, alpha=0.45, linewidth=0)
        ratio = row["macs_per_picture"] / rows[0]["macs_per_picture"] if rows[0]["method"] == "cfg" else None
        label = f"{_three_digits(total)} {prefix}" + ("" if ratio is None else f" · {ratio:.2f}×")
        axis.text(total + 0.02 * limit, place, label, va="center", color=_INK, fontsize=9)
    axis.set_yticks(range(len(rows)), [_name(row["method"], row.get("guide")) for row in rows])
    axis.set_ylim(len(rows) - 0.45, -0.55)
    axis.set_xlim(0, 1.38 * limit)
    axis.set_title(f"one picture, {plural(rows[0]['steps'], 'step')}", loc="left", fontsize=10, color=_INK)
    axis.set_xlabel(f"MACs, {prefix}; the paler end is attention products", color=_INK, fontsize=9)
    return _svg(figure, "compute", "Multiply-accumulates of one picture by method, attention products set off")


def _three_digits(value: float) -> str:
    """Three significant digits, never an exponent: "0.52", "13.6", "1,498"."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _name(method: str, below: str | None) -> str:
    if below is None:
        return method
    return f"{method}\n{below if len(below) <= 18 else below[:17] + '…'}"


def _figure(bars: int) -> tuple[Any, Any]:
    """A figure and its axes, as tall as the number of bars wants, without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 0.85 + 0.45 * bars), layout="constrained")
    axis = figure.subplots()
    axis.set_axisbelow(True)
    axis.grid(axis="x", color=_FAINT, linewidth=0.7)
    axis.tick_params(length=0, labelsize=9, colors=_INK)
    axis.locator_params(axis="x", nbins=5)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)
    axis.spines["left"].set_color(_INK)
    return figure, axis


def _svg(figure: Any, name: str, title: str) -> str:
    """The figure as an inline SVG element: text kept as text, ids of its own, colours that the page sets."""
    import matplotlib as mpl

    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "svg.id": f"chart-{name}"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # matplotlib numbers its groups from one in every figure; two charts on a page need names of their own
    svg = re.sub(r'id="(?!chart-)', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    for drawn, variable in _VARIABLES.items():
        svg = svg.replace(drawn, variable)
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{title}">{body}'
