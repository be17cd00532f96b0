"""Commands killed at random moments and at every file change; a rerun must reach the same final state."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..case import GUIDED, HERE, PLAIN, Case, Outcome, Place, Surroundings, litter
from ..process import Kill, run
from .common import (
    OUT,
    PROMPTS,
    bench,
    build,
    copy,
    files_of,
    guidance,
    manifest_of,
    plug,
    prompts,
    sample,
    steps,
    without,
)

RESULTS = HERE / "out.json"
LIMITS = Surroundings(cpu=300, wall=1200)


@dataclass(frozen=True)
class Command:
    """A command that is killed.

    Attributes:
        end: the final state of its output, as a value that can be compared between runs.
        kills: numbers of kills at random moments, at file changes, and by SIGINT and SIGTERM.
    """

    words: tuple[object, ...]
    end: Callable[[Place], Any]
    kills: tuple[int, int, int]
    before: Callable[[Place], object] = prompts


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _bundle(place: Place) -> Any:
    """Return the digests of a complete bundle, or None if there is no bundle."""
    folder = place.path(OUT)
    if not folder.exists():
        return None
    listed = manifest_of(folder)["files"]
    assert listed == files_of(folder), "half a bundle"
    return {name: e["sha256"] for name, e in listed.items()}


def _guide(place: Place) -> Any:
    folder = place.path(OUT)
    held_out = json.loads((folder / "distill.json").read_text())["held_out"]
    return _digest(folder / "diffusion_pytorch_model.safetensors"), held_out


def _halvings(place: Place) -> Any:
    folder = place.path(OUT) / "steps-2"
    held_out = json.loads((folder / "distill.json").read_text())["held_out"]
    return _digest(folder / "diffusion_pytorch_model.safetensors"), held_out


def _fidelity(place: Place) -> Any:
    return _timeless(json.loads(place.path(RESULTS).read_text())["fidelity"])


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if "seconds" not in k and k != "ms"}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def _images(place: Place) -> Any:
    """Check that every image is complete; ``sample`` does not resume, so an image cut off by a kill stays."""
    from PIL import Image

    for path in place.path(OUT).glob("*.png"):
        with Image.open(path) as image:
            image.load()
    for path in place.path(OUT).glob(".*.partial-*"):
        path.unlink()
    return []


def _standing(place: Place) -> None:
    """Put a bundle at ``--out``."""
    copy(place, PLAIN, OUT)


LONG = (*without(guidance("--checkpoint-every", 3, "--resume"), "--steps"), "--steps", 12)
COMMANDS: dict[str, Command] = {
    "plug": Command(plug(GUIDED, "--force"), _bundle, (10, 8, 2), lambda place: None),
    "plug over an engine": Command(plug(GUIDED, "--force"), _bundle, (10, 8, 2), _standing),
    "build": Command(build("--force"), _bundle, (3, 2, 1), lambda place: None),
    "build over an engine": Command(build("--force"), _bundle, (3, 2, 1), _standing),
    "distill guidance": Command(LONG, _guide, (10, 10, 2)),
    "distill steps": Command(
        (*without(steps("--resume", "--checkpoint-every", 2), "--steps"), "--steps", 6), _halvings, (10, 10, 2)
    ),
    "bench": Command(bench("--json", RESULTS, "--prompts", PROMPTS, "--resume"), _fidelity, (10, 10, 2)),
    "sample": Command(sample(GUIDED, "-n", 6), _images, (10, 8, 2)),
}
OLD = {"plug over an engine", "build over an engine"}


def _reference(name: str, place: Place) -> tuple[float, Any, int]:
    """CPU seconds, final state and number of file changes of an undisturbed run, which happens once per campaign."""
    from filelock import FileLock

    command = COMMANDS[name]
    record = place.fixtures.parent / "cache" / f"end-{name.replace(' ', '-')}.json"
    with FileLock(f"{record}.lock"):
        if not record.exists():
            command.before(place)
            outcome = run(place.words(command.words), place, LIMITS)
            assert outcome.code == 0, outcome.err[-500:]
            record.write_text(json.dumps([outcome.cpu, command.end(place), len(outcome.of("write"))]))
            _clear(place)
    cpu, end, changes = json.loads(record.read_text())
    return cpu, end, changes


def _clear(place: Place) -> None:
    for path in place.here.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _killed(name: str, moment: Callable[[float, int], Kill]) -> Callable[[Place], tuple[Outcome, str | None]]:
    """Kill the command once, check the files, and run it again."""

    def scenario(place: Place) -> tuple[Outcome, str | None]:
        command = COMMANDS[name]
        cpu, end, changes = _reference(name, place)
        command.before(place)
        kill = moment(cpu, changes)
        first = run(place.words(command.words), place, LIMITS, kill)
        if fault := _after_kill(name, first, kill, place):
            return first, fault
        second = run(place.words(command.words), place, LIMITS)
        return second, _after_rerun(name, second, json.loads(json.dumps(end)), place)

    return scenario


def _after_kill(name: str, outcome: Outcome, kill: Kill, place: Place) -> str | None:
    """Check that a bundle is complete or absent, and that handled signals cause no traceback."""
    right = {signal.SIGKILL: (-9, 0), signal.SIGINT: (130, 0), signal.SIGTERM: (143, -15, 0)}[
        signal.Signals(kill.signal)
    ]
    if outcome.code not in right or "Traceback" in outcome.said:
        return f"{signal.Signals(kill.signal).name} ended it with {outcome.code}: {outcome.err[-200:]}"
    if kill.signal != signal.SIGKILL and (left := litter(place.here)):
        return f"{signal.Signals(kill.signal).name} left {left[0]}"
    if COMMANDS[name].end is _bundle:
        standing = _bundle(place)  # raises if the bundle is incomplete
        if standing is None and name in OLD:
            return "the old bundle is gone"
    return None


def _after_rerun(name: str, outcome: Outcome, end: Any, place: Place) -> str | None:
    if outcome.code != 0:
        return f"the rerun was refused: {outcome.err.strip()[-200:]}"
    reached = json.loads(json.dumps(COMMANDS[name].end(place)))
    if left := litter(place.here):
        return f"left behind: {left[0]}"
    return None if reached == end else "the rerun reached another end"


def _draw(name: str, number: int) -> random.Random:
    """Return a separate generator for each case, independent of the other cases."""
    return random.Random(zlib.crc32(f"{name} {number}".encode()))


def _random_moment(name: str, number: int) -> Callable[[float, int], Kill]:
    return lambda cpu, changes: Kill(signal.SIGKILL, cpu=_draw(name, number).uniform(0, 0.95) * cpu)


def _at_change(name: str, number: int, of: int) -> Callable[[float, int], Kill]:
    """Space the kills evenly over all file changes, so that commands with many changes are not killed only early."""
    return lambda cpu, changes: Kill(operation=1 + number * max(changes - 1, 1) // max(of - 1, 1))


def _by_signal(sig: signal.Signals, share: float) -> Callable[[float, int], Kill]:
    return lambda cpu, changes: Kill(sig, cpu=share * cpu)


def cases() -> Iterator[Case]:
    """All cases."""
    for name, command in COMMANDS.items():
        moments, changes, signals = command.kills
        for n in range(moments):
            yield Case(
                "kills",
                f"{name}, SIGKILL at random moment {n}",
                command.words,
                (0, -9),
                scenario=_killed(name, _random_moment(name, n)),
                slow=name != "sample",
            )
        for n in range(changes):
            yield Case(
                "crash points",
                f"{name}, SIGKILL at file change {n} of {changes}",
                command.words,
                (0, -9),
                scenario=_killed(name, _at_change(name, n, changes)),
                slow=name != "sample",
            )
        for n in range(signals):
            for sig in (signal.SIGINT, signal.SIGTERM):
                share = (0.3, 0.7)[n]
                yield Case(
                    "signals",
                    f"{name}, {sig.name} at {share:.0%}",
                    command.words,
                    (0, 130, 143, -15),
                    scenario=_killed(name, _by_signal(sig, share)),
                    slow=name != "sample",
                )
