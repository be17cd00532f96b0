"""Checks that `--force` removes only files that this program certainly wrote; anything else is refused by name."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ..errors import InputError
from .files import is_temporary

#: every name that a bundle can hold
_BUNDLE_FILE = re.compile(
    r"(manifest|weights|tokenizer(_2)?)\.json|golden\.npz"
    r"|(unet|text_encoder(_2)?|vae_decoder|vae_encoder|condition|sharpener)\.(onnx(\.data)?|engine|json|safetensors)"
)
#: keys of this program's manifests that no other program's manifest.json has
_OWN_KEYS = ("built_from", "networks", "rebuild", "parity", "seal")
_SHOWN = 3
_MOST_BYTES = 16 << 20


def check_removable_bundle(folder: Path) -> None:
    """Refuse a folder unless it is empty or certainly a bundle: complete, unfinished or damaged.

    A folder is a bundle if all its files are listed in its manifest or have names that occur in bundles, and if it has
    a manifest or a ``weights.json`` of this program.

    Raises:
        InputError: naming files in the folder.
    """
    names = _names(folder)
    listed, own = _manifest(folder / "manifest.json")
    own = own or _is_weight_map(folder / "weights.json")
    foreign = sorted(
        name for name in names if not (_BUNDLE_FILE.fullmatch(name) or name in listed or is_temporary(Path(name).name))
    )
    if not names or (own and not foreign):
        return
    unexpected = foreign if own else sorted(names)
    why = "does not belong to a bundle" if own else "is not a bundle of pnp-trt"
    listing = shown(unexpected)
    if own:
        raise InputError(f"{folder} holds {listing}, which {why}; move it away, or choose another --out")
    raise InputError(f"{folder} holds {listing} and {why}; remove it yourself, or choose another --out")


def shown(names: list[str]) -> str:
    """Return the first few names and the number of the others; control characters are escaped."""
    first = ", ".join(ascii(name)[1:-1] if not name.isprintable() else name for name in names[:_SHOWN])
    more = len(names) - _SHOWN
    return first if more <= 0 else f"{first} and {more} more"


def check_removable_file(path: Path, schema: str, option: str, what: str) -> None:
    """Refuse to replace a file unless it is empty or a JSON file of this program whose schema begins with ``schema``.

    Args:
        what: the expected kind of file, such as ``a results file``.

    Raises:
        InputError: if it is anything else.
    """
    if not path.is_file():  # it does not exist, or is a device
        return
    try:
        with path.open("rb") as f:
            head = f.read(4096).decode(errors="replace")
    except OSError as e:
        raise InputError(f"{option} {path} cannot be read ({e.strerror}); name another file") from e
    if head.strip() and not re.match(rf'\s*\{{\s*"schema":\s*"{re.escape(schema)}', head):
        raise InputError(f"{option} {path} exists and is not {what} of pnp-trt; name another file")


def check_removable_output(path: Path, mark: bytes, option: str, what: str) -> None:
    """Refuse to replace a file, as :func:`check_removable_file` does, unless it is empty or contains ``mark``."""
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        data = path.read_bytes()
    except OSError as e:
        raise InputError(f"{option} {path} cannot be read ({e.strerror}); name another file") from e
    if mark not in data:
        raise InputError(f"{option} {path} exists and is not {what} of pnp-trt; name another file")


def _names(folder: Path) -> set[str]:
    """Relative paths of all files, links and empty folders, without following links."""
    out: set[str] = set()
    for place, folders, files in os.walk(folder):
        inner = Path(place)
        links = [name for name in folders if (inner / name).is_symlink()]
        out |= {(inner / name).relative_to(folder).as_posix() for name in [*files, *links]}
        if inner != folder and not files and not folders:
            out.add(f"{inner.relative_to(folder).as_posix()}/")
    return out


def _manifest(path: Path) -> tuple[set[str], bool]:
    """The files that a manifest lists, and whether this program wrote it, even if it is damaged."""
    text = _text(path)
    try:
        manifest: Any = json.loads(text)
    except (ValueError, RecursionError):
        manifest = None
    if isinstance(manifest, dict):
        own = isinstance(manifest.get("schema"), int) and sum(key in manifest for key in _OWN_KEYS) >= 2
        files = manifest.get("files")
        return (set(files) if own and isinstance(files, dict) else set()), own
    return set(), bool(re.match(r'\{\s*"schema": ', text)) and any(f'"{key}":' in text for key in _OWN_KEYS)


def _is_weight_map(path: Path) -> bool:
    try:
        weights = json.loads(_text(path))
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(weights, dict) and set(weights) == {"schema", "networks"} and isinstance(weights["networks"], dict)
    )


def _text(path: Path) -> str:
    try:
        with path.open("rb") as f:
            return f.read(_MOST_BYTES).decode(errors="replace")
    except OSError:
        return ""
