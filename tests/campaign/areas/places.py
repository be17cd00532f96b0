"""Places that cannot be written to, full disks, other users' files, and existing files at the output path."""

from __future__ import annotations

import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator

from ..case import BASE, BASE2, ENGINES, GUIDE, GUIDED, HERE, PLAIN, At, Case, Outcome, Place, Surroundings
from ..process import unprivileged
from .common import ANY, PROMPTS, bench, build, copy, guidance, plug, sample, share, steps, visualize, with_prompts

WHERE = HERE / "where"
FROM_FOLDER = Surroundings(cwd=HERE / "folder")


def _scene(place: Place) -> None:
    """Files, folders and links that a result must not replace."""
    (place.here / "folder").mkdir()
    (place.here / "folder/precious.txt").write_text("mine")
    (place.here / "precious.file").write_text("mine")
    (place.here / "loop").symlink_to(place.here / "loop")
    (place.here / "nowhere").symlink_to(place.here / "gone/away")
    try:  # a separate null device, so that the system's is not at risk
        os.mknod(place.here / "device", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except OSError:
        os.mkfifo(place.here / "device")


OUTS: dict[str, object] = {
    "a file": HERE / "precious.file",
    "below a file": HERE / "precious.file/x",
    "nothing": "",
    "the root": "/",
    "below /proc": "/proc/x",
    "a device": HERE / "device",
    "a loop of links": HERE / "loop",
    "below a loop": HERE / "loop/x",
    "a folder with other things": HERE / "folder",
    "a name of 300 letters": HERE / ("x" * 300),
    "a name with a line end": HERE / "a\nb",
    "the folder above": "..",
    "the folder itself": ".",
    "an option": "--force",
    "a link to nothing": HERE / "nowhere",
    "a path of 5,000 letters": HERE / ("x/" * 2500),
    "a name with an escape": HERE / "\x1b[2J",
    "an engine": GUIDED,
    "a blank name": HERE / " ",
    "a trailing slash": "new/",
    "below a file of another": "precious.txt/a/b",
    "a name with NUL's look": HERE / "a%00b",
}
#: Places where a valid command would run to its end; only quick commands are tested there.
VALID = {
    "a name with a line end",
    "the folder above",
    "the folder itself",
    "an option",
    "a blank name",
    "a trailing slash",
    "a link to nothing",
    "a name with an escape",
    "a name with NUL's look",
}
SHORT_BENCH = ("--prompts", PROMPTS)


def _outs() -> Iterator[Case]:
    area = "places"
    for turn, (label, out) in enumerate(OUTS.items()):
        commands: dict[str, tuple[object, ...]] = {
            "sample --out": sample(out=out),
            "plug --out": plug(out=out),
            "sample --grid": sample(GUIDED, "--grid", out),
            "plug --force --out": plug(GUIDED, "--force", out=out),
            "bench --json": bench("--json", out, *SHORT_BENCH),
            "visualize --out": visualize(out=out),
        }
        if label not in VALID:
            commands |= {
                "build --out": build(out=out),
                "distill guidance --out": guidance(out=out),
                "distill steps --out": steps(out=out),
                "bench --html": bench("--html", out, *SHORT_BENCH),
                "bench --grid": bench("--grid", out, *SHORT_BENCH),
                "calibrate --out": _calibrate(out),
                "bench --work": bench("--work", out, *SHORT_BENCH),
                "build --force --out": build("--force", out=out),
            }
        chosen = {"sample --out": commands["sample --out"], "plug --out": commands["plug --out"]}
        for command, words in {**chosen, **share(commands, turn, 4)}.items():
            if (label, command) in UNSAFE or (label == "the root" and "--force" in command):
                continue
            slow = label in VALID or command.startswith(("bench", "visualize", "calibrate", "distill"))
            yield Case(area, f"{command} {label}", words, ANY, with_prompts(_scene), _device_stays,
                       surroundings=FROM_FOLDER, slow=slow)  # fmt: skip


def _device_stays(outcome: Outcome, place: Place) -> str | None:
    mode = (place.here / "device").lstat().st_mode
    return None if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode) else "a device was replaced"


#: Skipped, because all cases share the fixtures: none may replace an engine in them, as ``--force`` would.
UNSAFE = {("an engine", "plug --force --out"), ("an engine", "build --force --out"), ("an engine", "bench --json"),
          ("the root", "sample --out"),  # root has permission to write there
          ("an engine", "sample --out"), ("an engine", "visualize --out"), ("an engine", "bench --work")}  # fmt: skip


