"""Reading and writing images: files with embedded parameters, new file names, and grids."""

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

#: output format → (suffix, Pillow's name, options)
FORMATS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "png": (".png", "PNG", {}),
    "webp": (".webp", "WEBP", {"lossless": True}),
    "jpeg": (".jpg", "JPEG", {"quality": 95, "subsampling": 0}),
}
#: width of a grid's row labels and height of a line, in pixels, and maximum characters of a label
_LABEL, _LINE, _LETTERS = 360, 19, 1000
#: maximum bytes of text in a JPEG file, besides EXIF's own
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
    """Write an image to the first free name in ``folder``, STEM.png, STEM-2.png, …, and return its path.

    Several processes can do so concurrently without overwriting each other's files.

    Args:
        pixels: uint8 ``[H, W, 3]``.
        kind: ``png``, ``webp`` (lossless) or ``jpeg`` (quality 95).
        beside: suffix of an additional JSON file with ``parameters``, such as ``.json``.

    Raises:
        InputError: if the kind is unknown.
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
    """Write files that do not exist yet; if any of them exists, write none and return False."""
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
        if isinstance(e, FileExistsError):  # created by another process in the meantime
            return False
        raise
    return True


def slug(prompt: str) -> str:
    """Shorten a prompt to a file name of at most 40 characters."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "image"


def read_image(source: str | Path | np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """Read the starting image of image-to-image; return it as uint8 ``[H, W, 3]`` of ``size``, and its name.

    Files are read by :func:`~pnp_trt.io.image_files.read_rgb`.  An image of another size is resized (Lanczos), with a
    warning.

    Args:
        source: a file, or pixels uint8 ``[h, w, 3]``.
        size: height and width of the engine's images.

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
    """Write uint8 ``[H, W, 3]`` with embedded ``parameters``, which :func:`read_parameters` reads.

    Args:
        kind: ``png``, ``webp`` (lossless) or ``jpeg`` (quality 95).

    Raises:
        InputError: if the kind is unknown, or the file exists.
        PnpError: if the file cannot be written.
    """
    try:
        write_new(encode_image(pixels, parameters, kind, path), path)
    except FileExistsError as e:
        raise InputError(f"{path} exists and is not overwritten; name another file") from e


def encode_image(pixels: np.ndarray, parameters: dict[str, Any], kind: str, name: Path) -> bytes:
    """Encode an image file with embedded ``parameters``, as JSON and in AUTOMATIC1111's format (``a1111``).

    A JPEG file has room for 64 KiB of both; if they are longer, only the JSON is embedded.

    Raises:
        InputError: if the kind is unknown, or the parameters contain a pair of surrogates.
        PnpError: if the parameters are too long for the format; ``name`` is the image's name in the message.
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
    except ValueError as e:  # JPEG has room for 64 KiB of parameters
        raise PnpError(f"{name} cannot be written ({e}); choose another --format") from e


def _json_text(parameters: dict[str, Any], name: Path) -> str:
    """Parameters as ASCII JSON, in which a pair of surrogates would be read back as one character."""
    if pair := re.search("[\ud800-\udbff][\udc00-\udfff]", json.dumps(parameters, ensure_ascii=False)):
        high, low = map(ord, pair.group())
        raise InputError(
            f"{name} cannot be written: its parameters have the surrogates U+{high:04X} U+{low:04X}; "
            f"give the character U+{0x10000 + ((high - 0xD800) << 10) + low - 0xDC00:X} itself"
        )
    return json.dumps(parameters)


def read_parameters(path: Path) -> dict[str, Any]:
    """Read the parameters of an image that :func:`save_image` wrote.

    Raises:
        InputError: if the image cannot be read, or has no such parameters.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=READABLE) as image:
            text = image.info.get("pnp-trt") or image.getexif().get(_IMAGE_DESCRIPTION)
        parameters: dict[str, Any] = json.loads(text or "")
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path} has no parameters of pnp-trt ({e}); pass an image that it wrote") from e
    return parameters


def grid(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: Sequence[str], title: str = "", cell: int = 128
) -> np.ndarray:
    """Draw a labelled image grid, uint8 ``[H, W, 3]``.

    Args:
        rows: (label, images) from top to bottom.
        columns: labels above the images.
        cell: side of each image in the grid, in pixels.
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
    """Wrap a label to at most ``most`` lines of ``_LABEL`` pixels, with an ellipsis if it is cut."""
    lines: list[str] = []
    for text_line in label[:_LETTERS].split("\n"):
        line = ""
        for word in text_line.split(" "):
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
    """Shorten ``text`` to ``width``, with an ellipsis if it is cut."""
    text = text[:_LETTERS]
    while length(text) > width and len(text) > 4:
        text = text[:-2].rstrip("…") + "…"
    return text
