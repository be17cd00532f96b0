"""The image grid and the plot of the tables, drawn from the record and the cached images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pnp_trt.visualize.figures import plain_text

from .cells import HEADLINE_W, METHODS, SCALES, STEPS
from .grid import draw_grid
from .sampler import Ask

COLUMNS = 10
#: trained concepts that are easy to recognise at 64 pixels, in either base style
PREFERRED = (
    "red-apple", "grinning-face", "red-heart", "panda", "pizza", "house", "tulip", "cat-face", "sun", "automobile",
    "fish", "rocket", "birthday-cake", "key", "soccer-ball", "mushroom", "rainbow", "banana", "crown", "snowman",
)  # fmt: skip
#: (label, methods in order of preference, steps)
STRIPS = (
    ("CFG, 50 steps", ("cfg",), 50),
    ("tiny, 50", ("tiny",), 50),
    ("tiny, 16", ("tiny-stage2", "tiny"), 16),
    ("tiny, 8", ("tiny-stage2", "tiny"), 8),
    ("tiny, 4", ("tiny-stage2", "tiny"), 4),
    ("full, 50", ("full",), 50),
    ("no guidance, 50", ("none",), 50),
)  # fmt: skip
COLOURS = {"cfg": "#333333", "tiny": "#1f77b4", "tiny-stage2": "#d62728", "full": "#2ca02c"}


def chosen_strips(document: dict[str, Any]) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """The grid's strips with their cells, and the labels of those whose cells were left out."""
    cells_by_case = {(c["method"], c["steps"]): c for c in document["cells"]
            if (c["w"], c["captions"], c["seed"]) == (HEADLINE_W, "train", 0)}  # fmt: skip
    candidates = [(label, next((cells_by_case[m, steps] for m in methods if (m, steps) in cells_by_case), None))
             for label, methods, steps in STRIPS]  # fmt: skip
    return [(label, cell) for label, cell in candidates if cell is not None], [
        x for x, cell in candidates if cell is None
    ]


def grid(document: dict[str, Any], cache: Path, path: Path) -> None:
    """Write the grid."""
    rows = [Ask(*_ask(line)) for line in document["captions"].get("train", [])]
    order = [i for name in PREFERRED for i, a in enumerate(rows) if a.concept == name]
    order = list(dict.fromkeys([*order, *range(len(rows))]))[:COLUMNS]
    strips = []
    for label, cell in chosen_strips(document)[0]:
        with np.load(cache / "tables" / f"{cell['cache']}.npz") as z:
            strips.append((label + (" *" if cell["method"] == "tiny-stage2" else ""), z["pixels"][order]))
    if strips:
        draw_grid([rows[i] for i in order], strips, path, left=150)


def _ask(line: str) -> tuple[str, str, int]:
    concept, style, seed = line.split(" ")
    return concept, style, int(seed)


@plain_text()
def plot(document: dict[str, Any], path: Path) -> None:
    """KID with intervals against steps, a panel for each w, a line for each method."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    measured = {g["w"] for g in document["groups"] if g["table"] == "A" and g["captions"] == "train"}
    # scales that were left out are listed in the document and get no empty panel
    scales = [w for w in SCALES if w in measured] or [HEADLINE_W]
    figure = Figure(figsize=(2.2 + 2.9 * len(scales), 3.4), layout="constrained")
    panels = figure.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    for panel, w in zip(panels, scales, strict=True):
        for i, (method, colour) in enumerate(COLOURS.items()):
            rows = sorted(
                (g for g in document["groups"]
                 if (g["table"], g["method"], g["w"], g["captions"]) == ("A", method, w, "train")),
                key=lambda g: g["steps"],
            )  # fmt: skip
            if not rows:
                continue
            kid = [g["kid"] for g in rows]
            y = np.array([k["value"] for k in kid])
            bars = np.array([[k["value"] - k["low"] for k in kid], [k["high"] - k["value"] for k in kid]])
            bars = np.maximum(bars, 0.0)  # a bootstrap's interval may not contain the estimate
            # side by side, so that intervals do not hide each other
            x = np.array([g["steps"] for g in rows]) * 1.05 ** (i - 1.5)
            panel.errorbar(x, y, bars, color=colour, label=METHODS[method], marker="o", markersize=4, capsize=2, lw=1.2)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xticks(sorted(STEPS), [str(s) for s in sorted(STEPS)])
        panel.set_title(f"w = {w:g}", fontsize=10, fontweight="bold" if w == HEADLINE_W else "normal")
        panel.set_xlabel("steps")
        panel.grid(axis="y", linewidth=0.5, alpha=0.5)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[0].set_ylabel("EfficientNet-KID (lower is better)")
    handles = {name: h for p in panels for h, name in zip(*p.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside upper center",
            ncols=2 if len(scales) < 3 else len(handles),
            frameon=False,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    figure.savefig(beside, format="png", dpi=110)
    beside.replace(path)