def _calibrate(out: object) -> tuple[object, ...]:
    return (
        "calibrate",
        "--base",
        BASE,
        "--guide",
        GUIDE,
        "--prompts",
        PROMPTS,
        "--images",
        2,
        "--batch",
        2,
        "--steps",
        2,
        "--probes",
        0,
        "--out",
        out,
    )


def _look_alike(*names: str) -> Callable[[Place], None]:
    """A user's folder with files that a bundle could contain, and one that it could not."""

    def prepare(place: Place) -> None:
        folder = place.path(WHERE)
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}")
        (folder / "precious.bin").write_text("mine")

    return prepare


def _engine_with(name: str) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        path = copy(place, PLAIN, WHERE) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")

    return prepare


def _linked(place: Place) -> None:
    copy(place, PLAIN, HERE / "engine")
    place.path(WHERE).symlink_to(place.here / "engine")


def _link_stays(outcome: Outcome, place: Place) -> str | None:
    return None if outcome.code or place.path(WHERE).is_symlink() else "the link was replaced by a folder"


def _standing() -> Iterator[Case]:
    """The command must not delete existing files at ``--out``."""
    area = "places"
    for names in (("tokenizer.json",), ("manifest.json",), ("golden.npz",), ("weights.json", "tokenizer.json"),
                  ("unet.onnx",), ("config.json", "tokenizer.json"), ()):  # fmt: skip
        for command, words in (("build", build("--force", out=WHERE)), ("plug", plug(GUIDED, "--force", out=WHERE))):
            yield Case(area, f"{command} --force over somebody's {', '.join(names) or 'folder'}", words, (1, 2),
                       _look_alike(*names))  # fmt: skip
    for name in ("precious.txt", "precious/notes.txt", ".precious"):
        yield Case(
            area,
            f"plug --force over an engine with {name}",
            plug(GUIDED, "--force", out=WHERE),
            ANY,
            _engine_with(name),
        )
        yield Case(
            area,
            f"build --force over an engine with {name}",
            build("--force", out=WHERE),
            ANY,
            _engine_with(name),
            slow=True,
        )
    yield Case(
        area, "plug --force over a link to an engine", plug(GUIDED, "--force", out=WHERE), ANY, _linked, _link_stays
    )
    yield Case(
        area, "plug --out the engine itself", plug(HERE / "engine", "--force", out=HERE / "engine"), ANY, _linked
    )
    yield Case(area, "plug --out the engine by a link", plug(HERE / "engine", "--force", out=WHERE), ANY, _linked)
    yield Case(area, "sample into a folder with an image of that name", sample(), (0,), _taken, _all_there)


def _taken(place: Place) -> None:
    folder = place.path(HERE / "out")
    folder.mkdir()
    for name in ("a-cat-0.png", "precious.png"):
        (folder / name).write_text("mine")


def _all_there(outcome: Outcome, place: Place) -> str | None:
    old = (place.here / "out/a-cat-0.png").read_bytes() == b"mine"
    return (
        None if old and len(list((place.here / "out").glob("*.png"))) == 3 else "an image was replaced or not written"
    )


USER = Surroundings(before=unprivileged)


def _read_only(place: Place) -> None:
    folder = place.path(WHERE)
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    folder.chmod(0o555)


def _secret(*names: str) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        folder = copy(place, GUIDED, WHERE)
        for name in names:
            (folder / name).chmod(0)

    return prepare


def _unreadable(path: At) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        place.path(path).write_text("a cat\n")
        place.path(path).chmod(0)

    return prepare


def _secret_folder(of: At, part: str) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        (copy(place, of, WHERE) / part).chmod(0)

    return prepare


