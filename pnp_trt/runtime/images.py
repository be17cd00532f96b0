"""Images in and out: files with the parameters inside, grids, and names that never overwrite."""

from __future__ import annotations

import io
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, PnpError
from ..io.files import write_new
from ..io.image_files import FORMATS as READABLE
from ..io.image_files import read_rgb
from . import a1111

#: formats that images are written in → (suffix, Pillow's name, its options)
FORMATS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "png": (".png", "PNG", {}),
    "webp": (".webp", "WEBP", {"lossless": True}),
    "jpeg": (".jpg", "JPEG", {"quality": 95, "subsampling": 0}),
}
#: width of the labels beside a grid's rows, and height of a line, in pixels; letters of a label that are looked at
_LABEL, _LINE, _LETTERS = 360, 19, 1000
#: bytes of text that a JPEG file has room for, beside EXIF's own
_JPEG_ROOM = 65_000
_IMAGE_DESCRIPTION = 0x010E  # the one text tag of EXIF that every viewer shows


def save_new(
    pixels: np.ndarray,
    parameters: dict[str, Any],
    folder: Path,
    stem: str,
    kind: str = "png",
    *,
    beside: str | None = None,
) -> Path:
    """Write an image to the first name in ``folder`` that nothing has: STEM.png, STEM-2.png, …; returns the path.

    Several processes may do so at once: none overwrites a file of another, and none fails because of it.

    Args:
        pixels: uint8 ``[H, W, 3]``.
        kind: ``png``, ``webp`` (lossless) or ``jpeg`` (quality 95).
        beside: suffix of a JSON file with ``parameters`` that is written too, such as ``.json``.

    Raises:
        InputError: for another kind.
        PnpError: if a file cannot be written.
    """
    data, suffix = encode_image(pixels, parameters, kind, folder / stem), FORMATS[kind][0]
    number = 1
    while True:
        path = folder / f"{stem}{suffix if number == 1 else f'-{number}{suffix}'}"
        number += 1
        files = {path: data}
        if beside is not None:
            files[path.with_suffix(beside)] = f"{json.dumps(parameters, indent=2)}\n".encode()
        if write_all_new(files):
            return path


def write_all_new(files: Mapping[Path, bytes]) -> bool:
    """Write files that do not exist yet; False, and nothing is written, if any of them exists."""
    written: list[Path] = []
    try:
        if any(os.path.lexists(path) for path in files):
            return False
        for path, data in files.items():
            write_new(data, path)
            written.append(path)
    except BaseException as e:
        for path in written:
            path.unlink(missing_ok=True)
        if isinstance(e, FileExistsError):  # made by another process since
            return False
        raise
    return True


