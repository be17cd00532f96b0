"""Bundles: folders that appear whole or not at all, under a lock, with a manifest that is checked first.

A bundle is ``engines/NAME/`` with networks, tokenizer and ``manifest.json``.  It is written beside its
final place and renamed; what is being replaced changes places with it in one step (where the system can,
else it is moved aside first), so that no moment exists at which the name leads to half a bundle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError, PnpError
from .files import lock as lock
from .files import whole_folder as whole_folder
from .files import write_bytes as write_bytes
from .files import write_text as write_text

MANIFEST = "manifest.json"
_WORTH_REMEMBERING = 256 << 20
SCHEMA = 2
REQUIRED = (
    "schema",
    "seal",
    "name",
    "built_from",
    "base",
    "guide",
    "backend",
    "precision",
    "target",
    "profiles",
    "compiler",
    "networks",
    "files",
    "sample",
    "scheduler",
    "rebuild",
)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def cached_sha256(path: Path) -> str:
    """``sha256``, remembered by the file's place, size, times and inode, so that gigabytes are read once.

    For telling whether inputs changed, as make does; a bundle's own files are always read.
    """
    stat = path.stat()
    mark = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    if stat.st_size < _WORTH_REMEMBERING:
        return sha256(path)
    note = cache_home() / "sha256" / f"{digest(mark)}.txt"
    with contextlib.suppress(OSError):
        if len(held := note.read_text().strip()) == 64:
            return held
    found = sha256(path)
    with contextlib.suppress(PnpError):  # a cache that cannot be written is only slower
        write_text(found + "\n", note)
    return found


def cache_home() -> Path:
    """Where things that can be made again are kept: ``$PNP_TRT_CACHE``, or ``~/.cache/pnp-trt``."""
    return Path(os.environ.get("PNP_TRT_CACHE") or Path.home() / ".cache" / "pnp-trt")


def digest(value: Any) -> str:
    """Hex digest of a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def engines_home() -> Path:
    """Where bundles live: ``$PNP_TRT_ENGINES``, or ``engines/`` in the current folder."""
    return Path(os.environ.get("PNP_TRT_ENGINES", "engines"))


def known_bundles(home: Path | None = None) -> list[str]:
    """Names of the bundles under ``home``."""
    home = home or engines_home()
    return sorted(p.parent.name for p in home.glob(f"*/{MANIFEST}") if not p.parent.name.startswith("."))


def find_bundle(name: str) -> Path:
    """The folder of a bundle, by name under ``engines_home()`` or by path.

    Raises:
        InputError: if there is none; the message lists those that exist.
    """
    for candidate in (engines_home() / name, Path(name)):
        if (candidate / MANIFEST).is_file():
            return candidate
    if (engines_home() / name).is_dir():
        raise InputError(
            f"engine '{name}' has no {MANIFEST}, so it was not finished or was damaged; "
            f"rebuild it with: pnp-trt build --out {engines_home() / name} --force"
        )
    known = ", ".join(known_bundles()) or "none yet"
    raise InputError(
        f"no engine named '{name}'; known engines: {known}. Make one with: pnp-trt build --out engines/NAME"
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(_as_text(value), path)


def _as_text(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """``{relative path: {"sha256": …, "bytes": …}}`` of everything in a bundle but its manifest."""
    out = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            out[path.relative_to(folder).as_posix()] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    return out


@dataclass(frozen=True)
class Bundle:
    """A checked bundle: its folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def guided(self) -> bool:
        """Whether a guide is fused into the U-Net."""
        return self.manifest["guide"] is not None

    def file(self, network: str) -> Path:
        """The file of one network that is loaded: an engine or a graph."""
        return self.folder / self.manifest["networks"][network]["file"]


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with its seal, the digest of everything else in it."""
    manifest["seal"] = _seal(manifest)
    write_json(folder / MANIFEST, manifest)


def _seal(manifest: dict[str, Any]) -> str:
    return digest({k: v for k, v in manifest.items() if k != "seal"})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle, its schema and seal checked; other files are not read.

    Raises:
        InputError: if it is missing, cut short, changed, or of another schema.
    """
    path = folder / MANIFEST
    advice = f"rebuild it with: pnp-trt build --out {folder} --force"
    try:
        text = path.read_bytes().decode()
        manifest = json.loads(text)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {advice}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{path} is not readable as JSON ({e}); {advice}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise InputError(f"{path} has manifest schema {found}, this version reads {SCHEMA}; {advice}")
    missing = [key for key in REQUIRED if key not in manifest]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}; {advice}")
    # the text too: a changed blank is harmless, and still a sign that the disk cannot be trusted
    if (found := _seal(manifest)) != manifest["seal"] or text != _as_text(manifest):
        raise InputError(
            f"{path} was changed or is corrupt (seal {str(manifest['seal'])[:12]}…, contents {found[:12]}…); {advice}"
        )
    return manifest


def open_bundle(name: str | Path) -> Bundle:
    """Find a bundle and check every file against its manifest before anything is loaded.

    Raises:
        InputError: naming the file, both values, and the command that rebuilds.
    """
    folder = find_bundle(str(name))
    manifest = read_manifest(folder)
    advice = f"rebuild it with: {manifest['rebuild']} --force"
    for relative, wanted in manifest["files"].items():
        path = folder / relative
        if not path.is_file():
            raise InputError(f"engine '{manifest['name']}': {relative} is missing; {advice}")
        size = path.stat().st_size
        if size != wanted["bytes"]:
            raise InputError(
                f"engine '{manifest['name']}': {relative} has {size} bytes, not {wanted['bytes']}; {advice}"
            )
        found = sha256(path)
        if found != wanted["sha256"]:
            raise InputError(
                f"engine '{manifest['name']}': {relative} is corrupt (sha256 {found[:12]}…, "
                f"not {wanted['sha256'][:12]}…); {advice}"
            )
    return Bundle(folder, manifest)
