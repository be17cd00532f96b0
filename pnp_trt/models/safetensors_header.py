"""The header of a safetensors file: names, types and shapes of its tensors.  Reading it does not need PyTorch.

For a file that is not safetensors, the message states what it is: an LFS pointer, a web page, a pickle, a truncated
download.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError

#: longest header that the safetensors library reads, in bytes
LONGEST_HEADER = 100_000_000
_PICKLED = "pickled weights are not read, because loading them can run code; convert it to safetensors"
#: first bytes of other formats, with the reason and advice for the message
_MAGIC = (
    (b"version https://git-lfs", "is a Git LFS pointer and not the weights; run `git lfs pull`, or download the file"),
    (b"PK\x03\x04", f"is a zip archive such as torch.save writes; {_PICKLED}"),
    (b"\x80\x02", f"is a pickle; {_PICKLED}"),
    (b"\x80\x03", f"is a pickle; {_PICKLED}"),
    (b"\x80\x04", f"is a pickle; {_PICKLED}"),
    (b"\x80\x05", f"is a pickle; {_PICKLED}"),
    (b"GGUF", "is a GGUF file; quantised GGUF weights are not read; use the safetensors release"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file; convert it to safetensors"),
    (b"\x1f\x8b", "is a gzip archive; unpack it"),
)
_PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        shapes: shape of every tensor, by key.
        dtypes: safetensors' name of every tensor's type, such as ``F16``, by key.
        metadata: the file's metadata strings, such as ModelSpec's ``modelspec.prediction_type``.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file and check it against the file's length.

    Raises:
        InputError: if the file does not exist, is of another kind, has a malformed header, or is truncated.
    """
    try:
        with path.open("rb") as f:
            size = path.stat().st_size
            start = f.read(512)
            length = int.from_bytes(start[:8], "little")
            # a header of 640 bytes begins like a pickle (0x0280), so check magic numbers only if no header follows
            if not (2 <= length <= size - 8 and start[8:9] == b"{"):
                _refuse_other_formats(path, start, size)
            if not 2 <= length <= LONGEST_HEADER:
                pickled = f"; {_PICKLED}" if path.suffix.lower() in _PICKLE_SUFFIXES else ""
                raise InputError(f"{path} is not a safetensors file: its header would be {length} bytes long{pickled}")
            if length > size - 8:
                raise InputError(
                    f"{path} was cut short: it has {size} bytes, but its header alone {8 + length}; download it again"
                )
            f.seek(8)
            text = f.read(length)
    except OSError as e:
        raise InputError(f"{path} cannot be read ({e.strerror or e})") from None
    header, end = _parsed(path, text)
    _check_length(path, 8 + length + end, size)
    return header


def _refuse_other_formats(path: Path, start: bytes, size: int) -> None:
    if size == 0:
        raise InputError(f"{path} is empty; download it again")
    for magic, reason in _MAGIC:
        if start.startswith(magic):
            raise InputError(f"{path} {reason}")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        raise InputError(
            f"{path} is a web page and not the weights; the download may need a login; download the file itself"
        )
    if size < 10:
        raise InputError(f"{path} is not a safetensors file: it has {size} bytes; download it again")


def _parsed(path: Path, text: bytes) -> tuple[Header, int]:
    """Parse the header; return it and the number of bytes of data that it describes."""
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as e:
        reason = "it is nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise InputError(f"{path} is not a safetensors file: its header is not JSON ({reason[:120]})") from None
    if not isinstance(entries, dict):
        raise InputError(f"{path} is not a safetensors file: its header is a {type(entries).__name__}, not an object")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise InputError(f"{path}: the safetensors metadata is a {type(metadata).__name__}, not an object")
    end = max((_end(path, key, entry) for key, entry in entries.items()), default=0)
    shapes = {k: tuple(e["shape"]) for k, e in entries.items()}
    dtypes = {k: e["dtype"] for k, e in entries.items()}
    return Header(shapes, dtypes, {str(k): str(v) for k, v in metadata.items()}), end


def _end(path: Path, key: str, entry: Any) -> int:
    """The offset at which a tensor's data ends.

    Raises:
        InputError: if the entry is malformed.
    """
    shown = key if len(key) <= 80 else f"{key[:80]}…"
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise InputError(f"{path} is not a safetensors file: the header's entry of {shown!r} has no dtype")
    for name in ("shape", "data_offsets"):
        values = entry.get(name)
        if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
            raise InputError(f"{path} is not a safetensors file: the {name} of {shown!r} is not a list of integers")
    if len(entry["data_offsets"]) != 2:
        raise InputError(f"{path} is not a safetensors file: {shown!r} does not have two data_offsets")
    return int(entry["data_offsets"][1])


def _check_length(path: Path, described: int, size: int) -> None:
    if described > size:
        raise InputError(
            f"{path} was cut short: it has {size} bytes, but its header describes {described}; download it again"
        )
    if described < size:
        raise InputError(
            f"{path} is damaged: it has {size} bytes, but its header describes {described}; download it again"
        )
