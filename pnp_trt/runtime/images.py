"""Saving pictures: PNG with the parameters inside, grids, and names that never overwrite."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PnpError


def free_path(folder: Path, stem: str, suffix: str = ".png") -> Path:
    """A path in ``folder`` that nothing has yet: STEM.png, STEM-2.png, …"""
    candidate, n = folder / f"{stem}{suffix}", 1
    while candidate.exists():
        n += 1
        candidate = folder / f"{stem}-{n}{suffix}"
    return candidate


def slug(prompt: str, length: int = 40) -> str:
    """A file name's worth of a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:length].strip("-") or "picture"


def save_png(pixels: np.ndarray, parameters: dict[str, Any], path: Path) -> None:
    """Write uint8 ``[H, W, 3]`` with ``parameters`` as JSON in a PNG text chunk named ``pnp-trt``.

    Raises:
        PnpError: if the file cannot be written, or exists.
    """
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_itxt("pnp-trt", json.dumps(parameters))
    try:
        with path.open("xb") as f:
            Image.fromarray(pixels).save(f, format="PNG", pnginfo=info)
    except OSError as e:
        raise PnpError(f"{path} cannot be written ({e.strerror or e}); choose another --out") from e


def grid(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: Sequence[str], title: str = "", cell: int = 128
) -> np.ndarray:
    """A labelled picture grid, uint8 ``[H, W, 3]``.

    Args:
        rows: (label, pictures) from top to bottom.
        columns: labels above the pictures.
        cell: side that each picture is shown at.
    """
    from PIL import Image, ImageDraw, ImageFont

    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    margin, gap = 8, 6
    left = margin + max((int(font.getlength(line)) for label, _ in rows for line in label.split("\n")), default=0) + 10
    top = margin + (26 if title else 0) + 20
    size = (left + len(columns) * (cell + gap) + margin, top + len(rows) * (cell + gap) + margin)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((margin, margin), title, "black", font=font)
    for c, label in enumerate(columns):
        while small.getlength(label) > cell and len(label) > 4:
            label = label[:-2].rstrip("…") + "…"
        draw.text((left + c * (cell + gap) + cell / 2, top - 5), label, "#444", font=small, anchor="ms")
    for r, (label, pictures) in enumerate(rows):
        y = top + r * (cell + gap)
        draw.multiline_text((left - 10, y + cell / 2), label, "black", font=font, anchor="rm", align="right")
        for c, pixels in enumerate(pictures):
            shown = Image.fromarray(pixels).resize((cell, cell), Image.Resampling.LANCZOS)
            page.paste(shown, (left + c * (cell + gap), y))
    return np.asarray(page)
