"""The picture grid inside a results document: PNGs as text, and back."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..artifacts import write_bytes


def encode_pictures(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with ``pixels`` (uint8 ``[N, H, W, 3]``) as rows with ``png``, base64 text, one a picture."""
    return [
        {**{k: v for k, v in row.items() if k != "pixels"}, "png": [_png(p) for p in row["pixels"]]} for row in rows
    ]


def _png(pixels: np.ndarray) -> str:
    return base64.b64encode(_bytes(pixels)).decode()


def _bytes(pixels: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def decode_row(row: Mapping[str, Any]) -> np.ndarray:
    """The pictures of a document's row, uint8 ``[N, H, W, 3]``."""
    from PIL import Image

    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in row["png"]])


def write_grid(pictures: Mapping[str, Any], path: Path) -> None:
    """The picture grid of a document as a PNG; an existing file is replaced only once the new one is whole."""
    from ..runtime.images import grid

    rows = [(row["label"], list(decode_row(row))) for row in pictures["rows"]]
    title = f"{pictures['caption']}, the same seed down each column"
    write_bytes(_bytes(grid(rows, pictures["columns"], title)), path)
