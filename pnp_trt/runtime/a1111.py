"""Generation parameters in the format of AUTOMATIC1111's web UI, which other programs and image hosts read.

The text consists of the prompt, the negative prompt after ``Negative prompt:``, and one line of ``key: value`` pairs.
It is stored in PNG's text chunk ``parameters``, and in JPEG and WebP in EXIF's UserComment, as ``UNICODE\\0`` and
big-endian UTF-16, as the web UI (piexif) writes it.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..io.image_files import FORMATS as READABLE
from ..sampling.schedules import a1111_names
from ..version import __version__

#: PNG's text chunk
CHUNK = "parameters"
#: EXIF directory, and the tag in it
EXIF_DIRECTORY, USER_COMMENT = 0x8769, 0x9286
#: key of a pair → key in this package's record
_PLAIN = {"Steps": "steps", "CFG scale": "guidance", "Seed": "seed"}
_NEGATIVE = "Negative prompt:"
#: minimum number of pairs in the last line; with fewer, it belongs to the prompt
_PAIRS = 3
_PAIR = re.compile(r'\s*(?P<key>\w[\w /-]+):\s*(?P<value>"(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')
_CODE = b"UNICODE\0"


def text_of(parameters: Mapping[str, Any]) -> str | None:
    """Convert a record of this package (``GeneratedImage.parameters``) to A1111's text; None if it has no prompt.

    ``Size`` is width x height, as in A1111, and ``Model`` the engine.  LoRA tags follow the prompt.
    """
    if not isinstance(parameters.get("prompt"), str):
        return None
    pairs = {ours: parameters[key] for ours, key in _PLAIN.items() if key in parameters}
    if "schedule" in parameters:
        try:
            sampler, kind = a1111_names(str(parameters["schedule"]))
        except InputError:  # from a package that is not installed
            sampler, kind = str(parameters["schedule"]), ""
        pairs |= {"Sampler": sampler} | ({"Schedule type": kind} if kind else {})
    if (size := re.fullmatch(r"(\d+)x(\d+)", str(parameters.get("size")))) is not None:
        pairs["Size"] = f"{size[2]}x{size[1]}"
    more = {"Model": "engine", "Denoising strength": "strength", "Guidance method": "method"}
    pairs |= {theirs: parameters[key] for theirs, key in more.items() if key in parameters}
    pairs["Version"] = f"pnp-trt {__version__}"
    lines = [" ".join(str(parameters[key]) for key in ("prompt", "loras") if key in parameters)]
    if parameters.get("negative"):
        lines.append(f"{_NEGATIVE} {parameters['negative']}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items()))
    # lone surrogates cannot be encoded
    return "\n".join(lines).encode("utf-8", "replace").decode()


def _quoted(value: Any) -> str:
    """The value of a pair, quoted as JSON if it contains separators."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search('[,:\n"]', text) else text


def parse_parameters(text: str) -> dict[str, str]:
    """Parse A1111's text: ``Prompt``, ``Negative prompt`` and the pairs of the last line, by key.

    ``Size`` is also split into ``Size-1``, the width, and ``Size-2``, the height.  A last line with fewer than three
    pairs belongs to the prompt.  No text is refused, because people write such texts by hand.
    """
    lines = [line.strip() for line in text.strip().split("\n")]
    pairs = {m["key"]: _unquoted(m["value"]) for m in _PAIR.finditer(lines[-1])}
    if len(pairs) < _PAIRS:
        pairs = {}
    else:
        lines.pop()
    negative = next((i for i, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    avoided = [line.removeprefix(_NEGATIVE).strip() for line in lines[negative : negative + 1]] + lines[negative + 1 :]
    fields = {"Prompt": "\n".join(lines[:negative]), "Negative prompt": "\n".join(avoided), **pairs}
    if (size := re.fullmatch(r"(\d+)x(\d+)", pairs.get("Size", ""))) is not None:
        fields |= {"Size-1": size[1], "Size-2": size[2]}
    return fields


def _unquoted(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value.strip()
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def user_comment(text: str) -> bytes:
    """Encode a text as EXIF's UserComment."""
    return _CODE + text.encode("utf-16-be")


def read_text(source: Path | bytes) -> str:
    """Read A1111's text from an image, a file or its bytes; empty if there is none.

    Raises:
        InputError: if it is not an image of a supported format.
    """
    from PIL import Image

    name = "the image" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=READABLE) as image:
            if isinstance(text := image.info.get(CHUNK), str):
                return text
            return _comment(image.getexif().get_ifd(EXIF_DIRECTORY).get(USER_COMMENT))
    except (OSError, ValueError, SyntaxError) as e:
        raise InputError(f"{name} cannot be read ({e}); give a PNG, JPEG or WebP image") from None


def _comment(value: Any) -> str:
    """Decode EXIF's UserComment; UTF-16 of either byte order, since writers differ."""
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        return ""
    code, data = value[:8], value[8:]
    if code != _CODE:
        return data.rstrip(b"\0").decode("utf-8", "replace") if code in (b"ASCII\0\0\0", b"\0" * 8) else ""
    candidates = [data.decode(order, "replace") for order in ("utf-16-be", "utf-16-le")]
    return max(candidates, key=lambda candidate: sum(c < "\u0250" for c in candidate)).lstrip("\ufeff")
