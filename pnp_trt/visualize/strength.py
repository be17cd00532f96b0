"""A chart of the injected strength by layer, step and scale."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from .figures import plain_text
from .maps import DPI, FAINT, INK, pixels_of
from .record import Recording, white_noise_share

HEATS_IN_A_ROW = 4


def groups(recording: Recording) -> list[tuple[str, list[int]]]:
    """Group the emitting layers, as (label, indices): skips of one resolution, then mid."""
    members: dict[str, list[int]] = {}
    for i in recording.emitting:
        layer = recording.layers[i]
        size = f"{layer.height}×{layer.width}"
        members.setdefault(f"mid, {size}" if layer.name == "mid" else f"skips, {size}", []).append(i)
    return [(f"{k} (mean of {len(v)})" if len(v) > 1 else k, v) for k, v in members.items()]


@plain_text()
def draw_strength(recording: Recording, title: str) -> np.ndarray:
    """Draw the strength and the high-frequency share over steps, and all layers as heat maps; uint8 ``[H, W, 3]``."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = groups(recording)
    scales = recording.guidance
    heat_rows = -(-len(scales) // HEATS_IN_A_ROW)
    heat_columns = min(len(scales), HEATS_IN_A_ROW)
    heat_height = 0.7 + 0.17 * max(len(recording.layers), 6)
    heights = (5.0, heat_rows * heat_height + 0.3)
    width = max(2.9 * max(len(panels), 2), 2.3 * heat_columns + 0.8, 8.0)
    figure = Figure(figsize=(width, sum(heights) + 0.6), dpi=DPI, facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=13, weight="bold", color=INK, x=0.01, ha="left")
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    upper, lower = parts

    shades = [colormaps["viridis"](0.88 * i / max(len(scales) - 1, 1)) for i in range(len(scales))]
    relative = recording.relative
    lines, shares = upper.subplots(2, len(panels), sharey="row", squeeze=False)
    for axis, (name, members) in zip(lines, panels, strict=True):
        for r, shade in enumerate(shades):
            axis.plot(recording.timesteps, 100 * relative[r, members].mean(0), color=shade, marker=".", markersize=4)
        _style(axis, name, recording)
    lines[0].set_ylim(0, None if relative.any() else 1)
    lines[0].set_ylabel("strength, % of the feature", fontsize=9, color=INK)
    keys = [Line2D([], [], color=shade, marker=".") for shade in shades]
    labels = [f"w = {w:g}" for w in scales]
    upper.legend(keys, labels, loc="outside right upper", fontsize=9, frameon=False)

    for axis, (name, members) in zip(shares, panels, strict=True):
        layer = recording.layers[members[0]]
        noise = 100 * white_noise_share(layer.height, layer.width)
        axis.axhline(noise, color=FAINT, linewidth=0.9, linestyle="--")
        axis.annotate(
            "white noise", (0.98, noise), xycoords=("axes fraction", "data"), xytext=(0, -3),
            textcoords="offset points", ha="right", va="top", fontsize=8, color=FAINT,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # at w = 1 there is no energy: the mean of NaNs
            high = 100 * np.nanmean(recording.high[:, members], axis=1)
        for r, shade in enumerate(shades):
            axis.plot(recording.timesteps, high[r], color=shade, marker=".", markersize=4)
        axis.set_ylim(0, 100)
        _style(axis, name, recording)
    shares[0].set_ylabel("energy above half Nyquist, %", fontsize=9, color=INK)

    _heat_maps(lower, (heat_rows, heat_columns), recording)
    return pixels_of(figure)


def _heat_maps(part: Any, shape: tuple[int, int], recording: Recording) -> None:
    """Draw every layer's strength over the steps, one map per scale, in a subfigure of ``shape`` (rows, columns)."""
    relative = recording.relative
    heats = part.subplots(*shape, squeeze=False, sharey=True).ravel()
    names = [layer.name for layer in recording.layers]
    top = float(100 * relative.max()) or 1.0
    image: Any = None
    for place, axis in enumerate(heats):
        if place >= len(recording.guidance):
            axis.set_visible(False)
            continue
        image = axis.imshow(
            100 * relative[place], cmap="inferno", vmin=0, vmax=top, aspect="auto", interpolation="nearest"
        )
        axis.set_title(f"w = {recording.guidance[place]:g}", loc="left", fontsize=10, color=INK)
        ticks = sorted({round(float(i)) for i in np.linspace(0, len(recording.timesteps) - 1, 4)})
        axis.set_xticks(ticks, [str(recording.timesteps[i]) for i in ticks])
        axis.set_yticks(range(len(names)), names)
        axis.tick_params(labelsize=8, colors=INK, length=2)
        axis.set_xlabel("timestep", fontsize=9, color=INK)
    bar = part.colorbar(image, ax=list(heats), pad=0.01, fraction=0.05)
    bar.set_label("strength, %", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8, colors=INK)


def _style(axis: Any, title: str, recording: Recording) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.set_xlabel("timestep, early steps left", fontsize=9, color=INK)
    if len(recording.timesteps) > 1:
        axis.set_xlim(max(recording.timesteps) + 15, min(recording.timesteps) - 15)
    axis.tick_params(labelsize=8, colors=INK, length=2)
    axis.grid(axis="y", color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