def slug(prompt: str) -> str:
    """A file name's worth of a prompt, at most 40 characters."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "image"


def read_image(source: str | Path | np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """The starting image of image-to-image, uint8 ``[H, W, 3]`` of ``size``, and its name.

    Files are read as by :func:`~pnp_trt.io.image_files.read_rgb`.  An image of another size is resized (Lanczos),
    with a warning.

    Args:
        source: a file, or pixels uint8 ``[h, w, 3]``.
        size: height and width that the engine works at.

    Raises:
        InputError: if the file cannot be read, or the array is not such an image.
    """
    from PIL import Image

    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise InputError(
                f"the starting image is {source.dtype} of shape {list(source.shape)}; pass uint8 [H, W, 3]"
            )
        name, pixels = "array", source
    elif isinstance(source, str | Path):
        name, pixels = str(source), read_rgb(Path(source), f"--init {source}")
    else:
        raise InputError(f"the starting image is a {type(source).__name__}; pass a path or uint8 [H, W, 3]")
    height, width = size
    if pixels.shape[:2] == size:
        return pixels.copy(), name
    warnings.warn(
        f"the starting image is {pixels.shape[1]} × {pixels.shape[0]} and was resized to the engine's "
        f"{width} × {height}",
        stacklevel=2,
    )
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
    return np.array(image), name


def save_image(pixels: np.ndarray, parameters: dict[str, Any], path: Path, kind: str = "png") -> None:
    """Write uint8 ``[H, W, 3]`` with ``parameters`` inside, as JSON: see :func:`read_parameters`.

    Args:
        kind: ``png``, ``webp`` (lossless) or ``jpeg`` (quality 95).

    Raises:
        InputError: for another kind, or if the file exists.
        PnpError: if it cannot be written.
    """
    try:
        write_new(encode_image(pixels, parameters, kind, path), path)
    except FileExistsError as e:
        raise InputError(f"{path} exists and is not overwritten; name another file") from e


def encode_image(pixels: np.ndarray, parameters: dict[str, Any], kind: str, name: Path) -> bytes:
    """The bytes of an image file with ``parameters`` inside, as JSON and in AUTOMATIC1111's words (``a1111``).

    A JPEG file holds 64 KiB of both; where they are longer it has the JSON alone.

    Raises:
        InputError: for an unknown kind, or parameters whose text is not Unicode (a pair of surrogates).
        PnpError: if the parameters are too long for the format; ``name`` states of which image.
    """
    from PIL import Image, PngImagePlugin

    if kind not in FORMATS:
        raise InputError(f"the format is '{kind}'; known: {', '.join(FORMATS)}")
    _, format_name, options = FORMATS[kind]
    text, words = _json_text(parameters, name), a1111.text_of(parameters)
    image = Image.fromarray(pixels)

    def saved(**more: Any) -> bytes:
        stream = io.BytesIO()
        image.save(stream, format=format_name, **options, **more)
        return stream.getvalue()

    if kind == "png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("pnp-trt", text)
        if words is not None:
            info.add_text(a1111.CHUNK, words)
        return saved(pnginfo=info)
    exif = Image.Exif()
    exif[_IMAGE_DESCRIPTION] = text
    try:
        comment = b"" if words is None else a1111.user_comment(words)
        if comment and (kind != "jpeg" or len(text) + len(comment) < _JPEG_ROOM):
            exif[a1111.EXIF_DIRECTORY] = {a1111.USER_COMMENT: comment}
        return saved(exif=exif)
    except ValueError as e:  # JPEG holds 64 KiB of parameters
        raise PnpError(f"{name} cannot be written ({e}); choose another --format") from e


def _json_text(parameters: dict[str, Any], name: Path) -> str:
    """ASCII JSON.  It cannot tell two surrogates in a row from the character that they stand for in UTF-16."""
    if pair := re.search("[\ud800-\udbff][\udc00-\udfff]", json.dumps(parameters, ensure_ascii=False)):
        high, low = map(ord, pair.group())
        raise InputError(
            f"{name} cannot be written: its parameters have the surrogates U+{high:04X} U+{low:04X}; "
            f"give the character U+{0x10000 + ((high - 0xD800) << 10) + low - 0xDC00:X} itself"
        )
    return json.dumps(parameters)


def read_parameters(path: Path) -> dict[str, Any]:
    """What made an image that :func:`save_image` wrote.

    Raises:
        InputError: if it cannot be read, or holds nothing of the kind.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=READABLE) as image:
            held = image.info.get("pnp-trt") or image.getexif().get(_IMAGE_DESCRIPTION)
        found: dict[str, Any] = json.loads(held or "")
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path} holds no parameters of pnp-trt ({e}); name an image that it wrote") from e
    return found


def grid(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: Sequence[str], title: str = "", cell: int = 128
) -> np.ndarray:
    """A labelled image grid, uint8 ``[H, W, 3]``.

    Args:
        rows: (label, images) from top to bottom.
        columns: labels above the images.
        cell: side that each image is shown at.
    """
    from PIL import Image, ImageDraw, ImageFont

    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    margin, gap = 8, 6
    most = max(1, (cell - 4) // _LINE)
    labels = [_wrapped(label, font.getlength, most) for label, _ in rows]
    left = margin + max((int(font.getlength(line)) for label in labels for line in label.split("\n")), default=0) + 10
    top = margin + (26 if title else 0) + 20
    size = (left + len(columns) * (cell + gap) + margin, top + len(rows) * (cell + gap) + margin)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((margin, margin), title, "black", font=font)
    for c, label in enumerate(columns):
        label = _ellipsis(label, cell, small.getlength)
        draw.text((left + c * (cell + gap) + cell / 2, top - 5), label, "#444", font=small, anchor="ms")
    for r, (label, (_, images)) in enumerate(zip(labels, rows, strict=True)):
        y = top + r * (cell + gap)
        draw.multiline_text((left - 10, y + cell / 2), label, "black", font=font, anchor="rm", align="right")
        for c, pixels in enumerate(images):
            shown = Image.fromarray(pixels).resize((cell, cell), Image.Resampling.LANCZOS)
            page.paste(shown, (left + c * (cell + gap), y))
    return np.asarray(page)


def _wrapped(label: str, length: Callable[[str], float], most: int) -> str:
    """A label in at most ``most`` lines of ``_LABEL`` pixels; an ellipsis stands for what is left out."""
    lines: list[str] = []
    for given in label[:_LETTERS].split("\n"):
        line = ""
        for word in given.split(" "):
            if line and length(f"{line} {word}") > _LABEL:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}" if line else word
        lines.append(line)
    cut = len(lines) > most or len(label) > _LETTERS
    lines = lines[:most]
    if cut:
        lines[-1] += " …"
    return "\n".join(_ellipsis(line, _LABEL, length) for line in lines)


def _ellipsis(text: str, width: float, length: Callable[[str], float]) -> str:
    """The longest beginning of ``text`` that fits into ``width``, with an ellipsis if it is not the whole."""
    text = text[:_LETTERS]
    while length(text) > width and len(text) > 4:
        text = text[:-2].rstrip("…") + "…"
    return text
