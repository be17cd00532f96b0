"""Read users' image files: an explicit list of formats, all converted to 8-bit RGB."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import InputError

#: Pillow's names.  Never add EPS: Pillow runs Ghostscript on such files.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
#: suffixes of the files that a folder is searched for
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
#: maximum pixels of an image: a compressed file of a few kilobytes can expand to gigabytes
MAX_PIXELS = 89_478_485
ADVICE = "give a PNG, JPEG, WebP, BMP, GIF or TIFF"
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF


class ImageError(InputError):
    """An image file cannot be used.

    Attributes:
        reason: the reason, a clause without the file's name.
    """

    def __init__(self, name: str, reason: str, advice: str = ADVICE) -> None:
        super().__init__(f"{name} {reason}; {advice}")
        self.reason = reason


def read_rgb(path: Path, name: str = "") -> np.ndarray:
    """Read an image file as uint8 ``[H, W, 3]``: upright, on a white background, and scaled to 8 bits.

    16-bit grey is divided by 257, and TIFFs of other depths are scaled by their white level.  Floating-point images
    must lie in [0, 1].  Of an animation, the first frame is read.

    Args:
        name: the file's name for messages; default: the path.

    Raises:
        ImageError: if it is missing, not an image of ``FORMATS``, damaged, truncated, larger than ``MAX_PIXELS``, or
            its values have no known white level.
    """
    name = name or str(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe without a writer would block forever
            raise ImageError(name, "is not a file")
        if not status.st_size:
            raise ImageError(name, "is empty")
        with path.open("rb") as f:
            return decode_rgb(f, name)
    except FileNotFoundError:
        raise ImageError(name, "does not exist", "name an image file") from None
    except (OSError, ValueError) as e:
        raise ImageError(name, f"cannot be read ({getattr(e, 'strerror', None) or e})", "name an image file") from None


def decode_rgb(
    file: BinaryIO, name: str, formats: tuple[str, ...] = FORMATS, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Read an open image file of at most ``max_pixels`` as :func:`read_rgb` does.

    Raises:
        ImageError: as in :func:`read_rgb`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file, formats=formats) as image:
            if image.width * image.height > max_pixels:
                size = f"{image.width} × {image.height}"
                raise ImageError(name, f"is {size}, more than {max_pixels:,} pixels", "give a smaller image")
            depth = _raw_mode(image)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), image, depth, name)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(name, "is not an image that can be read") from None
    except Exception as e:  # Pillow raises many types for damaged files: OSError, SyntaxError, struct.error, …
        raise ImageError(name, f"cannot be read ({str(e) or type(e).__name__})") from None


def _raw_mode(image: Any) -> str:
    """The file's pixel format, such as ``L;4`` or ``RGB;16B``, which Pillow discards when it loads the image."""
    arguments = image.tile[0].args if image.tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments or "")


def _to_rgb(upright: Any, source: Any, depth: str, name: str) -> np.ndarray:
    from PIL import Image

    key = upright.info.get("transparency")
    alpha = None
    if upright.mode in ("F", "I") or upright.mode.startswith("I;16"):
        values = np.asarray(upright)
        alpha = None if key is None else values != key
        upright = Image.fromarray(_eight_bits(values, source, name))
    elif isinstance(key, int | tuple) and upright.mode in ("1", "L", "RGB"):
        alpha = _unlike(np.asarray(upright.convert("RGB")), key, depth)
        upright.info.pop("transparency")
    elif key is not None or upright.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    pixels = np.array(upright.convert("RGB"))
    if alpha is not None:
        pixels[~alpha] = 255
    return pixels


def _eight_bits(values: np.ndarray, source: Any, name: str) -> np.ndarray:
    """Convert grey values of another type to uint8 ``[H, W]``."""
    tags = getattr(source, "tag_v2", {})
    if values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # also refuses NaN
            raise ImageError(
                name, f"has floating-point pixels from {low:g} to {high:g}", "scale them to 0 to 1, or save 8 bits"
            )
        share = values.astype(np.float64)
    elif source.mode == "I" and source.format != "PNG":  # Pillow before 12 opens 16-bit PNGs in mode I
        raise ImageError(
            name, "has 32-bit or signed integer pixels, whose white level is unknown", "save it with 8 or 16 bits"
        )
    else:
        bits = tags.get(_BITS, (16,))
        share = values / (2.0 ** int(bits[0] if isinstance(bits, tuple) else bits) - 1)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts only 8-bit images itself
        share = 1 - share
    return np.rint(share * 255).clip(0, 255).astype(np.uint8)


def _unlike(pixels: np.ndarray, key: int | tuple[int, ...], depth: str) -> np.ndarray:
    """Mask ``[H, W]`` of the pixels ``[H, W, 3]`` that differ from the transparent colour, given in the PNG's depth."""
    colour = np.array(key if isinstance(key, tuple) else (key,) * 3)
    scale = {"1": 255, "L;2": 85, "L;4": 17}.get(depth)
    if scale is not None:
        colour = colour * scale
    elif ";16" in depth:
        colour = colour >> 8
    return (pixels != colour).any(-1)
