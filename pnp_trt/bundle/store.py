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
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BundleCorrupt, BundleNotFound, InputError, PnpError
from ..io.files import lock as lock
from ..io.files import whole_folder as whole_folder
from ..io.files import write_bytes as write_bytes
from ..io.files import write_text as write_text
from ..io.text import printable
from .document import parse_file, read_regular
from .manifest import FILE as MANIFEST
from .manifest import SCHEMA, FileRecord, Manifest
from .onnx_file import check_graph

_WORTH_REMEMBERING = 256 << 20
#: keys whose absence is reported before the seal is compared
REQUIRED = (
    "schema", "seal", "name", "built_from", "base", "guide", "backend", "precision", "target", "profiles", "compiler",
    "networks", "files", "sample", "scheduler", "rebuild",
)  # fmt: skip
#: most bytes of a manifest; those of real bundles have some ten thousand
_MOST_MANIFEST_BYTES = 4 << 20


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes.

    Raises:
        InputError: if it may not be read.
    """
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except PermissionError as e:
        raise InputError(f"{path} cannot be read ({e.strerror}); check its permissions") from e


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
        if len(held := note.read_text(encoding="utf-8").strip()) == 64:
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
    try:
        for candidate in (engines_home() / name, Path(name)):
            if os.path.lexists(candidate / MANIFEST):  # a dangling link too: reading it reports that
                return candidate
        if unfinished := (engines_home() / name).is_dir():
            os.scandir(engines_home() / name).close()  # a folder that cannot be read is not an unfinished engine
    except (OSError, ValueError) as e:  # a name that no file can have
        raise BundleNotFound(
            f"engine '{printable(name, limit=80)}' cannot be looked for ({getattr(e, 'strerror', None) or e}); "
            "give a bundle's name or folder"
        ) from None
    if unfinished:
        raise BundleCorrupt(
            f"engine '{name}' has no {MANIFEST}, so it was not finished or was damaged; "
            f"{rebuild_advice(engines_home() / name)}"
        )
    known = ", ".join(known_bundles()) or "none yet"
    raise BundleNotFound(
        f"no engine named '{printable(name, limit=200)}'; known engines: {known}. "
        "Make one with: pnp-trt build --out engines/NAME"
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(_as_text(value), path)


def _as_text(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def list_files(folder: Path) -> dict[str, FileRecord]:
    """Hash and size of everything in a bundle but its manifest, by relative path."""
    return {
        path.relative_to(folder).as_posix(): FileRecord(sha256(path), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


@dataclass(frozen=True)
class Bundle:
    """A checked bundle: its folder and its manifest."""

    folder: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def guided(self) -> bool:
        """Whether a guide is fused into the U-Net."""
        return self.manifest.guide is not None

    def file(self, network: str) -> Path:
        """The file of one network that is loaded: an engine or a graph."""
        return self.folder / self.manifest.networks[network].file


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write a manifest with its seal, the digest of everything else in it; returns it as it is read back.

    Raises:
        InputError: if a value is one that ``read_manifest`` refuses.
    """
    document = json.loads(json.dumps(manifest.to_json()))
    Manifest.from_json(document, file=str(folder / MANIFEST))
    return Manifest.from_json(write_document(folder, document))


def write_document(folder: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Seal and write a manifest's JSON without a look at its values; returns it with its seal."""
    sealed = {k: v for k, v in document.items() if k != "seal"}
    sealed["seal"] = _seal(sealed)
    write_json(folder / MANIFEST, sealed)
    return sealed


def _seal(document: dict[str, Any]) -> str:
    return digest({k: v for k, v in document.items() if k != "seal"})


def rebuild_advice(folder: Path, claimed: str | None = None, *options: str) -> str:
    """What to do about a bundle that cannot be used, as a clause.

    Args:
        claimed: the command that its manifest claims to be made with; quoted as a claim and not as advice, since a
            stranger may have written it.
        options: of `pnp-trt build`, which the new bundle needs.
    """
    command = shlex.join(["pnp-trt", "build", "--out", str(folder), *options, "--force"])
    advice = f"rebuild it with: {command}"
    return advice if claimed is None else f"{advice} (claimed rebuild command: {printable(claimed, limit=1000)})"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle, its schema, seal and every value checked; other files are not read.

    Raises:
        InputError: if it is missing, cut short, changed, of another schema, or has a value that is out of bounds.
    """
    path = folder / MANIFEST
    advice = rebuild_advice(folder)
    raw = read_regular(path, advice, limit=_MOST_MANIFEST_BYTES)
    document = parse_file(path, raw, advice)
    schema = document.get("schema") if isinstance(document, dict) else type(document).__name__
    if type(schema) is not int or schema != SCHEMA:
        shown = printable(schema, limit=40)
        raise BundleCorrupt(f"{path} has manifest schema {shown}, this version reads {SCHEMA}; {advice}")
    if missing := [key for key in REQUIRED if key not in document]:
        raise BundleCorrupt(f"{path} lacks {', '.join(missing)}; {advice}")
    seal = printable(document["seal"], limit=12)
    # the text too: a changed blank is harmless, and still a sign that the disk cannot be trusted
    if (contents := _seal(document)) != document["seal"] or _as_text(document).encode() != raw:
        raise BundleCorrupt(f"{path} was changed or is corrupt (seal {seal}, contents {contents[:12]}…); {advice}")
    return Manifest.from_json(document, file=str(path), advice=advice)


def open_bundle(name: str | Path) -> Bundle:
    """Find a bundle and check every file against its manifest before anything is loaded.

    Files in the folder that the manifest does not list are never loaded, and are ignored.

    Raises:
        InputError: naming the file, both values, and the command that rebuilds.
    """
    folder = find_bundle(str(name))
    manifest = read_manifest(folder)
    advice = rebuild_advice(folder, manifest.rebuild)
    for relative, record in manifest.files.items():
        check_file(folder, relative, record, manifest.name, advice)
    for name, network in manifest.networks.items():
        if network.file.endswith(".onnx"):
            check_graph(folder, manifest, name)
    return Bundle(folder, manifest)


def check_file(folder: Path, relative: str, record: FileRecord, engine: str, advice: str) -> None:
    """Raise ``InputError`` unless a bundle's file is a regular one, reached by no link, of this size and hash."""
    path = check_place(folder, relative, engine)
    where = f"engine '{engine}': {relative}"
    try:
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise BundleCorrupt(f"{where} is missing; {advice}")
        if size != record.size:
            raise BundleCorrupt(f"{where} has {size} bytes, not {record.size}; {advice}")
        contents = sha256(path)
    except OSError as e:
        raise InputError(f"{where} cannot be read ({e.strerror or e}); check its permissions") from None
    if contents != record.sha256:
        raise BundleCorrupt(f"{where} is corrupt (sha256 {contents[:12]}…, not {record.sha256[:12]}…); {advice}")


def check_place(folder: Path, relative: str, engine: str) -> Path:
    """The path of a bundle's file; raises ``InputError`` where it or a folder on the way to it is a link."""
    path = folder
    for part in relative.split("/"):
        path /= part
        if path.is_symlink():
            raise BundleCorrupt(
                f"engine '{engine}': {path} is a link, and a bundle's files must be in its folder; "
                "copy the bundle with cp -rL"
            )
    return path
