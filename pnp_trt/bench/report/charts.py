"""Common code of all charts of a results document: matplotlib figures, colours set by the page, and inline SVG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...sampling.methods import METHODS

#: Placeholder colours, later replaced by the page's CSS variables so that charts follow light and dark mode.
INK = "#010101"
FAINT = "#020202"
PANEL = "#020203"
_VARIABLES = {INK: "currentColor", FAINT: "var(--rule)", PANEL: "var(--paper)"}
#: the name under which the page colours all peers, and its colours in light and dark mode
_PEER, _PEER_COLOUR = "peer", ("#7a4fa3", "#b695dd")
WIDTH = 4.5  # inches; at 72 px per inch 324 px, which a phone 360 px wide shows without scaling
FONT = 9.5
_NAME = 19  # maximum length of an engine's name beside a bar


@dataclass(frozen=True)
class Chart:
    """An inline SVG and a sentence that describes it, for readers who cannot see it."""

    svg: str
    title: str


def page_colours() -> dict[str, tuple[str, str]]:
    """CSS colours of every method on a light and a dark page, by the name of the page's variable."""
    return {m.name: m.colour for m in METHODS.values()} | {_PEER: _PEER_COLOUR}


def _stand_ins() -> dict[str, str]:
    """Placeholder colours by method, later replaced by the page's variables."""
    return {name: f"#0303{place:02x}" for place, name in enumerate(page_colours(), 1)}


def colour(method: str) -> str:
    """Return the placeholder colour of a method; all peers share one."""
    colours = _stand_ins()
    return colours.get(method, colours[_PEER])


def marker(method: str) -> str:
    """Return a method's marker, by its name in matplotlib."""
    return METHODS.get(method).marker if method in METHODS else "P"


def label(method: str, engine: str | None) -> str:
    """Return a method with its engine below, shortened in the middle because names differ at both ends."""
    if engine is None:
        return method
    half = (_NAME - 1) // 2
    return f"{method}\n{engine if len(engine) <= _NAME else f'{engine[:half]}…{engine[-half:]}'}"


def figure(height: float) -> tuple[Any, Any]:
    """Create a figure of `height` inches and its axes, without pyplot's global state."""
    from matplotlib.figure import Figure

    plot = Figure(figsize=(WIDTH, height), layout="constrained")
    axis = plot.subplots()
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=FONT, colors=INK, which="both")
    for side in ("top", "right", "bottom", "left"):
        axis.spines[side].set_visible(False)
    axis.title.set_color(INK)
    return plot, axis


def bars(count: int) -> tuple[Any, Any]:
    """Create figure and axes for `count` horizontal bars, the first at the top, with vertical grid lines."""
    plot, axis = figure(0.9 + 0.47 * count)
    axis.grid(axis="x", color=FAINT, linewidth=0.7)
    axis.spines["left"].set_visible(True)
    axis.spines["left"].set_color(INK)
    axis.set_ylim(count - 0.45, -0.55)
    axis.locator_params(axis="x", nbins=4)
    axis.xaxis.set_major_formatter(lambda value, place: f"{value:,g}")
    return plot, axis


def write_at_ends(plot: Any, axis: Any, ends: Sequence[float], texts: Sequence[str]) -> None:
    """Write a text after every bar, and lengthen the axis so that all texts fit. Set the ticks before calling it."""
    axis.set_xlim(0, max(ends) or 1)
    plot.draw_without_rendering()  # computes the layout, and with it the axis' width
    width = axis.get_window_extent().width / plot.dpi * 72
    widest = 0.75 * width  # a longer text would leave no room for bars
    shares = [min(0.57 * FONT * len(text) + 8, widest) / width for text in texts]
    limit = max(end / (1 - share) for end, share in zip(ends, shares, strict=True)) or 1
    axis.set_xlim(0, limit)
    for place, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axis.text(end + 6 / width * limit, place, text, va="center", color=INK, fontsize=FONT)


def pale_bar(axis: Any, place: int, length: float, paint: str) -> None:
    """Draw a bar in a pale tone of its colour, which hides the grid behind it."""
    axis.barh(place, length, height=0.5, color=PANEL, linewidth=0)
    axis.barh(place, length, height=0.5, color=paint, alpha=0.35, linewidth=0)


def titled(axis: Any, title: str, x: str, y: str | None = None) -> None:
    """Set the title, left-aligned, and the axis labels, in the page's text colour."""
    axis.set_title(title, loc="left", fontsize=FONT + 1, color=INK, fontweight="bold")
    axis.set_xlabel(x, color=INK, fontsize=FONT)
    if y is not None:
        axis.set_ylabel(y, color=INK, fontsize=FONT)


def log_ticks(low: float, high: float) -> list[float]:
    """Return at most six round values within [low, high], on a logarithmic scale; fewer per decade in wide ranges."""
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**e for e in range(-12, 19) for s in steps if low <= s * 10.0**e <= high]
        if len(ticks) <= 6:
            return ticks
    return ticks[:: -(-len(ticks) // 6)]


def svg(plot: Any, name: str, title: str) -> Chart:
    """Render the figure as an inline SVG element, with text as text, unique ids and colours that the page sets."""
    import matplotlib as mpl

    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "svg.id": f"chart-{name}"}):
        plot.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # matplotlib numbers its groups from one in every figure; ids of charts on one page must be unique
    text = re.sub(r'id="(?!chart-)', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    variables = _VARIABLES | {placeholder: f"var(--{name})" for name, placeholder in _stand_ins().items()}
    for placeholder, variable in variables.items():
        text = text.replace(placeholder, variable)
    head, body = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return Chart(f'{head} role="img" aria-label="{html.escape(title)}">{body}', title)


def engine_names(rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """Return each row's engine for its label, or None if all rows have the same."""
    several = len({row["engine"] for row in rows}) > 1
    return [row["engine"] if several else None for row in rows]
