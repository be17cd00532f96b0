"""New runs in folders with the remains of killed, truncated and foreign runs; several processes in parallel."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..case import BASE, GUIDE, GUIDED, HERE, PLAIN, Case, Outcome, Place
from ..process import run
from .common import ANY, OUT, PROMPTS, bench, copy, guidance, plug, prompts, sample, steps, without

RUN = (*without(guidance("--checkpoint-every", 2, "--resume"), "--steps"), "--steps", 4)
RESULTS = HERE / "x.json"
BENCH = bench("--json", RESULTS, "--prompts", PROMPTS, "--resume")


def _finished(place: Place) -> Path:
    """Return the folder of a finished ``RUN``, which is run only once."""
    return _once(place, "guidance", RUN, place.path(OUT))


def _once(place: Place, name: str, words: tuple[object, ...], result: Path) -> Path:
    """Return a command's result; the first case runs the command, later ones copy its result."""
    from filelock import FileLock

    prompts(place)
    store = place.fixtures.parent / "cache" / name
    with FileLock(f"{store}.lock"):
        if not store.exists():
            outcome = run(place.words(words), place)
            assert outcome.code == 0, outcome.err[-500:]
            shutil.move(result, store)
    return Path(shutil.copytree(store, result) if store.is_dir() else shutil.copy(store, result))


