"""Find, check and write bundles: folders that are created atomically under a lock.

A bundle is ``engines/NAME/`` with networks, tokenizer and ``manifest.json``.  It is written to a temporary folder
beside its final path and then renamed.  A bundle that is replaced is exchanged in one step if the system supports it,
and otherwise moved away first, so that the path never refers to a partial bundle.
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
#: largest size of a manifest in bytes; real ones have some ten thousand
_MOST_MANIFEST_BYTES = 4 << 20


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes.

    Raises:
        InputError: if permission to read it is missing.
    """
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except PermissionError as e:
        raise InputError(f"{path} cannot be read ({e.strerror}); check its permissions") from e


def cached_sha256(path: Path) -> str:
    """Like ``sha256``, but cached by the file's path, size, times and inode, so that large files are read only once.

    It serves to detect changed inputs, as make does; a bundle's own files are always read.
    """
    stat = path.stat()
    mark = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    if stat.st_size < _WORTH_REMEMBERING:
        return sha256(path)
    note = cache_home() / "sha256" / f"{digest(mark)}.txt"
    with contextlib.suppress(OSError):
        if len(cached := note.read_text(encoding="utf-8").strip()) == 64:
            return cached
    file_hash = sha256(path)
    with contextlib.suppress(PnpError):  # a cache that cannot be written is only slower
        write_text(file_hash + "\n", note)
    return file_hash


def cache_home() -> Path:
    """Folder for files that can be regenerated: ``$PNP_TRT_CACHE``, or ``~/.cache/pnp-trt``."""
    return Path(os.environ.get("PNP_TRT_CACHE") or Path.home() / ".cache" / "pnp-trt")


def digest(value: Any) -> str:
    """Hex digest of a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def engines_home() -> Path:
    """Folder of bundles: ``$PNP_TRT_ENGINES``, or ``engines/`` in the current folder."""
    return Path(os.environ.get("PNP_TRT_ENGINES", "engines"))


def known_bundles(home: Path | None = None) -> list[str]:
    """Names of the bundles under ``home``."""
    home = home or engines_home()
    return sorted(p.parent.name for p in home.glob(f"*/{MANIFEST}") if not p.parent.name.startswith("."))


def find_bundle(name: str) -> Path:
    """Find the folder of a bundle, by name under ``engines_home()`` or by path.

    Raises:
        InputError: if it does not exist; the message lists the existing bundles.
    """
    try:
        for candidate in (engines_home() / name, Path(name)):
            if os.path.lexists(candidate / MANIFEST):  # also for a dangling link: reading it reports the error
                return candidate
        if unfinished := (engines_home() / name).is_dir():
            os.scandir(engines_home() / name).close()  # OSError if unreadable, which is not unfinished
    except (OSError, ValueError) as e:  # including names that no file can have
        raise BundleNotFound(
            f"engine '{printable(name, limit=80)}' cannot be looked up ({getattr(e, 'strerror', None) or e}); "
            "give a bundle's name or folder"
        ) from None
    if unfinished:
        raise BundleCorrupt(
            f"engine '{name}' has no {MANIFEST}, so it is unfinished or damaged; "
            f"{rebuild_advice(engines_home() / name)}"
        )
    known = ", ".join(known_bundles()) or "none yet"
    raise BundleNotFound(
        f"no engine named '{printable(name, limit=200)}'; known engines: {known}. "
        "Build one with: pnp-trt build --out engines/NAME"
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(_as_text(value), path)


def _as_text(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def list_files(folder: Path) -> dict[str, FileRecord]:
    """Hash and size of all files of a bundle except its manifest, by relative path."""
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
        """The file of a network to load: an engine or a graph."""
        return self.folder / self.manifest.networks[network].file


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write a manifest with its seal, the digest of all other entries; return the sealed manifest.

    Raises:
        InputError: for a value that ``read_manifest`` would refuse.
    """
    document = json.loads(json.dumps(manifest.to_json()))
    Manifest.from_json(document, file=str(folder / MANIFEST))
    return Manifest.from_json(write_document(folder, document))


def write_document(folder: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Seal and write a manifest's JSON without checking its values; return it with its seal."""
    sealed = {k: v for k, v in document.items() if k != "seal"}
    sealed["seal"] = _seal(sealed)
    write_json(folder / MANIFEST, sealed)
    return sealed


def _seal(document: dict[str, Any]) -> str:
    return digest({k: v for k, v in document.items() if k != "seal"})


def rebuild_advice(folder: Path, claimed: str | None = None, *options: str) -> str:
    """Advice on a bundle that cannot be used, as a clause for a message.

    Args:
        claimed: the rebuild command in its manifest; quoted as a claim instead of advice, since it is untrusted.
        options: further options of `pnp-trt build` for the new bundle.
    """
    command = shlex.join(["pnp-trt", "build", "--out", str(folder), *options, "--force"])
    advice = f"rebuild it with: {command}"
    return advice if claimed is None else f"{advice} (claimed rebuild command: {printable(claimed, limit=1000)})"


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest and check its schema, seal and values; other files are not read.

    Raises:
        InputError: if it is missing, truncated, changed, of another schema, or has a value out of bounds.
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
    # compare the text too: changed whitespace is harmless, but shows that the disk is unreliable
    if (contents := _seal(document)) != document["seal"] or _as_text(document).encode() != raw:
        raise BundleCorrupt(f"{path} was changed or is corrupt (seal {seal}, contents {contents[:12]}…); {advice}")
    return Manifest.from_json(document, file=str(path), advice=advice)


def open_bundle(name: str | Path) -> Bundle:
    """Find a bundle and check every file against its manifest; nothing is loaded.

    Files that the manifest does not list are ignored, and never loaded.

    Raises:
        InputError: naming the file, both values, and the command to rebuild the bundle.
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
    """Raise ``InputError`` unless a bundle's file is regular, not behind a link, and of this size and hash."""
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
    """The path of a bundle's file; raise ``InputError`` if it or a parent folder within the bundle is a link."""
    path = folder
    for part in relative.split("/"):
        path /= part
        if path.is_symlink():
            raise BundleCorrupt(
                f"engine '{engine}': {path} is a link, and a bundle's files must be in its folder; "
                "copy the bundle with cp -rL"
            )
    return path
