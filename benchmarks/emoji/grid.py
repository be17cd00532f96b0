"""Labelled grids of images as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .data import caption, split
from .sampler import Ask


def draw_grid(
    rows: Sequence[Ask], strips: Sequence[tuple[str, np.ndarray]], path: Path, zoom: int = 2, left: int = 70
) -> None:
    """Write a labelled PNG: one strip per row, one prompt per column; ``left`` is the width of the strips' names."""
    from PIL import Image, ImageDraw, ImageFont

    side, top = 64 * zoom, 44
    page = Image.new("RGB", (left + side * len(rows), top + side * len(strips)), "white")
    draw = ImageDraw.Draw(page)
    font, small = ImageFont.load_default(18), ImageFont.load_default(13)
    held_out = {c for part, names in split().items() if part != "train" for c in names}
    for x, a in enumerate(rows):
        lines = (caption(a.concept), f"{a.style}{', held out' if a.concept in held_out else ''}")
        for y, line in enumerate(lines):
            at = (left + x * side + side // 2, 12 + 18 * y)
            draw.text(at, line, fill="black" if y == 0 else "#666666", font=small, anchor="mm")
    for y, (name, pixels) in enumerate(strips):
        draw.text((left // 2, top + y * side + side // 2), name, fill="black", font=font, anchor="mm")
        for x, image in enumerate(pixels):
            big = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            page.paste(big, (left + x * side, top + y * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    page.save(beside, "PNG", optimize=True)
    beside.replace(path)
