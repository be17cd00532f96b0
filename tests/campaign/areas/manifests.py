"""Invalid manifests, and sealed manifests with values of the wrong type."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..case import GUIDED, Case, Place, Surroundings
from .common import ANY, AT_X, ON_X, X, copy, manifest_of, seal, share, some, spoil

AREA = "manifests"
HOME = Surroundings(environment=AT_X)
KEYS = (
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
    "tokens",
    "image",
    "latents",
    "parity",
)
WRONG: dict[str, Any] = {"null": None, "list": [], "text": "x", "NaN": float("nan"), "huge": 10**400, "object": {}}
RAW: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "null": lambda good: b"null",
    "list": lambda good: b"[]",
    "number": lambda good: b"1",
    "binary": lambda good: b"\0\xff\xfe",
    "BOM": lambda good: b"\xef\xbb\xbf" + good,
    "UTF-16": lambda good: good.decode().encode("utf-16"),
    "nested lists": lambda good: b'{"schema":' + b"[" * 200_000,
    "nested objects": lambda good: b'{"a":' * 60_000 + b"1" + b"}" * 60_000,
    "integer of 5,000 digits": lambda good: b'{"schema": ' + b"9" * 5000 + b"}",
    "schema 1": lambda good: b'{"schema": 1}',
    "schema 3": lambda good: b'{"schema": 3}',
    "schema 2.0": lambda good: b'{"schema": 2.0}',
    "schema true": lambda good: b'{"schema": true}',
    "schema alone": lambda good: b'{"schema": 2}',
    "NaN": lambda good: b'{"schema": NaN}',
    "two schemas": lambda good: b'{"schema": 1, "schema": 2}',
    "1e999": lambda good: b'{"schema": 1e999}',
    "cut": lambda good: good[: len(good) // 2],
    "lone surrogate": lambda good: b'{"schema": 2, "name": "\\ud800"}',
    "200 MB of blanks": lambda good: b" " * (200 << 20),
}


def _set(path: str, value: Any) -> Callable[[Path, dict[str, Any]], None]:
    """Return a change of one value at the dotted ``path``; the value ``-`` removes it."""

    def change(folder: Path, manifest: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        holder = manifest
        for key in parents:
            holder = holder.setdefault(key, {})
        if value == "-":
            holder.pop(last, None)
        else:
            holder[last] = value

    return change


#: Each wrong value is tested with one of these commands.
COMMANDS = {name: ON_X[name] for name in ("sample", "inspect", "verify", "list", "plug", "inspect --json", "bench")}
NESTED: dict[str, tuple[str, Any]] = {
    "a batch limit of 0": ("sample.max_batch", 0),
    "a batch limit of -1": ("sample.max_batch", -1),
    "a sample of 10^9 rows": ("sample.height", 10**9),
    "a sample of NaN rows": ("sample.height", float("nan")),
    "a sample of text rows": ("sample.height", "x"),
    "a sample of half a row": ("sample.height", 3.5),
    "a sample of true rows": ("sample.height", True),
    "10^12 tokens": ("tokens.length", 10**12),
    "-1 tokens": ("tokens.length", -1),
    "a pad token of 10^30": ("tokens.pad", 10**30),
    "a pad token of text": ("tokens.pad", "x"),
    "10^12 time steps": ("scheduler.num_train_timesteps", 10**12),
    "-1 time steps": ("scheduler.num_train_timesteps", -1),
    "1e308 time steps": ("scheduler.num_train_timesteps", 1e308),
    "a beta of NaN": ("scheduler.beta_start", float("nan")),
    "a beta of 2": ("scheduler.beta_end", 2.0),
    "a beta of text": ("scheduler.beta_start", "x"),
    "a code in the schedule": ("scheduler.beta_schedule", "__import__('os').system('id')"),
    "an unknown prediction type": ("scheduler.prediction_type", "x"),
    "an offset of 10^9": ("scheduler.steps_offset", 10**9),
    "an unknown backend": ("backend", "os"),
    "a backend that is a path": ("backend", "../../evil"),
    "the torch backend": ("backend", "torch"),
    "no U-Net": ("networks.unet", "-"),
    "a U-Net of text": ("networks.unet", "x"),
    "no VAE decoder": ("networks.vae_decoder", "-"),
    "no file": ("networks.unet.file", "-"),
    "a file of null": ("networks.unet.file", None),
    "a file that is missing": ("networks.unet.file", "nope.onnx"),
    "no graph": ("networks.unet.graph", "-"),
    "a graph of null": ("networks.unet.graph", None),
    "null profiles of a network": ("networks.unet.profiles", None),
    "nonsense in a network's profiles": ("networks.unet.profiles", [{"x": 1}]),
    "nonsense profiles": ("profiles", [{"x": 1}]),
    "a profile of numbers": ("profiles", [1, 2]),
    "a text guide": ("guide", "x"),
    "NaN sampling steps": ("guide.sampling_steps", float("nan")),
    "0 sampling steps": ("guide.sampling_steps", 0),
    "text sampling steps": ("guide.sampling_steps", "x"),
    "a guide of nothing": ("guide", {}),
    "parity of text": ("networks.unet.parity", "x"),
    "a limit of NaN": ("networks.unet.parity.limit", float("nan")),
    "a limit of infinity": ("networks.unet.parity.limit", float("inf")),
    "a limit of text": ("networks.unet.parity.limit", "x"),
    "files of numbers": ("files", {"unet.onnx": 1}),
    "a file of no digest": ("files", {"unet.onnx": {"bytes": 1}}),
    "a file of a digest that is a number": ("files", {"unet.onnx": {"sha256": 1, "bytes": 1}}),
    "a file of negative size": ("files", {"unet.onnx": {"sha256": "0" * 64, "bytes": -1}}),
    "a compiler of text": ("compiler", "x"),
    "built from nothing": ("built_from", {}),
    "built from text": ("built_from.base", "x"),
    "a rebuild command that is a number": ("rebuild", 3),
    "a rebuild command of 100,000 letters": ("rebuild", "x" * 100_000),
    "a name of 100,000 letters": ("name", "x" * 100_000),
    "an empty name": ("name", ""),
}


def cases() -> Iterator[Case]:
    """All cases."""
    for turn, (label, raw) in enumerate(RAW.items()):
        for command in some(("inspect", "sample", "list"), turn, 2):
            allowed, slow = ANY if command == "list" else (2,), label.startswith("200")
            yield Case(AREA, f"{command}, {label}", ON_X[command], allowed, _raw(raw), surroundings=HOME, slow=slow)
    turn = 0
    for key in KEYS:
        for label, value in share({**WRONG, "missing": "-"}, turn, 4).items():
            turn += 1
            yield from _sealed(f"{key} is {label}", key, value, share(COMMANDS, turn, 1))
    for label, (path, value) in NESTED.items():
        turn += 1
        yield from _sealed(label, path, value, share(COMMANDS, turn, 1))
    yield Case(AREA, "list, one bundle damaged beside a good one", ("list",), (0,), _beside,
               says="guided", surroundings=HOME)  # fmt: skip


def _sealed(label: str, path: str, value: Any, commands: dict[str, tuple[object, ...]]) -> Iterator[Case]:
    """A manifest with one changed value and a matching seal."""
    for command, words in commands.items():
        prepare = spoil(_set(path, value), files=path != "files")
        yield Case(AREA, f"{command}, {label}", words, ANY, prepare, surroundings=HOME)


def _raw(change: Callable[[bytes], bytes]) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        path = copy(place, GUIDED, X) / "manifest.json"
        path.write_bytes(change(path.read_bytes()))

    return prepare


def _beside(place: Place) -> None:
    folder = copy(place, GUIDED, X)
    manifest = manifest_of(folder)
    seal(folder, {"schema": manifest["schema"], "name": [1]}, files=False)
    good = copy(place, GUIDED, X.__class__("here", "engines/guided"))
    assert json.loads((good / "manifest.json").read_text())["name"] == "guided"
