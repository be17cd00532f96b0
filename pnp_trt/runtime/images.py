"""Pictures in and out: files with the parameters inside, grids, and names that never overwrite."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import InputError, PnpError

#: formats that pictures are written in → (suffix, Pillow's name, its options)
FORMATS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "png": (".png", "PNG", {}),
    "webp": (".webp", "WEBP", {"lossless": True}),
    "jpeg": (".jpg", "JPEG", {"quality": 95, "subsampling": 0}),
}
_IMAGE_DESCRIPTION = 0x010E  # the one text tag of EXIF that every viewer shows


def free_path(folder: Path, stem: str, suffix: str = ".png", *, beside: str | None = None) -> Path:
    """A path in ``folder`` that nothing has yet: STEM.png, STEM-2.png, …

    Args:
        beside: another suffix whose file must not exist either.
    """
    candidate, n = folder / f"{stem}{suffix}", 1
    while candidate.exists() or (beside is not None and candidate.with_suffix(beside).exists()):
        n += 1
        candidate = folder / f"{stem}-{n}{suffix}"
    return candidate


def slug(prompt: str, length: int = 40) -> str:
    """A file name's worth of a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:length].strip("-") or "picture"


def read_image(source: str | Path | np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """A picture to begin with, uint8 ``[H, W, 3]`` of ``size``, and what to call it.

    Transparent parts are laid on white; a picture of another size is resized (Lanczos), and a warning says so.

    Args:
        source: a file, or pixels uint8 ``[h, w, 3]``.
        size: height and width that the engine works at.

    Raises:
        InputError: if the file cannot be read, or the array is no picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise InputError(
                f"the picture to begin with is {source.dtype} of shape {list(source.shape)}; pass uint8 [H, W, 3]"
            )
        name, image = "array", Image.fromarray(source)
    else:
        name = str(source)
        try:
            with Image.open(source) as file:
                found = ImageOps.exif_transpose(file).convert("RGBA")
        except FileNotFoundError:
            raise InputError(f"--init {source} does not exist; name a picture") from None
        except UnidentifiedImageError:
            raise InputError(f"--init {source} is not a picture that can be read; give a PNG, JPEG or WebP") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise InputError(f"--init {source} cannot be read ({e}); give another picture") from e
        image = Image.alpha_composite(Image.new("RGBA", found.size, "white"), found).convert("RGB")
    height, width = size
    if image.size != (width, height):
        warnings.warn(
            f"the picture to begin with is {image.width} × {image.height} and was resized to the engine's "
            f"{width} × {height}",
            stacklevel=2,
        )
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.array(image), name


def save_picture(pixels: np.ndarray, parameters: dict[str, Any], path: Path, kind: str = "png") -> None:
    """Write uint8 ``[H, W, 3]`` with ``parameters`` inside, as JSON: see :func:`read_parameters`.

    Args:
        kind: ``png``, ``webp`` (lossless) or ``jpeg`` (quality 95).

    Raises:
        InputError: for another kind.
        PnpError: if the file cannot be written, or exists.
    """
    from PIL import Image, PngImagePlugin

    if kind not in FORMATS:
        raise InputError(f"the format is '{kind}'; known: {', '.join(FORMATS)}")
    _, name, options = FORMATS[kind]
    text = json.dumps(parameters)
    if kind == "png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("pnp-trt", text)
        options = {"pnginfo": info}
    else:
        exif = Image.Exif()
        exif[_IMAGE_DESCRIPTION] = text
        options = {**options, "exif": exif}
    with _new_file(path) as f:
        Image.fromarray(pixels).save(f, format=name, **options)


def read_parameters(path: Path) -> dict[str, Any]:
    """What made a picture that :func:`save_picture` wrote.

    Raises:
        InputError: if it cannot be read, or holds nothing of the kind.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            held = picture.info.get("pnp-trt") or picture.getexif().get(_IMAGE_DESCRIPTION)
        found: dict[str, Any] = json.loads(held or "")
    except (OSError, ValueError) as e:
        raise InputError(f"{path} holds no parameters of pnp-trt ({e}); name a picture that it drew") from e
    return found


def save_parameters(parameters: dict[str, Any], path: Path) -> None:
    """Write ``parameters`` as a JSON file; raises ``PnpError`` if it cannot be written, or exists."""
    with _new_file(path) as f:
        f.write((json.dumps(parameters, indent=2) + "\n").encode())


def save_png(pixels: np.ndarray, parameters: dict[str, Any], path: Path) -> None:
    """:func:`save_picture` as PNG."""
    save_picture(pixels, parameters, path)


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that did not exist, whole or not there at all."""
    advice = "choose another --out"
    try:
        f = path.open("xb")
    except OSError as e:
        raise PnpError(f"{path} cannot be written ({e.strerror or e}); {advice}") from e
    try:
        with f:
            yield f
    except BaseException as e:
        path.unlink(missing_ok=True)
        if isinstance(e, OSError | ValueError):  # a full disk; parameters that are too long for the format
            raise PnpError(f"{path} cannot be written ({getattr(e, 'strerror', None) or e}); {advice}") from e
        raise


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
