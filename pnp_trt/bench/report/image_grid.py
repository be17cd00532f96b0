"""The image grid of a results document as one PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...bundle.store import write_bytes
from ..results import decode_images

#: text that identifies the PNG file of a grid
GRID_MARK = b"pnp-trt bench grid"


def headline(images: Mapping[str, Any]) -> dict[str, Any]:
    """Return only the document's images at the largest number of steps and the first w, and those without guidance."""
    first = images["rows"][0]
    rows = [r for r in images["rows"] if r["steps"] == first["steps"] and r["guidance"] in (None, first["guidance"])]
    style = images["caption"].rpartition(", ")[0]
    steps = f"{first['steps']} steps"
    return {**images, "rows": rows, "caption": f"{style}, {steps}" if style else steps}


def write_grid(images: Mapping[str, Any], path: Path) -> None:
    """Write the rows of a document's images as a PNG, atomically."""
    from PIL import Image, PngImagePlugin

    from ...runtime.images import grid

    rows = [(label, list(pixels)) for label, pixels in decode_images(images)]
    pixels = grid(rows, images["columns"], f"{images['caption']}, the same seed down each column")
    info, stream = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("Software", GRID_MARK.decode())
    Image.fromarray(pixels).save(stream, "PNG", pnginfo=info)
    write_bytes(stream.getvalue(), path)