def _last(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[-1]


def _checkpoint(metadata: dict[str, str] | None, name: str = "step-0000005.safetensors") -> Callable[[Path], object]:
    def put(folder: Path) -> None:
        from safetensors.numpy import save_file

        (folder / "checkpoints").mkdir(exist_ok=True)
        save_file({"a": np.zeros(1, np.float32)}, folder / "checkpoints" / name, metadata)

    return put


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(data)


HARM: dict[str, Callable[[Path], object]] = {
    "nothing is wrong": lambda d: None,
    "the last checkpoint is cut": lambda d: _cut(_last(d, "checkpoints/*.safetensors")),
    "the last checkpoint is empty": lambda d: _last(d, "checkpoints/*.safetensors").write_bytes(b""),
    "all checkpoints are cut": lambda d: [_cut(p) for p in d.glob("checkpoints/*.safetensors")],
    "a bit of a checkpoint is flipped": lambda d: _flip(_last(d, "checkpoints/*.safetensors")),
    "a shard is cut": lambda d: [_cut(p) for p in d.glob("states/*.safetensors")],
    "a shard is missing": lambda d: _last(d, "states/*.safetensors").unlink(),
    "a bit of a shard is flipped": lambda d: [_flip(p) for p in d.glob("states/*.safetensors")],
    "run.json is cut": lambda d: (d / "run.json").write_text("{"),
    "run.json is a list": lambda d: (d / "run.json").write_text("[]"),
    "run.json is empty": lambda d: (d / "run.json").write_text(""),
    "run.json is null": lambda d: (d / "run.json").write_text("null"),
    "run.json is nested": lambda d: (d / "run.json").write_text("[" * 100_000),
    "run.json is binary": lambda d: (d / "run.json").write_bytes(b"\xff\0"),
    "run.json has no settings": lambda d: (d / "run.json").write_text('{"key": "x"}'),
    "run.json is missing": lambda d: (d / "run.json").unlink(),
    "run.json is a folder": lambda d: ((d / "run.json").unlink(), (d / "run.json").mkdir()),
    "states.json is cut": lambda d: (d / "states/states.json").write_text("{"),
    "states.json is a list": lambda d: (d / "states/states.json").write_text("[]"),
    "states.json is of text": lambda d: (d / "states/states.json").write_text(
        json.dumps(dict.fromkeys(json.loads((d / "states/states.json").read_text()), "x"))
    ),
    "states.json is missing": lambda d: (d / "states/states.json").unlink(),
    "a checkpoint of another name": lambda d: (d / "checkpoints/step-x.safetensors").write_bytes(b""),
    "a checkpoint beyond the end": lambda d: shutil.copy(
        _last(d, "checkpoints/*.safetensors"), d / "checkpoints/step-9999999.safetensors"
    ),
    "a checkpoint of another program": _checkpoint({"state": "{}"}),
    "a checkpoint without metadata": _checkpoint(None),
    "a checkpoint whose metadata is nested": _checkpoint({"state": "[" * 50_000}),
    "checkpoints are a file": lambda d: (
        shutil.rmtree(d / "checkpoints", ignore_errors=True),
        (d / "checkpoints").write_text("x"),
    ),
    "distill.json is cut": lambda d: (d / "distill.json").write_text("{"),
    "the guide is cut": lambda d: _cut(d / "diffusion_pytorch_model.safetensors"),
    "a separate file beside": lambda d: (d / "precious.txt").write_text("mine"),
    "a leaving of a kill": lambda d: (d / ".run.json.abcdefgh").write_text("{"),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _harmed(harm: Callable[[Path], object], again: bool) -> Callable[[Place], None]:
    """A damaged finished run; ``again`` removes its results, so that it continues from a checkpoint."""

    def prepare(place: Place) -> None:
        folder = _finished(place)
        if again:
            for name in ("distill.json", "diffusion_pytorch_model.safetensors", "config.json"):
                (folder / name).unlink(missing_ok=True)
        try:
            harm(folder)
        except (FileNotFoundError, IndexError) as e:
            raise AssertionError(f"the run has no such file: {e}") from e

    return prepare


FOLDERS: dict[str, Callable[[Path], object]] = {
    "nothing but a leaving of a kill": lambda d: (d / ".run.json.abcdefgh").write_text("{"),
    "an empty run.json": lambda d: (d / "run.json").write_text(""),
    "somebody's file": lambda d: (d / "precious.txt").write_text("mine"),
    "a hidden file": lambda d: (d / ".precious").write_text("mine"),
    "another run": lambda d: (d / "run.json").write_text('{"key": "x", "settings": {"base": "other"}}'),
    "an escape in another run": lambda d: (d / "run.json").write_text(
        '{"key": "x", "settings": {"base": "\\u001b[2J"}}'
    ),
}


def _folder(put: Callable[[Path], object], at: str = "out") -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        prompts(place)
        (place.here / at).mkdir()
        put(place.here / at)

    return prepare


def _runs() -> Iterator[Case]:
    area = "leavings"
    for label, harm in HARM.items():
        again = "guide" not in label and "distill.json" not in label and "nothing" not in label
        yield Case(
            area,
            f"distill guidance --resume, {label}",
            RUN,
            (0,) if "nothing" in label else ANY,
            _harmed(harm, again),
            slow=label.startswith(("a shard", "nothing", "the guide")),
        )
    for label, put in FOLDERS.items():
        left = (0,) if "leaving" in label else ANY if "run.json" in label else (2,)
        yield Case(area, f"distill guidance --resume over {label}", RUN, left, _folder(put), slow=0 in left)
        yield Case(area, f"distill steps --resume over {label}", steps("--resume"), left, _folder(put), slow=0 in left)
        yield Case(area, f"bench --resume over {label}", BENCH, left, _folder(put, "x.json.partial"), slow=0 in left)
    for label, text in {
        "cut": b"{",
        "a list": b"[]",
        "null": b"null",
        "empty": b"",
        "nested": b"[" * 100_000,
        "binary": b"\0\xff",
        "of another schema": b'{"schema": "x"}',
        "of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
        "of NaN": b'{"schema": NaN}',
    }.items():
        for command, words in (
            ("compare", ("compare", RESULTS, RESULTS)),
            ("bench --compare", bench("--compare", RESULTS)),
            (
                "build --calibration",
                (
                    "build",
                    "--base",
                    BASE,
                    "--guide",
                    "none",
                    "--precision",
                    "int8",
                    "--calibration",
                    RESULTS,
                    "--out",
                    OUT,
                ),
            ),
        ):
            yield Case(area, f"{command}, a file that is {label}", words, (2,), _results(text))
        yield Case(
            area, f"bench --suite, a file that is {label}", bench("--suite", HERE / "s.toml"), (2,), _suite(text)
        )


def _results(text: bytes) -> Callable[[Place], None]:
    return lambda place: _ignore(place.path(RESULTS).write_bytes(text))


def _suite(text: bytes) -> Callable[[Place], None]:
    return lambda place: _ignore((place.here / "s.toml").write_bytes(text))


def _ignore(_: object) -> None:
    return None


def _at_once(words: list[tuple[object, ...]], allowed: tuple[int, ...], end: Callable[[Place], str | None]) -> Callable:
    """Return a scenario of several commands at the same time."""

    def scenario(place: Place) -> tuple[Outcome, str | None]:
        prompts(place)
        children = [_start(w, place) for w in words]
        outcomes = [_result(pid, place) for pid in children]
        worst = next((o for o in outcomes if o.code not in allowed or "unexpected" in o.err), outcomes[0])
        return worst, end(place)

    return scenario


def _start(words: tuple[object, ...], place: Place) -> int:
    """Start a process that runs a command and writes the outcome to a file named after its process id."""
    child = os.fork()
    if child == 0:
        try:
            outcome = run(place.words(words), place)
            text = json.dumps([outcome.code, outcome.out, outcome.err, outcome.cpu])
            (place.here / f"outcome.{os.getpid()}").write_text(text)
        finally:
            os._exit(0)
    return child


def _result(child: int, place: Place) -> Outcome:
    os.waitpid(child, 0)
    path = place.here / f"outcome.{child}"
    code, out, err, cpu = json.loads(path.read_text())
    path.unlink()
    return Outcome(code, out, err, cpu)


def _whole(place: Place) -> str | None:
    """Fail unless every file of the bundle at ``--out`` has the digest in the manifest."""
    from .common import files_of, manifest_of

    folder = place.path(OUT)
    left = [p.name for p in place.here.glob(".out.*") if not p.name.endswith(".lock")]
    if left:
        return f"left behind: {left[0]}"
    return None if manifest_of(folder)["files"] == files_of(folder) else "the bundle is not whole"


def _twenty(place: Place) -> str | None:
    number = len(list(place.path(OUT).glob("*.png")))
    return None if number == 20 else f"{number} of 20 images were written"


def _json(place: Place) -> str | None:
    path = place.path(RESULTS)
    return None if not path.exists() or json.loads(path.read_text()) else "no results"


def _none(place: Place) -> str | None:
    return None


def _together() -> Iterator[Case]:
    area = "at once"
    other = plug(base=BASE)
    for label, words, allowed, end in (
        ("four plugs of one fine-tune", [plug()] * 4, (0,), _whole),
        ("two plugs of different fine-tunes", [plug(), other], (0, 2), _whole),
        ("two plugs with --force", [(*plug(), "--force"), (*other, "--force")], (0,), _whole),
        ("four samples into one folder", [sample(GUIDED, "-n", 5)] * 4, (0,), _twenty),
        ("four samples with one grid", [sample(GUIDED, "--grid", HERE / "g.png")] * 4, (0, 2), _none),
        ("three benches with one --json", [bench("--json", RESULTS, "--prompts", PROMPTS)] * 3, ANY, _json),
        ("two distillations with one --out", [guidance(), guidance("--resume")], ANY, _none),
        ("two distillations of steps", [steps(), steps("--resume")], ANY, _none),
        ("two visualizations", [("visualize", "a", "--base", BASE, "--guide", GUIDE, "--steps", 2, "--guidance", 2,
                                 "--out", OUT)] * 2, (0,), _none),
    ):  # fmt: skip
        yield Case(
            area,
            label,
            words[0],
            allowed,
            scenario=_at_once(words, allowed, end),
            slow=label != "four samples into one folder",
        )
    yield Case(area, "samples while the engine is replaced", sample(HERE / "live"), ANY, scenario=_replaced, slow=True)


def _replaced(place: Place) -> tuple[Outcome, str | None]:
    """Replace the engine repeatedly while ``sample`` runs: each run must use a complete engine or report an error."""
    copy(place, GUIDED, HERE / "live")
    swapper = os.fork()
    if swapper == 0:
        _swap(place)
    outcomes = [run(place.words(sample(HERE / "live")), place) for _ in range(8)]
    os.kill(swapper, 9)
    os.waitpid(swapper, 0)
    for path in place.here.glob(".live.*"):  # left by the swapper, not by the command
        shutil.rmtree(path, ignore_errors=True)
    return next((o for o in outcomes if o.code not in ANY or "unexpected" in o.err), outcomes[-1]), None


def _swap(place: Place) -> None:
    from pnp_trt.bundle.store import lock, whole_folder

    live, number = place.here / "live", 0
    while True:
        with lock(live), whole_folder(live) as work:
            shutil.copytree(place.path((GUIDED, PLAIN)[number % 2]), work, dirs_exist_ok=True)
        number += 1


def cases() -> Iterator[Case]:
    """All cases."""
    yield from _runs()
    yield from _together()
