"""Invalid weights: damaged safetensors of every kind, pickles, indices that lead elsewhere, special files."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..case import BASE, BASE2, GUIDE, HERE, At, Case, Outcome, Place, Surroundings
from .common import (
    ANY,
    GUIDED,
    bench,
    build,
    copy,
    packed,
    plug,
    share,
    steps,
    unpacked,
    visualize,
    with_prompts,
)  # fmt: skip

FILE = HERE / "given.safetensors"
MODEL, GUIDE_COPY = HERE / "model", HERE / "guide"
UNET = "unet/diffusion_pytorch_model.safetensors"
#: A way to corrupt a file: its bytes → its new bytes.
Spoil = Callable[[bytes], bytes]


def _first(header: dict[str, dict[str, object]]) -> str:
    return next(k for k in header if k != "__metadata__")


def _entry(**changes: object) -> Spoil:
    """Change the first tensor's entry, but not its bytes."""

    def spoil(good: bytes) -> bytes:
        header, body = unpacked(good)
        header[_first(header)].update(changes)
        return packed(header, body)

    return spoil


def _tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Spoil:
    """Change the tensors in a valid file."""

    def spoil(good: bytes) -> bytes:
        from safetensors.numpy import load, save

        tensors = {k: v.copy() for k, v in load(good).items()}
        change(tensors)
        return save(tensors)

    return spoil


