"""What all charts of a results document share: figures, colours that the page sets, and inline SVG, by matplotlib."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...sampling.methods import METHODS

#: Colours that are drawn and then replaced by the page's variables, so that a chart follows light and dark.
INK = "#010101"
FAINT = "#020202"
PANEL = "#020203"
_VARIABLES = {INK: "currentColor", FAINT: "var(--rule)", PANEL: "var(--paper)"}
#: the method of all peers on the page, with its colours in light and dark
_PEER, _PEER_COLOUR = "peer", ("#7a4fa3", "#b695dd")
WIDTH = 4.5  # inches at 72 to the inch: 324 px, what a phone of 360 px shows without scaling
FONT = 9.5
_NAME = 19  # characters of an engine's name beside a bar


@dataclass(frozen=True)
class Chart:
    """An inline SVG with what it shows, in a sentence, for those who do not see it."""

    svg: str
    title: str


def page_colours() -> dict[str, tuple[str, str]]:
    """CSS colours of every method on a light and on a dark page, by the name of the page's variable."""
    return {m.name: m.colour for m in METHODS.values()} | {_PEER: _PEER_COLOUR}


def _stand_ins() -> dict[str, str]:
    """Colours that are drawn and then replaced by the page's variables, by method."""
    return {name: f"#0303{place:02x}" for place, name in enumerate(page_colours(), 1)}


def colour(method: str) -> str:
    """The stand-in colour of a method; peers share one."""
    found = _stand_ins()
    return found.get(method, found[_PEER])


def marker(method: str) -> str:
    """matplotlib's name of a method's shape."""
    return METHODS.get(method).marker if method in METHODS else "P"


def label(method: str, engine: str | None) -> str:
    """A method with its engine below, shortened in the middle: names differ at both ends."""
    if engine is None:
        return method
    half = (_NAME - 1) // 2
    return f"{method}\n{engine if len(engine) <= _NAME else f'{engine[:half]}…{engine[-half:]}'}"


def figure(height: float) -> tuple[Any, Any]:
    """A figure of `height` inches and its axes, without pyplot's global state."""
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
    """Figure and axes for `count` horizontal bars, the first on top, with a vertical grid."""
    plot, axis = figure(0.9 + 0.47 * count)
    axis.grid(axis="x", color=FAINT, linewidth=0.7)
    axis.spines["left"].set_visible(True)
    axis.spines["left"].set_color(INK)
    axis.set_ylim(count - 0.45, -0.55)
    axis.locator_params(axis="x", nbins=4)
    axis.xaxis.set_major_formatter(lambda value, place: f"{value:,g}")
    return plot, axis


def write_at_ends(plot: Any, axis: Any, ends: Sequence[float], texts: Sequence[str]) -> None:
    """A text behind the end of every bar, and an axis long enough that each has room. After the ticks are set."""
    axis.set_xlim(0, max(ends) or 1)
    plot.draw_without_rendering()  # settles the layout, so that the axis has its width
    width = axis.get_window_extent().width / plot.dpi * 72
    widest = 0.75 * width  # a longer text would leave no room for bars
    shares = [min(0.57 * FONT * len(text) + 8, widest) / width for text in texts]
    limit = max(end / (1 - share) for end, share in zip(ends, shares, strict=True)) or 1
    axis.set_xlim(0, limit)
    for place, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axis.text(end + 6 / width * limit, place, text, va="center", color=INK, fontsize=FONT)


def pale_bar(axis: Any, place: int, length: float, paint: str) -> None:
    """A bar in a pale tone of its colour that hides the grid behind it."""
    axis.barh(place, length, height=0.5, color=PANEL, linewidth=0)
    axis.barh(place, length, height=0.5, color=paint, alpha=0.35, linewidth=0)


def titled(axis: Any, title: str, x: str, y: str | None = None) -> None:
    """Title on the left and the axes' names, with their units, in the page's ink."""
    axis.set_title(title, loc="left", fontsize=FONT + 1, color=INK, fontweight="bold")
    axis.set_xlabel(x, color=INK, fontsize=FONT)
    if y is not None:
        axis.set_ylabel(y, color=INK, fontsize=FONT)


def log_ticks(low: float, high: float) -> list[float]:
    """At most six values (1, 2, 5 times a power of ten; fewer where the range is wide) within [low, high]."""
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [s * 10.0**e for e in range(-12, 19) for s in steps if low <= s * 10.0**e <= high]
        if len(found) <= 6:
            return found
    return found[:: -(-len(found) // 6)]


def svg(plot: Any, name: str, title: str) -> Chart:
    """The figure as an inline SVG element: text kept as text, ids of its own, colours that the page sets."""
    import matplotlib as mpl

    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "svg.id": f"chart-{name}"}):
        plot.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # matplotlib numbers its groups from one in every figure; two charts on a page need names of their own
    text = re.sub(r'id="(?!chart-)', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    variables = _VARIABLES | {drawn: f"var(--{name})" for name, drawn in _stand_ins().items()}
    for drawn, variable in variables.items():
        text = text.replace(drawn, variable)
    head, body = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return Chart(f'{head} role="img" aria-label="{html.escape(title)}">{body}', title)


def engine_names(rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """What each row's label states of its engine: nothing where all rows have the same."""
    many = len({row["engine"] for row in rows}) > 1
    return [row["engine"] if many else None for row in rows]