def _other_user() -> Iterator[Case]:
    area = "other user"
    below = WHERE / "x"
    for command, words in {
        "sample": sample(out=below),
        "sample, a folder that is there": sample(out=WHERE),
        "sample --grid": sample(GUIDED, "--grid", WHERE / "g.png"),
        "build": build(out=below),
        "plug": plug(out=below),
        "distill guidance": guidance(out=below),
        "distill guidance, a folder that is there": guidance(out=WHERE),
        "distill guidance --states-dir": guidance("--states-dir", below),
        "distill steps": steps(out=below),
        "bench --json": bench("--json", WHERE / "x.json", *SHORT_BENCH),
        "bench --work": bench("--work", below, *SHORT_BENCH),
        "bench --html": bench("--html", WHERE / "x.html", *SHORT_BENCH),
        "bench --grid": bench("--grid", WHERE / "x.png", *SHORT_BENCH),
        "visualize": visualize(out=below),
        "visualize, a folder that is there": visualize(out=WHERE),
        "calibrate": _calibrate(WHERE / "c.json"),
    }.items():
        yield Case(
            area, f"{command} into a read-only folder", words, (1, 2), with_prompts(_read_only), surroundings=USER
        )
    on_engine = {
        "sample": sample(WHERE), "verify": ("verify", WHERE), "inspect": ("inspect", WHERE), "plug": plug(WHERE),
        "bench": bench(engines=(WHERE,), only="cost"),
    }  # fmt: skip
    files = ("unet.onnx", "unet.onnx.data", "manifest.json", "tokenizer.json", "golden.npz", "weights.json")
    for turn, name in enumerate(files):
        for command, words in share(on_engine, turn, 3).items():
            yield Case(area, f"{command}, an unreadable {name}", words, ANY, _secret(name), surroundings=USER,
                       slow=command == "bench")  # fmt: skip
    for label, words in {
        "distill guidance --prompts": guidance(),
        "bench --prompts": bench(*SHORT_BENCH),
        "calibrate --prompts": _calibrate(HERE / "r"),
    }.items():
        yield Case(area, f"{label} unreadable", words, (1, 2), _unreadable(PROMPTS), surroundings=USER)
    image = HERE / "a.png"
    yield Case(
        area, "sample --init unreadable", sample(PLAIN, "--init", image), (1, 2), _unreadable(image), surroundings=USER
    )
    for part in ("unet", "vae", "text_encoder", "scheduler", "unet/config.json", "text_encoder/model.safetensors",
                 "scheduler/scheduler_config.json", "model_index.json", "tokenizer"):  # fmt: skip
        prepare = _secret_folder(BASE2, part)
        for command, words in share({"plug": plug(base=WHERE), "build": build(base=WHERE)}, len(part), 1).items():
            yield Case(area, f"{command}, an unreadable {part}", words, ANY, prepare, surroundings=USER,
                       slow=command == "build")  # fmt: skip
    yield Case(area, "list, an unreadable folder of engines", ("list",), ANY, _secret_folder(ENGINES, "."),
               surroundings=Surroundings(before=unprivileged, environment={"PNP_TRT_ENGINES": "where"}))  # fmt: skip


def _ignore_signal(place: Place) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _full(size: int) -> Surroundings:
    """Surroundings in which no file may exceed ``size`` bytes."""
    return Surroundings(before=_ignore_signal, limits=((resource.RLIMIT_FSIZE, size),))


def _no_half(outcome: Outcome, place: Place) -> str | None:
    """After a failure, no incomplete result may have the name of a complete one."""
    from PIL import Image

    if outcome.code == 0:
        return None
    for path in (*place.here.rglob("*.json"), *place.here.rglob("*.png"), *place.here.rglob("*.safetensors")):
        if path.stat().st_size == 0:
            return f"an empty {path.name} is left"
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
    return None


def _full_disk() -> Iterator[Case]:
    area = "full disk"
    commands: dict[str, tuple[tuple[object, ...], tuple[int, ...]]] = {
        "build": (build(), (1000, 100_000, 4_000_000)),
        "plug": (plug(), (1000, 100_000, 4_000_000)),
        "distill guidance": (guidance(), (100, 2000, 10_000, 40_000, 100_000, 200_000)),
        "distill steps": (steps(), (100, 2000, 10_000, 40_000, 100_000, 200_000)),
        "sample -n 5": (sample(GUIDED, "-n", 5), (10, 100, 500, 1000)),
        "sample --metadata json --grid": (
            sample(GUIDED, "--metadata", "json", "--grid", HERE / "g.png"),
            (50, 300, 1500, 4000),
        ),
        "sample webp": (sample(GUIDED, "--format", "webp"), (10, 200)),
        "sample jpeg": (sample(GUIDED, "--format", "jpeg"), (10, 200)),
        "bench": (
            bench("--json", HERE / "x.json", "--html", HERE / "x.html", "--grid", HERE / "x.png", *SHORT_BENCH),
            (100, 3000, 20_000, 60_000),
        ),
        "visualize": (visualize(), (100, 20_000)),
        "calibrate": (_calibrate(HERE / "c.json"), (100, 3000)),
        "compare": (("compare", HERE / "a.json", HERE / "a.json", "--json", HERE / "c.json"), (10,)),
    }
    for command, (words, sizes) in commands.items():
        for size in sizes:
            yield Case(
                area,
                f"{command}, files of {size:,} bytes",
                words,
                ANY,
                with_prompts(),
                _no_half,
                disk=True,
                surroundings=_full(size),
                slow=not command.startswith(("sample", "plug", "compare")),
            )


def cases() -> Iterator[Case]:
    """All cases."""
    yield from _outs()
    yield from _standing()
    yield from _other_user()
    yield from _full_disk()
