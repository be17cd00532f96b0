"""Closed and full streams, locales, homes, variables, umasks, deleted folders, clocks, low memory, no network."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator

from ..case import BASE2, GUIDED, HERE, PLAIN, Case, Outcome, Place, Surroundings
from ..process import unprivileged
from .common import ANY, OUT, PROMPTS, bench, build, guidance, plug, sample, share, visualize, with_prompts

AREA = "surroundings"
EVERY: dict[str, tuple[object, ...]] = {
    "sample": sample(),
    "inspect": ("inspect", GUIDED),
    "inspect --json": ("inspect", GUIDED, "--json"),
    "list": ("list",),
    "list --json": ("list", "--json"),
    "doctor": ("doctor",),
    "verify": ("verify", GUIDED),
    "bench cost": ("bench", "--engine", PLAIN, "--engine", GUIDED, "--only", "cost"),
}


def _close(stream: int) -> Callable[[Place], None]:
    def close(place: Place) -> None:
        import sys

        os.close(stream)
        # as the interpreter does if a stream is closed before it starts
        setattr(sys, ("stdin", "stdout", "stderr")[stream], None)

    return close


def _full(place: Place) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def _broken(place: Place) -> None:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)


def _streams() -> Iterator[Case]:
    for command, words in EVERY.items():
        for stream, name in enumerate(("input", "output", "error")):
            yield Case(
                AREA,
                f"{command}, standard {name} closed",
                words,
                ANY,
                surroundings=Surroundings(before=_close(stream)),
                slow=command == "bench cost",
                check=_silence_is_right,
            )
        yield Case(
            AREA,
            f"{command}, standard output full",
            words,
            (1, 2, 120),
            surroundings=Surroundings(before=_full),
            slow=command == "bench cost",
            disk=True,
        )
        yield Case(
            "broken pipes",
            f"{command}, nobody reads",
            words,
            (0, 1, 2, 120, 141, -13),
            _nothing,
            _silence_is_right,
            surroundings=Surroundings(before=_broken),
        )
    many = ("sample", "a cat", "--engine", GUIDED, "--steps", 1, "-n", 12, "--out", OUT)
    yield Case("broken pipes", "sample -n 12: all images are written", many, (0, 1, 120, 141, -13), check=_twelve,
               surroundings=Surroundings(before=_broken, environment={"PYTHONUNBUFFERED": "1"}))  # fmt: skip


def _nothing(place: Place) -> None:
    return None


def _silence_is_right(outcome: Outcome, place: Place) -> str | None:
    return None


def _twelve(outcome: Outcome, place: Place) -> str | None:
    number = len(list(place.path(OUT).glob("*.png")))
    return None if number == 12 else f"{number} of 12 images were written"


VARIABLES: dict[str, dict[str, str | None]] = {
    "LANG=C": {"LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "Latin-1 streams": {"PYTHONIOENCODING": "latin-1"},
    "ASCII streams": {"PYTHONIOENCODING": "ascii:strict"},
    "NO_COLOR": {"NO_COLOR": "1"},
    "FORCE_COLOR": {"FORCE_COLOR": "1"},
    "COLUMNS=20": {"COLUMNS": "20"},
    "COLUMNS=0": {"COLUMNS": "0"},
    "COLUMNS=-1": {"COLUMNS": "-1"},
    "COLUMNS=x": {"COLUMNS": "x"},
    "TERM=dumb": {"TERM": "dumb"},
    "no HOME": {"HOME": None},
    "a HOME that is missing": {"HOME": "/nonexistent"},
    "a HOME that is a file": {"HOME": "/etc/passwd"},
    "a TMPDIR that is missing": {"TMPDIR": "/nonexistent"},
    "engines in a file": {"PNP_TRT_ENGINES": "/etc/passwd"},
    "engines nowhere": {"PNP_TRT_ENGINES": ""},
    "engines of a long name": {"PNP_TRT_ENGINES": "x" * 5000},
    "a cache that is a file": {"PNP_TRT_CACHE": "/etc/passwd"},
    "an empty PATH": {"PATH": ""},
    "no PATH": {"PATH": None},
    "PNP_TRT_DEBUG empty": {"PNP_TRT_DEBUG": ""},
    "OMP_NUM_THREADS=x": {"OMP_NUM_THREADS": "x"},
    "HF_HOME is a file": {"HF_HOME": "/etc/passwd"},
    "PYTHONWARNINGS": {"PYTHONWARNINGS": "error::DeprecationWarning"},
}
#: Read when the interpreter starts, so a fork does not apply them.
AT_START = (
    "LANG=C",
    "Latin-1 streams",
    "ASCII streams",
    "PYTHONWARNINGS",
    "no HOME",
    "HF_HOME is a file",
    "OMP_NUM_THREADS=x",
)


def _variables() -> Iterator[Case]:
    for turn, (label, environment) in enumerate(VARIABLES.items()):
        for command, words in share(EVERY, turn, 2).items():
            fresh = label in AT_START and command in ("sample", "inspect", "list", "bench cost")
            text = sample(prompt="ein Käse 一") if command == "sample" else words
            colour = label == "FORCE_COLOR"
            yield Case(AREA, f"{command}, {label}", text, ANY,
                       surroundings=Surroundings(environment=environment, fresh=fresh, terminal=colour),
                       slow=fresh or command == "bench cost")  # fmt: skip


def _umask(mask: int) -> Callable[[Place], None]:
    return lambda place: _ignore(os.umask(mask))


def _ignore(_: object) -> None:
    return None


def _gone(place: Place) -> None:
    folder = place.here / "gone"
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()


def _backwards(place: Place) -> None:
    moment = 2e9

    def clock() -> float:
        nonlocal moment
        moment -= 1000.0
        return moment

    time.time = clock  # type: ignore[assignment]


def _still(place: Place) -> None:
    time.time = lambda: 0.0  # type: ignore[assignment]


def _readable(outcome: Outcome, place: Place) -> str | None:
    """Fail unless file modes follow the umask: 022 lets everybody read."""
    closed = [
        p
        for p in place.path(OUT).rglob("*")
        if p.is_file() and not p.name.endswith(".lock") and not p.stat().st_mode & 0o044
    ]
    return f"{closed[0].name} can be read by its owner alone" if closed else None


def _processes() -> Iterator[Case]:
    more = {**EVERY, "plug": plug()}
    for mask in (0o077, 0o777):
        for command, words in more.items():
            yield Case(AREA, f"{command}, umask {mask:03o}", words, ANY, surroundings=Surroundings(before=_umask(mask)),
                       slow=command in ("bench cost", "plug"))  # fmt: skip
    for command, words in {"plug": plug(), "sample": sample(GUIDED, "--metadata", "json"), "guidance": guidance(),
                           "visualize": visualize()}.items():  # fmt: skip
        yield Case(AREA, f"{command}, umask 022: others can read", words, (0,), with_prompts(), _readable,
                   surroundings=Surroundings(before=_umask(0o022)), slow=command != "sample")  # fmt: skip
    for command, words in more.items():
        yield Case(AREA, f"{command}, the current folder is gone", words, ANY, surroundings=Surroundings(before=_gone),
                   slow=command in ("bench cost", "plug"))  # fmt: skip
    yield Case(
        AREA,
        "sample --out relative, the current folder is gone",
        sample(out="here"),
        surroundings=Surroundings(before=_gone),
    )
    results = bench("--json", HERE / "x.json", "--prompts", PROMPTS)
    for label, clock in (("runs backwards", _backwards), ("stands still", _still)):
        for command, words in {**more, "bench": results, "guidance": guidance()}.items():
            yield Case(
                "clock",
                f"{command}, time {label}",
                words,
                (0,),
                with_prompts(),
                surroundings=Surroundings(before=clock),
                slow=command in ("bench cost", "bench", "plug", "guidance"),
            )


def _limits() -> Iterator[Case]:
    for number in (8, 16, 32, 64):
        limits = ((resource.RLIMIT_NOFILE, number),)
        for command, words in (("sample", sample()), ("plug", plug()), ("list", ("list",))):
            yield Case(
                "limits",
                f"{command}, {number} descriptors",
                words,
                ANY,
                surroundings=Surroundings(limits=limits),
                slow=command == "plug",
            )
    for command, words in (
        ("sample", sample()),
        ("sample -n 1000", sample(GUIDED, "-n", 1000)),
        ("plug", plug()),
        ("inspect", EVERY["inspect"]),
    ):
        for mebibytes in (16, 64, 256, 1024):
            yield Case("limits", f"{command}, {mebibytes} MiB more", words, (*ANY, -6, -11), slow=command != "inspect",
                       surroundings=Surroundings(before=_memory(mebibytes)))  # fmt: skip
    for command, words in (("list", ("list",)), ("sample", sample())):
        yield Case("limits", f"{command}, no processes", words, ANY,
                   surroundings=Surroundings(before=unprivileged, limits=((resource.RLIMIT_NPROC, 1),)))  # fmt: skip
    yield Case(
        "limits",
        "sample, a small stack",
        sample(),
        ANY,
        surroundings=Surroundings(limits=((resource.RLIMIT_STACK, 64 << 10),)),
    )


def _memory(mebibytes: int) -> Callable[[Place], None]:
    """Limit the address space to that much more than the process already uses."""

    def limit(place: Place) -> None:
        from pathlib import Path

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        total = pages * resource.getpagesize() + (mebibytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (total, total))

    return limit


def _offline(place: Place) -> None:
    """Enter an empty network namespace, if the system permits it."""
    if hasattr(os, "unshare"):
        try:
            os.unshare(os.CLONE_NEWNET)
        except OSError:
            return


def _network() -> Iterator[Case]:
    """New interpreters: no name is looked up, and no command needs the network."""
    offline = Surroundings(fresh=True, before=_offline, cpu=240)
    for command, words in {
        "sample": sample(),
        "inspect": ("inspect", GUIDED),
        "list": ("list",),
        "verify": ("verify", GUIDED, "--layers"),
        "doctor": ("doctor",),
        "plug": plug(),
        "plug --lora": plug(GUIDED, "--lora", "nope"),
        "build": build(),
        "bench": bench("--prompts", PROMPTS),
        "bench cost": bench(only="cost"),
        "visualize": visualize(),
        "bench latency": bench("--rounds", 2, "--batch", 1, only="latency"),
        "distill guidance": guidance(),
        "--help": ("--help",),
        "build --base BASE2": build(base=BASE2),
        "compare": ("compare", "a", "b"),
    }.items():
        allowed = (2,) if command in ("plug --lora", "compare") else ANY if command == "doctor" else (0,)
        yield Case(
            "network",
            f"{command} without a network",
            words,
            allowed,
            with_prompts(),
            surroundings=offline,
            slow=command not in ("--help", "list"),
        )
    for label, base in {"a hub id": "someone/some-model", "a hub id with a dot": "someone/some-model-1.0"}.items():
        yield Case(
            "network",
            f"build --base {label} without a network",
            build(base=base),
            (1, 2),
            surroundings=offline,
            slow=True,
            network=True,
        )


def cases() -> Iterator[Case]:
    """All cases."""
    yield from _streams()
    yield from _variables()
    yield from _processes()
    yield from _limits()
    yield from _network()