def _set_first(make: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    def change(tensors: dict[str, np.ndarray]) -> None:
        name = next(iter(tensors))
        tensors[name] = make(tensors[name])

    return _tensors(change)


def _all(make: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    return _tensors(lambda tensors: tensors.update({k: make(v) for k, v in tensors.items()}))


def _one(value: float) -> Spoil:
    def put(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[0] = value
        return array

    return _set_first(put)


def _torch_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", payload())
        archive.writestr("archive/version", "3")
    return stream.getvalue()


class _Payload:
    """Creates the file UNPICKLED in the current folder when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch UNPICKLED",)


def payload() -> bytes:
    """A pickle that runs a command."""
    return pickle.dumps({"state_dict": _Payload()})


def unpickled(outcome: Outcome, place: Place) -> str | None:
    """Fail if the payload ran."""
    ran = [*place.here.rglob("UNPICKLED"), *(e for e in outcome.of("program") if "UNPICKLED" in e)]
    return "a pickle was run" if ran else None


BROKEN: dict[str, Spoil] = {
    "empty": lambda good: b"",
    "8 bytes": lambda good: b"\0" * 8,
    "cut in the header": lambda good: good[:100],
    "cut in the body": lambda good: good[:-100],
    "one byte short": lambda good: good[:-1],
    "with bytes behind": lambda good: good + b"x" * 64,
    "of a header of 2^63 bytes": lambda good: struct.pack("<Q", 2**63) + good[8:],
    "of a header of 99 MB": lambda good: struct.pack("<Q", 99 << 20) + b"{" * 1000,
    "of a header that is not JSON": lambda good: packed(b"x" * 64, unpacked(good)[1]),
    "of a header that is a list": lambda good: packed(b"[1,2]", unpacked(good)[1]),
    "of a header that is a number": lambda good: packed(b"1  ", unpacked(good)[1]),
    "of a header that is no UTF-8": lambda good: packed(b'{"\xff\xfe": 1}', unpacked(good)[1]),
    "of a deep header": lambda good: packed(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, unpacked(good)[1]),
    "of an entry that is a number": lambda good: packed({"a": 1}, b""),
    "of an entry without a type": lambda good: packed({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "of metadata that is a list": lambda good: packed({"__metadata__": [1]}, b""),
    "of no tensors": lambda good: packed({}, b""),
    "of overlapping tensors": _entry(data_offsets=[4, 8]),
    "of a tensor past the end": _entry(data_offsets=[0, 10**15]),
    "of a negative offset": _entry(data_offsets=[-4, 0]),
    "of a shape of 2^80": _entry(shape=[2**40, 2**40]),
    "of a negative shape": _entry(shape=[-1, -1]),
    "of a shape of text": _entry(shape="x"),
    "of another type": _entry(dtype="I32"),
    "of an unknown type": _entry(dtype="PICKLE"),
    "of int8": _set_first(lambda a: a.astype(np.int8)),
    "of bool": _set_first(lambda a: a.astype(np.bool_)),
    "of a NaN": _one(np.nan),
    "of an infinity": _one(np.inf),
    "of a tensor less": _tensors(lambda t: t.pop(next(iter(t)))),
    "of another shape": _set_first(lambda a: np.zeros(3, np.float32)),
    "of a scalar": _set_first(lambda a: np.array(1, np.float32)),
    "of an empty tensor": _set_first(lambda a: np.zeros((0,), np.float32)),
    "of a pickle": lambda good: payload(),
    "of torch's zip": lambda good: _torch_zip(),
    "of a web page": lambda good: b"<!doctype html><html>404</html>" * 50,
    "of a Git LFS pointer": lambda good: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "of a NaN in the header": lambda good: packed(
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"\0" * 4
    ),
    "of a name of escapes": lambda good: packed(
        {"\x1b]0;x\x07": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
}
#: May be accepted or refused.
ODD: dict[str, Spoil] = {
    "of float64": _set_first(lambda a: a.astype(np.float64)),
    "of float16": _all(lambda a: a.astype(np.float16)),
    "of zeros": _all(np.zeros_like),
    "of 1e30": _all(lambda a: np.full_like(a, 1e30)),
    "of a tensor more": _tensors(lambda t: t.update(extra=np.zeros(1, np.float32))),
    "of a tensor twice in the header": lambda good: _twice(good),
}


def _twice(good: bytes) -> bytes:
    header, body = unpacked(good)
    name = _first(header)
    raw = json.dumps(header)[:-1] + "," + json.dumps({name: header[name]})[1:]
    return packed(raw.encode(), body)


def _file(spoil: Spoil) -> Callable[[Place], None]:
    return lambda place: _ignore(place.path(FILE).write_bytes(spoil(place.path(BASE2 / UNET).read_bytes())))


def _part(spoil: Spoil, part: str = "unet", of: At = BASE) -> Callable[[Place], None]:
    """A copy of the teacher with one corrupted network."""

    def prepare(place: Place) -> None:
        (path,) = (copy(place, of, MODEL) / part).glob("*.safetensors")
        path.write_bytes(spoil(path.read_bytes()))

    return prepare


def _guide(spoil: Spoil) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        for path in copy(place, GUIDE, GUIDE_COPY).glob("*.safetensors"):
            path.write_bytes(spoil(path.read_bytes()))

    return prepare


def _ignore(_: object) -> None:
    return None


def _weights() -> Iterator[Case]:
    area = "weights"
    for turn, (label, spoil) in enumerate((BROKEN | ODD).items()):
        allowed = ANY if label in ODD else (1, 2)
        yield Case(area, f"plug --base {label}", plug(base=FILE), allowed, _file(spoil), unpickled)
        if turn % 2:
            yield Case(area, f"plug --lora {label}", plug(GUIDED, "--lora", FILE), (1, 2), _file(spoil), unpickled)
        else:
            yield Case(area, f"visualize --guide {label}", visualize(guide=GUIDE_COPY), ANY, _guide(spoil), unpickled,
                       slow=label in ODD)  # fmt: skip
        for part, (words, prepare) in share(_networks(spoil), turn, 1).items():
            yield Case(area, f"{part} {label}", words, ANY, prepare, unpickled, slow=part.startswith("build"))
    for label, put in SPECIAL.items():
        surroundings = Surroundings(cpu=30, wall=90)
        allowed = ANY if label == "unreadable" else (1, 2)
        for option, words in (("--base", plug(base=FILE)), ("--lora", plug(GUIDED, "--lora", FILE))):
            yield Case(area, f"plug {option}, a {label}", words, allowed, _special(put), surroundings=surroundings)


def _networks(spoil: Spoil) -> dict[str, tuple[tuple[object, ...], Callable[[Place], None]]]:
    """Commands on a folder with one corrupted network."""
    return {
        "build, the U-Net": (build(base=MODEL), _part(spoil)),
        "plug, the text encoder": (plug(base=MODEL), _part(spoil, "text_encoder", BASE2)),
        "build, the guide": (build(guide=GUIDE_COPY), _guide(spoil)),
        "plug, the U-Net": (plug(base=MODEL), _part(spoil, "unet", BASE2)),
        "build, the VAE": (build(base=MODEL), _part(spoil, "vae")),
    }


SPECIAL: dict[str, Callable[[Path], object]] = {
    "folder": lambda p: p.mkdir(),
    "loop of links": lambda p: p.symlink_to(p),
    "link to nothing": lambda p: p.symlink_to("/nonexistent"),
    "named pipe": lambda p: os.mkfifo(p),
    "device": lambda p: p.symlink_to("/dev/zero"),
    "null device": lambda p: p.symlink_to("/dev/null"),
    "unreadable": lambda p: (p.write_bytes(b"x"), p.chmod(0)),
}


def _special(put: Callable[[Path], object]) -> Callable[[Place], None]:
    return lambda place: _ignore(put(place.path(FILE)))


INDICES: dict[str, object] = {
    "climbs": {"weight_map": {"a": "../../../../etc/passwd"}},
    "is absolute": {"weight_map": {"a": "/etc/passwd"}},
    "leads to a pickle": {"weight_map": {"a": "evil.bin"}},
    "is a list": {"weight_map": [1]},
    "is of numbers": {"weight_map": {"a": 1}},
    "is null": None,
    "is empty": {},
    "names a shard that is missing": {"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}},
    "names itself": {"weight_map": {"a": "diffusion_pytorch_model.safetensors.index.json"}},
}


def _index(index: object) -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        folder = copy(place, BASE2, MODEL) / "unet"
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "evil.bin").write_bytes(payload())
        (folder / "diffusion_pytorch_model.safetensors").unlink()

    return prepare


def _indices() -> Iterator[Case]:
    commands = {"plug": plug(base=MODEL), "plug, a U-Net": plug(base=MODEL / "unet"), "build": build(base=MODEL)}
    for turn, (label, index) in enumerate(INDICES.items()):
        for command, words in share(commands, turn, 2).items():
            yield Case("weights", f"{command}, an index that {label}", words, (1, 2), _index(index), unpickled,
                       slow=command == "build")  # fmt: skip


PICKLES = (".bin", ".pt", ".ckpt", ".pth", ".pkl", ".safetensors")


def _pickled_file(suffix: str) -> Callable[[Place], None]:
    return lambda place: _ignore(place.path(HERE / f"evil{suffix}").write_bytes(_torch_zip()))


def _pickled_folder(suffix: str, of: At, to: At) -> Callable[[Place], None]:
    """A folder in which all weights are pickles."""

    def prepare(place: Place) -> None:
        for path in list(copy(place, of, to).rglob("*.safetensors")):
            path.unlink()
            name = "pytorch_model" if path.parent.name == "text_encoder" else path.stem
            (path.parent / f"{name}{suffix}").write_bytes(_torch_zip())
            shutil.copy(path.parent / f"{name}{suffix}", path.parent / f"raw{suffix}")
            (path.parent / f"raw{suffix}").write_bytes(payload())

    return prepare


def _pickles() -> Iterator[Case]:
    for turn, suffix in enumerate(PICKLES):
        evil = HERE / f"evil{suffix}"
        files = {
            "plug --base": plug(base=evil),
            "plug --lora": plug(GUIDED, "--lora", evil),
            "build --base": build(base=evil),
            "bench --inception": bench("--inception", evil),
            "build --guide": build(guide=evil),
            "build --calibration": build("--precision", "int8", "--calibration", evil),
            "plug ENGINE": plug(evil),
            "sample --engine": ("sample", "a", "--engine", evil),
            "bench --clip": bench("--clip", evil),
            "compare": ("compare", evil, evil),
        }
        for command, words in share(files, turn, 6).items():
            yield Case("pickles", f"{command} *{suffix}", words, (1, 2), _pickled_file(suffix), unpickled)
        model = _pickled_folder(suffix, BASE, MODEL)
        guide = with_prompts(_pickled_folder(suffix, GUIDE, GUIDE_COPY))
        folders = {
            "build --base": (build(base=MODEL), model), "plug --base": (plug(base=MODEL), model),
            "plug --base U-Net": (plug(base=MODEL / "unet"), model), "build --guide": (build(guide=GUIDE_COPY), guide),
            "visualize --guide": (visualize(guide=GUIDE_COPY), guide),
            "distill steps --guide": (steps(guide=GUIDE_COPY), guide),
        }  # fmt: skip
        for command, (words, prepare) in share(folders, turn, 4).items():
            yield Case("pickles", f"{command} folder of *{suffix}", words, (1, 2), prepare, unpickled)


def cases() -> Iterator[Case]:
    """All cases."""
    yield from _weights()
    yield from _indices()
    yield from _pickles()
