"""Helpers for several areas: command lines, bundles to corrupt, and the campaign's own implementation of the seal."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..case import BASE, BASE2, GUIDE, GUIDED, HERE, PLAIN, At, Outcome, Place

OUT = HERE / "out"
PROMPTS = HERE / "prompts.txt"
X = HERE / "engines/x"  # the bundle that a case corrupts
ANY = (0, 1, 2)


def sample(engine: object = GUIDED, *more: object, prompt: str = "a cat", out: object = OUT) -> tuple[object, ...]:
    """``sample`` with one step."""
    return ("sample", "--engine", engine, "--steps", 1, "--out", out, *more, "--", prompt)


def plug(engine: object = GUIDED, *more: object, base: object = BASE2, out: object = OUT) -> tuple[object, ...]:
    """``plug`` with the second micro teacher."""
    return ("plug", engine, "--base", base, "--out", out, *more)


def build(*more: object, base: object = BASE, guide: object = "none", out: object = OUT) -> tuple[object, ...]:
    """``build`` of the micro teacher."""
    return ("build", "--base", base, "--guide", guide, "--out", out, *more)


def guidance(*more: object, prompts: object = PROMPTS, out: object = OUT) -> tuple[object, ...]:
    """``distill guidance`` with one step."""
    return (
        "distill", "guidance", "--base", BASE, "--prompts", prompts, "--out", out, "--steps", 1, "--num-states", 20,
        "--batch", 2, "--grid-steps", 0, "--rank", 4, *more,
    )  # fmt: skip


def steps(*more: object, guide: object = GUIDE, prompts: object = PROMPTS, out: object = OUT) -> tuple[object, ...]:
    """``distill steps`` with one halving and one step."""
    return (
        "distill",
        "steps",
        "--guide",
        guide,
        "--base",
        BASE,
        "--prompts",
        prompts,
        "--out",
        out,
        "--from",
        4,
        "--to",
        2,
        "--trajectories",
        4,
        "--steps",
        1,
        "--batch",
        2,
        "--no-grid",
        *more,
    )


def bench(*more: object, engines: tuple[object, ...] = (PLAIN, GUIDED), only: str = "fidelity") -> tuple[object, ...]:
    """The smallest ``bench``."""
    names = [word for engine in engines for word in ("--engine", engine)]
    return (
        "bench", *names, "--quick", "--only", only, "--images", 2, "--steps", 2, "--no-peers", "--no-memory", *more,
    )  # fmt: skip


def visualize(*more: object, guide: object = GUIDE, prompt: str = "a cat", out: object = OUT) -> tuple[object, ...]:
    """``visualize`` with two steps and one w."""
    return (
        "visualize", "--base", BASE, "--guide", guide, "--steps", 2, "--guidance", 2, "--out", out, *more, "--", prompt,
    )  # fmt: skip


def without(words: tuple[object, ...], option: str) -> tuple[object, ...]:
    """Return a command line without an option and its value."""
    if option not in words:
        return words
    at = words.index(option)
    return words[:at] + words[at + 2 :]


#: Command lines on the bundle ``x``.
ON_X: dict[str, tuple[object, ...]] = {
    "inspect": ("inspect", X),
    "inspect --json": ("inspect", X, "--json"),
    "sample": sample(X),
    "verify": ("verify", X),
    "layers": ("verify", X, "--layers"),
    "list": ("list",),
    "plug": plug(X),
    "bench": ("bench", "--engine", X, "--quick", "--only", "cost"),
}
AT_X = {"PNP_TRT_ENGINES": "engines"}  # relative to the case's folder, the working directory


def prompts(place: Place, text: str = "a cat\na dog\n") -> Path:
    """Write the prompts file."""
    path = place.path(PROMPTS)
    path.write_text(text)
    return path


def with_prompts(prepare: Callable[[Place], object] | None = None) -> Callable[[Place], None]:
    """Return a preparation that writes a prompts file, then calls ``prepare``."""

    def both(place: Place) -> None:
        prompts(place)
        if prepare is not None:
            prepare(place)

    return both


def copy(place: Place, of: At, to: At) -> Path:
    """Copy a fixture, to be corrupted."""
    return Path(shutil.copytree(place.path(of), place.path(to)))


def manifest_of(folder: Path) -> dict[str, Any]:
    """Read a manifest without checks."""
    return json.loads((folder / "manifest.json").read_text())


def files_of(folder: Path) -> dict[str, Any]:
    """Digests and sizes of a bundle's files, in the manifest's format."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    return {p.relative_to(folder).as_posix(): entry(p) for p in paths}


def entry(path: Path) -> dict[str, Any]:
    """A file's digest and size."""
    data = path.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def seal(folder: Path, manifest: dict[str, Any], files: bool = True) -> None:
    """Write a manifest with the seal that an attacker would compute: it is a plain digest."""
    if files:
        manifest["files"] = files_of(folder)
    contents = {k: v for k, v in manifest.items() if k != "seal"}
    manifest["seal"] = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def spoil(change: Callable[[Path, dict[str, Any]], object], of: At = GUIDED, files: bool = True) -> Callable:
    """Return a preparation that copies a bundle to ``x``, changes its files or manifest, and seals it again."""

    def prepare(place: Place) -> None:
        folder = copy(place, of, X)
        manifest = manifest_of(folder)
        change(folder, manifest)
        seal(folder, manifest, files)

    return prepare


def never_zero(sentence: str) -> Callable[[Outcome, Place], str | None]:
    """Return a check that fails with ``sentence`` if the exit code is 0."""
    return lambda outcome, place: sentence if outcome.code == 0 else None


def share(table: Mapping[Any, Any], turn: int, number: int) -> dict[Any, Any]:
    """Return ``number`` entries of a table, different ones in each turn, to limit the number of combinations."""
    names = list(table)
    return {name: table[name] for name in (names[(turn * number + i) % len(names)] for i in range(number))}


def some(values: Sequence[Any], turn: int, number: int) -> list[Any]:
    """``share`` for a sequence of values."""
    return list(share(dict(enumerate(values)), turn, number).values())


def packed(header: object, body: bytes) -> bytes:
    """Return a safetensors file with any header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def unpacked(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and body of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def engine_named(text: str) -> Callable[[Place], None]:
    """Return a preparation that copies the guided engine under this name, in folder and manifest."""

    def prepare(place: Place) -> None:
        folder = place.here / "engines" / text.replace("/", "∕")
        shutil.copytree(place.path(GUIDED), folder)
        manifest = manifest_of(folder)
        manifest["name"] = folder.name
        seal(folder, manifest, files=False)

    return prepare
