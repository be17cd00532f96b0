"""Terminal control codes and rich markup in manifests, names, prompts and paths, in pipes and on pseudo-terminals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..case import BASE2, GUIDED, HERE, At, Case, Place, Surroundings
from .common import (
    ANY,
    AT_X,
    ON_X,
    build,
    copy,
    engine_named,
    plug,
    sample,
    share,
    some,
    spoil,
    visualize,
)

AREA = "terminal"
TEXTS: dict[str, str] = {
    "an escape": "\x1b]0;owned\x07\x1b[2J\x1b[31mred", "markup": "[red]x[/nope]", "a link": "[link=http://evil]x[/link]",
    "a line end": "a\npnp-trt: all is well", "right to left": "\u202egnp", "a NUL": "a\0b", "C1": "\x9d0;owned\x9c",
    "a backspace": "evil\x08\x08\x08\x08good", "a carriage return": "evil\rgood", "an isolate": "\u2067x\u2066",
}  # fmt: skip
KEYS = ("name", "rebuild", "precision", "backend", "target")
PTY, PIPE = Surroundings(environment=AT_X, terminal=True), Surroundings(environment=AT_X)


def _key(key: str, value: str, damage: bool) -> Callable[[Place], None]:
    def change(folder: Path, manifest: dict[str, Any]) -> None:
        manifest[key] = value

    seal_it = spoil(change)

    def prepare(place: Place) -> None:
        seal_it(place)
        if damage:
            (place.here / "engines/x/unet.onnx").write_bytes(b"x")

    return prepare


def _parts(value: str) -> Callable[[Place], None]:
    def change(folder: Path, manifest: dict[str, Any]) -> None:
        manifest["base"]["name"] = value
        if isinstance(manifest["guide"], dict):
            manifest["guide"]["name"] = value

    return spoil(change)


def cases() -> Iterator[Case]:
    """All cases."""
    looks = {name: ON_X[name] for name in ("inspect", "sample", "list")}
    for turn, (label, text) in enumerate(TEXTS.items()):
        for n, key in enumerate(KEYS):
            for command, words in share(looks, turn + n, 2 if key == "name" else 1).items():
                prepare = _key(key, text, command == "sample")
                yield Case(AREA, f"{command}, {key} has {label}", words, ANY, prepare, surroundings=PIPE)
        for command in some(("inspect", "list", "bench"), turn, 2):
            name = f"{command}, base and guide have {label}"
            yield Case(AREA, name, ON_X[command], ANY, _parts(text), surroundings=PIPE)
        for command, words in share(looks, turn, 2).items():
            prepare = _key("name", text, command == "sample")
            yield Case(AREA, f"terminal: {command}, name has {label}", words, ANY, prepare, surroundings=PTY)
        if "\0" not in text:  # a NUL cannot be part of a command line
            yield from _missing(label, text, turn)
            yield from _names(label, text, turn)
    yield Case(AREA, "terminal: build", build(base="nope"), (2,), surroundings=PTY)
    yield Case(AREA, "terminal: plug", plug(), (0,), surroundings=PTY, slow=True)
    yield Case(AREA, "terminal: doctor", ("doctor",), ANY, surroundings=PTY)


def _missing(label: str, text: str, turn: int) -> Iterator[Case]:
    """Names that do not exist, which the error message repeats."""
    commands = {
        "engine": ("sample", "a", "--engine", text), "base": plug(base=text), "LoRA": plug(GUIDED, "--lora", text),
        "base of build": build(base=text), "guide": build(guide=text),
    }  # fmt: skip
    for what, words in share(commands, turn, 3).items():
        allowed = (1, 2) if what == "base of build" else (2,)
        yield Case(AREA, f"no {what} called {label}", words, allowed, surroundings=PIPE, network=allowed == (1, 2))


def _names(label: str, text: str, turn: int) -> Iterator[Case]:
    """Folders with this name."""
    at = HERE / "engines" / text.replace("/", "∕")
    piped = {
        "inspect": ("inspect", at), "list": ("list",), "sample": sample(at), "verify": ("verify", at), "plug": plug(at)
    }  # fmt: skip
    for command, words in share(piped, turn, 2).items():
        name = f"{command}, a folder called {label}"
        yield Case(AREA, name, words, (0,), engine_named(text), surroundings=PIPE, slow=command == "plug")
    shown = {
        "plug": plug(at), "list": ("list",), "sample": sample(prompt=text), "inspect": ("inspect", at),
        "no engine": ("sample", "a", "--engine", text), "build": build(base=f"nope-{text}", out=at),
        "plug --base": plug(base=f"nope-{text}"), "visualize": visualize(prompt=text),
    }  # fmt: skip
    for command, words in share(shown, turn, 3).items():
        slow = command in ("plug", "visualize")
        name = f"terminal: {command}, {label}"
        yield Case(AREA, name, words, ANY, engine_named(text), surroundings=PTY, network=True, slow=slow)
    path = HERE / at.path.rpartition("/")[2]
    yield Case(AREA, f"plug, a base's folder called {label}", plug(base=path), (0,), _base(path), slow=True)


def _base(path: At) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        copy(place, BASE2, path)

    return prepare
