"""The paper's figure: maps of what a guide injects, over steps and guidance scales, and the resulting images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .figures import plain_text
from .record import Recording

#: sizes in inches
CELL, GAP, BLOCK_GAP, BAND_GAP, LEFT, TOP, HEAD, FOOT, EDGE = 0.84, 0.04, 0.24, 0.22, 0.72, 0.66, 0.62, 0.86, 0.14
DPI = 120
#: maximum cells of maps side by side; further layers are drawn in bands below
CELLS_IN_A_ROW = 16
INK, FAINT = "#1a1a1a", "#666666"


def shown_steps(steps: int, show: int) -> list[int]:
    """Return the indices of at most ``show`` steps, evenly spaced over a run, including the first and the last."""
    return sorted({round(float(i)) for i in np.linspace(0, steps - 1, show)})


@plain_text()
def draw_maps(recording: Recording, chosen: Sequence[int], title: str) -> np.ndarray:
    """Draw the labelled figure, uint8 ``[H, W, 3]``: rows are scales, blocks are layers, columns are steps.

    For each position, a cell shows the RMS over channels of what the guide adds, relative to the RMS of the feature map
    that it is added to. All cells share one colour scale, so that their strengths can be compared.

    Args:
        chosen: indices of the layers to show.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    steps = recording.shown
    top = max(float(one.max()) for of_scale in recording.maps for i in chosen for one in of_scale[i])
    # the square root keeps weak detail in late steps visible beside strong injections in early steps
    norm = PowerNorm(0.5, vmin=0.0, vmax=top or 1.0)
    colours = colormaps["inferno"]

    bands = _bands(chosen, len(steps))
    across = len(bands[0])
    block = len(steps) * (CELL + GAP) - GAP
    band = HEAD + len(recording.guidance) * (CELL + GAP) + BAND_GAP
    width = max(LEFT + across * (block + BLOCK_GAP) + CELL + EDGE, 6.4)
    height = TOP + len(bands) * band - BAND_GAP + FOOT
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")

    def cell(x: float, y: float) -> Any:
        """Add the axes of a cell, with its upper left corner (x, y) inches from the page's."""
        axis = figure.add_axes((x / width, 1 - (y + CELL) / height, CELL / width, CELL / height))
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set_visible(False)
        return axis

    def text(x: float, y: float, words: str, size: float = 10, colour: str = INK, **options: Any) -> None:
        figure.text(x / width, 1 - y / height, words, fontsize=size, color=colour, **options)

    text(EDGE, 0.3, _fit(title, width - 2 * EDGE, 13), 13, weight="bold", va="center")
    for b, members in enumerate(bands):
        upper = TOP + b * band
        end = LEFT + len(members) * (block + BLOCK_GAP)
        for k, i in enumerate(members):
            x0 = LEFT + k * (block + BLOCK_GAP)
            layer = recording.layers[i]
            about = f"{layer.channels} × {layer.height} × {layer.width}" if layer.emits else "adds nothing"
            label = f"{layer.name} ({about})" if len(steps) > 2 else layer.name
            text(x0 + block / 2, upper + 0.12, label, 11, ha="center", va="center", weight="bold")
            for c, s in enumerate(steps):
                x = x0 + c * (CELL + GAP)
                label = f"step {s + 1}\nt = {recording.timesteps[s]}"
                text(x + CELL / 2, upper + HEAD - 0.04, label, 9, FAINT, ha="center", va="bottom", linespacing=1.15)
                for r in range(len(recording.guidance)):
                    axis = cell(x, upper + HEAD + r * (CELL + GAP))
                    axis.imshow(recording.maps[r][i][c], cmap=colours, norm=norm, interpolation="nearest")
        text(end + CELL / 2, upper + HEAD - 0.04, "image", 9, FAINT, ha="center", va="bottom")
        for r, w in enumerate(recording.guidance):
            y = upper + HEAD + r * (CELL + GAP)
            text(LEFT - 0.1, y + CELL / 2, f"w = {w:g}", 11, ha="right", va="center")
            axis = cell(end, y)
            axis.imshow(recording.images[r], interpolation="antialiased")
            for side in axis.spines.values():  # white images need an edge
                side.set(visible=True, color="#cccccc", linewidth=0.8)

    _colour_bar(figure, width, height, ScalarMappable(norm, colours), top or 1.0)
    return pixels_of(figure)


def _bands(chosen: Sequence[int], columns: int) -> list[Sequence[int]]:
    """Distribute the layers evenly over rows of blocks; a block is ``columns`` cells wide."""
    many = -(-len(chosen) // max(1, CELLS_IN_A_ROW // columns))
    across = -(-len(chosen) // many)
    return [chosen[i : i + across] for i in range(0, len(chosen), across)]


def _colour_bar(figure: Any, width: float, height: float, mappable: Any, top: float) -> None:
    """Draw the colour scale, up to ``top``, at the bottom of a figure of ``width`` and ``height`` inches."""
    bar_width = min(5.0, width - LEFT - EDGE)
    bar_y = height - FOOT + 0.16
    bar = figure.add_axes((LEFT / width, 1 - (bar_y + 0.14) / height, bar_width / width, 0.14 / height))
    figure.colorbar(mappable, cax=bar, orientation="horizontal", format=lambda v, _: f"{v:.0%}" if v else "0")
    bar.set_xticks(_ticks(top))
    bar.tick_params(labelsize=9, colors=FAINT, length=3)
    bar.set_xlabel("what the guide adds, relative to the feature it is added to", fontsize=9, color=FAINT, labelpad=2)


def pixels_of(figure: Any) -> np.ndarray:
    """Render a matplotlib figure as uint8 ``[H, W, 3]``, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _ticks(top: float) -> list[float]:
    """Ticks of a square-root scale from 0 to ``top``: round numbers, about evenly spaced."""
    out = [0.0]
    for share in (0.04, 0.16, 0.36, 0.64):
        value = top * share
        digits = 10.0 ** np.floor(np.log10(value))
        rounded = float(np.round(value / digits) * digits)
        if rounded > out[-1]:
            out.append(rounded)
    return [*out, top]


def _fit(words: str, inches: float, points: float) -> str:
    """Shorten a line that is wider than ``inches``; a letter's width is about 0.62 of its size."""
    most = int(inches * 72 / (0.62 * points))
    return words if len(words) <= most else words[: most - 1].rstrip() + "…"
