"""Prompts and prompt files: control characters, other scripts, lengths, encodings, and invalid files."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from ..case import BASE, GUIDED, HERE, PLAIN, At, Case, Outcome, Place, Surroundings
from .common import ANY, OUT, PROMPTS, bench, guidance, sample, visualize

GRID = HERE / "grid.png"
TEXTS: dict[str, str] = {
    "empty": "",
    "blank": "   ",
    "a slash": "/",
    "two dots": "..",
    "a dot": ".",
    "a path": "../../../etc/passwd",
    "a line end": "a\nb",
    "a tab": "\t",
    "an escape": "\x1b[2J\x1b]0;x\x07a",
    "C1 controls": "\x9b2J\x9d0;x\x9c",
    "markup": "[red]x[/nope]",
    "right to left": "\u202eabc",
    "emoji": "🧑‍🚀🏳️‍🌈",
    "500 accents": "a" + "\u0301" * 500,
    "a byte that is no UTF-8": "a\udcff",
    "a lone surrogate": "a\ud800",
    "50,000 words": "a " * 50_000,
    "a word of 100,000 letters": "x" * 100_000,
    "30,000 accents": "é" * 30_000,
    "HTML": "<script>alert(1)</script>",
    "a format": "{} {0} %s %n ${HOME} `id` $(id)",
    "an option": "--help",
    "a device's name": "CON",
    "accents alone": "\u0301",
    "private characters": "\ue000\uffff\U0010ffff",
    "zero width": "\u200b" * 100,
    "Chinese": "一只红苹果" * 20,
    "special tokens": "<|endoftext|><|startoftext|>" * 40,
    "one dollar": "$",
    "an open formula": "$\\frac$",
    "backslashes": "\\" * 50,
    "weights of another program": "(red:1.5) <lora:sepia:1> BREAK",
    "control characters": "".join(map(chr, range(1, 32))),
    "line separators": "a\u2028b\u2029c\x85d",
    "a name of 300 letters": "n" * 300,
    "a Windows path": "C:\\a\\b?.png",
    "leading dot": ".x",
}
TWICE = ("a byte that is no UTF-8", "a lone surrogate", "an escape", "markup", "HTML", "right to left", "C1 controls",
         "a word of 100,000 letters", "an open formula", "50,000 words")  # fmt: skip


def _below_out(outcome: Outcome, place: Place) -> str | None:
    """Fail unless images are directly in ``--out``, with names that are safe in a shell and a terminal."""
    for path in place.path(OUT).rglob("*"):
        if path.parent != place.path(OUT) or not path.name.isascii() or len(path.name) > 100:
            return f"an image is called {path.name[:80]!r}"
    return None


def _small_grid(outcome: Outcome, place: Place) -> str | None:
    path = place.path(GRID)
    if not path.exists():
        return _below_out(outcome, place)
    from PIL import Image

    with Image.open(path) as image:
        wide = max(image.size)
    return f"a grid of {wide:,} pixels" if wide > 10_000 else _below_out(outcome, place)


def _prompts() -> Iterator[Case]:
    for label, text in TEXTS.items():
        yield Case("prompts", label, sample(GUIDED, "--grid", GRID, prompt=text), ANY, check=_small_grid)
        if label in TWICE:
            yield Case("prompts", f"visualize, {label}", visualize(prompt=text), ANY, slow=True)
            yield Case("prompts", f"negative, {label}", sample(PLAIN, "--negative", text), ANY, check=_below_out)
            yield Case("prompts", f"--out, {label}", sample(out=HERE / f"o{text[:60]}"), ANY, slow=True)
    for kind in ("png", "webp", "jpeg"):
        for number in (60_000, 70_000):
            words = sample(GUIDED, "--format", kind, "--metadata", "json", prompt="z" * number)
            yield Case("prompts", f"{kind} with {number:,} letters of parameters", words, ANY, check=_below_out)
    yield Case("prompts", "1,000 prompts that differ in nothing but control characters",
               ("sample", "--engine", GUIDED, "--steps", 1, "--out", OUT, "--", *(f"a{chr(n)}" for n in range(1, 32))),
               ANY, check=_below_out, slow=True)  # fmt: skip
    yield Case("prompts", "-n 1001", sample(GUIDED, "-n", 1001), (2,))
    yield Case("prompts", "40 prompts of random characters", ("sample", "--engine", GUIDED, "--steps", 1, "--out", OUT,
               "--", *_random_prompts()), ANY, check=_below_out, slow=True)  # fmt: skip


def _random_prompts() -> list[str]:
    draw = random.Random(11)
    pools = ("abc xyz", "".join(map(chr, range(1, 32))), "/\\.:*?\"<>|~$`%&;()[]{}'", "\u202e\u200b\ufeff\u0301",
             "é一🧑‍🚀🏳️‍🌈𝕏İßﬁ", "\udcff", "\x7f\x80\x85\xa0", "<|endoftext|>", "\U0010ffff\uffff")  # fmt: skip
    return ["".join(draw.choice(draw.choice(pools)) for _ in range(draw.choice((1, 3, 20, 200)))) for _ in range(40)]


FILES: dict[str, bytes] = {
    "a line of 5 MB": b"x" * 5_000_000,
    "noise": random.Random(1).randbytes(10_000),
    "a BOM": b"\xef\xbb\xbfa cat\n",
    "CRLF": b"a cat\r\na dog\r\n",
    "NULs": b"a\0cat\n\0\n",
    "UTF-16": "a cat\n".encode("utf-16"),
    "Latin-1": b"caf\xe9\n",
    "nothing": b"",
    "blank lines": b"\n\n \n",
    "CR alone": b"a cat\ra dog\r",
    "form feeds": b"a\x0cb\x1cc\x85d\n",
    "line separators": "a\u2028b\u2029c".encode(),
    "one word of 999 letters": b"y" * 999,
    "one word of 1,001": b"y" * 1001,
    "a million lines": b"a cat\n" * 1_000_000,
    "a surrogate's bytes": b"\xed\xa0\x80\n",
    "one prompt 50 times": b"a cat\n" * 50,
    "no line end": b"a cat",
    "escapes": b"\x1b]0;x\x07a\n",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
}


def _file(content: bytes) -> Callable[[Place], None]:
    def write(place: Place) -> None:
        place.path(PROMPTS).write_bytes(content)

    return write


def _no_mark(outcome: Outcome, place: Place) -> str | None:
    """Fail if a byte order mark became part of a prompt."""
    import json

    from PIL import Image

    for path in sorted(place.path(OUT).glob("*.png")):
        with Image.open(path) as image:
            text = json.dumps({k: str(v) for k, v in image.info.items()})
        if "ufeff" in text:
            return "the byte order mark became part of the prompt"
    return None


#: Not a named pipe: the shell's <(command) is one, and waiting for its writer is correct.
ODD_FILES: dict[str, Callable[[Path], object]] = {
    "missing": lambda p: None,
    "a folder": lambda p: p.mkdir(),
    "the null device": lambda p: p.symlink_to("/dev/null"),
    "an endless device": lambda p: p.symlink_to("/dev/zero"),
    "a loop of links": lambda p: p.symlink_to(p),
}


def _odd(put: Callable[[Path], object]) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        put(place.path(PROMPTS))

    return prepare


def _prompt_files() -> Iterator[Case]:
    area = "prompt files"
    for turn, (label, content) in enumerate(FILES.items()):
        large = len(content) > 1_000_000
        slow = label != "a BOM"
        if not label.startswith("a million"):
            yield Case(area, f"sample -, {label}", ("sample", "-", "--engine", GUIDED, "--steps", 1, "--out", OUT), ANY,
                       _file(content), _no_mark, surroundings=Surroundings(stdin=PROMPTS), slow=large)  # fmt: skip
            yield Case(area, f"distill guidance, {label}", guidance(), ANY, _file(content), slow=slow)
        if turn % 3 == 0:
            yield Case(area, f"calibrate, {label}", _calibrate(PROMPTS), ANY, _file(content), slow=True)
        if turn % 2 == 0 or large:
            yield Case(area, f"bench --prompts, {label}", bench("--prompts", PROMPTS), ANY, _file(content), slow=slow)
    for label, put in ODD_FILES.items():
        surroundings = Surroundings(cpu=40, wall=90)
        for command, words in (("distill guidance", guidance()), ("bench", bench("--prompts", PROMPTS)),
                               ("calibrate", _calibrate(PROMPTS))):  # fmt: skip
            yield Case(area, f"{command}, {label}", words, (1, 2), _odd(put), surroundings=surroundings)


def _calibrate(path: At) -> tuple[object, ...]:
    from .common import GUIDE

    return (
        "calibrate", "--base", BASE, "--guide", GUIDE, "--prompts", path, "--images", 2, "--batch", 2, "--steps", 2,
        "--probes", 0, "--out", HERE / "record.json",
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases."""
    yield from _prompts()
    yield from _prompt_files()
