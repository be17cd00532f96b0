"""Bundles with invalid graphs, tokenizers, golden inputs or weight maps, sealed as an attacker would seal them."""

from __future__ import annotations

import copy as copies
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..case import GUIDED, Case, Surroundings
from .common import ANY, AT_X, ON_X, X, sample, some, spoil

AREA = "content"
HOME = Surroundings(environment=AT_X)
LONG = "a" * 40 + "c"
RAW: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "noise": lambda good: bytes(np.random.default_rng(3).integers(0, 256, 1000, np.uint8)),
    "text": lambda good: b"hello",
    "a pickle": lambda good: b"\x80\x04N.",
    "cut": lambda good: good[: len(good) // 2],
    "null": lambda good: b"null",
    "a list": lambda good: b"[1, 2]",
    "nested": lambda good: b'{"a":' * 60_000 + b"1" + b"}" * 60_000,
    "a BOM before": lambda good: b"\xef\xbb\xbf" + good,
    "bytes behind": lambda good: good + b"\0" * 100,
}
FILES = ("unet.onnx", "unet.onnx.data", "text_encoder.onnx", "vae_decoder.onnx", "tokenizer.json", "golden.npz",
         "weights.json")  # fmt: skip


def _write(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path, dict[str, Any]], None]:
    def write(folder: Path, manifest: dict[str, Any]) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes() if path.exists() else b""))

    return write


TOKENIZERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "without a model": lambda t: t.pop("model"),
    "with a regular expression that never ends": lambda t: t.update(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "(a*)*(a*)*(a*)*b"},
            "behavior": "Isolated",
            "invert": False,
        }
    ),
    "with ids beyond the table": lambda t: t["model"].update(
        vocab={k: v + 10**6 for k, v in t["model"]["vocab"].items()}
    ),
    "with a negative id": lambda t: t["model"]["vocab"].update({"a</w>": -1}),
    "with a normalizer that grows": lambda t: t.update(
        normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1_000_000}
    ),
    "without a post-processor": lambda t: t.update(post_processor=None),
    "with an unknown model": lambda t: t["model"].update(type="Evil"),
    "without merges": lambda t: t["model"].update(merges=[]),
    "with another length": lambda t: t.update(
        truncation={"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    ),
    "with padding of its own": lambda t: t.update(
        padding={
            "strategy": {"Fixed": 100_000},
            "direction": "Right",
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
            "pad_to_multiple_of": None,
        }
    ),
}


def _tokenizer(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, dict[str, Any]], None]:
    def write(folder: Path, manifest: dict[str, Any]) -> None:
        tokenizer = copies.deepcopy(json.loads((folder / "tokenizer.json").read_text()))
        change(tokenizer)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    return write


Arrays = dict[str, np.ndarray]
GOLDEN: dict[str, Callable[[Arrays], Arrays]] = {
    "of objects": lambda g: {k: np.array([{1: 2}], dtype=object) for k in g},
    "without its last array": lambda g: dict(list(g.items())[:-1]),
    "of NaN": lambda g: {k: v * np.nan if v.dtype.kind == "f" else v for k, v in g.items()},
    "of other names": lambda g: {f"x{k}": v for k, v in g.items()},
    "of other shapes": lambda g: {k: v[..., :1] for k, v in g.items()},
    "of no rows": lambda g: {k: v[:0] for k, v in g.items()},
    "of scalars": lambda g: {k: np.array(1.0) for k in g},
    "of text": lambda g: {k: np.array("x") for k in g},
    "of complex numbers": lambda g: {k: v.astype(np.complex64) for k, v in g.items()},
    "of nothing": lambda g: {},
    "of zeros": lambda g: {k: v * 0 for k, v in g.items()},
}


def _golden(change: Callable[[Arrays], Arrays]) -> Callable[[Path, dict[str, Any]], None]:
    def write(folder: Path, manifest: dict[str, Any]) -> None:
        arrays = change(dict(np.load(folder / "golden.npz")))
        np.savez(folder / "golden.npz", **arrays)  # type: ignore[arg-type]

    return write


def _npz_of(header: bytes) -> Callable[[Path, dict[str, Any]], None]:
    """An archive whose array headers do not match their data."""

    def write(folder: Path, manifest: dict[str, Any]) -> None:
        import zipfile

        with zipfile.ZipFile(folder / "golden.npz") as archive:
            names = archive.namelist()
        with zipfile.ZipFile(folder / "golden.npz", "w") as archive:
            for name in names:
                archive.writestr(name, b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)

    return write


def _model(operator: str, domain: str = "", name: str = "unet.onnx") -> Callable[[Path, dict[str, Any]], None]:
    """A graph with one node."""

    def write(folder: Path, manifest: dict[str, Any]) -> None:
        import onnx
        from onnx import TensorProto, helper

        shape = ["b", 4, 3, 3]
        tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("sample", "y")]
        node = helper.make_node(operator, ["sample"], ["y"], domain=domain)
        graph = helper.make_graph([node], "g", tensors[:1], tensors[1:])
        sets = [helper.make_opsetid("", 20), helper.make_opsetid("com.evil", 1)]
        onnx.save(helper.make_model(graph, opset_imports=sets, ir_version=10), folder / name)

    return write


GRAPHS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "of an operator that nobody has": _model("Evil", "com.evil"),
    "of another shape": _model("Identity"),
    "that are the text encoder's": lambda folder, m: [
        (folder / f"unet.onnx{s}").write_bytes((folder / f"text_encoder.onnx{s}").read_bytes())
        for s in ("", ".data")
        if (folder / f"text_encoder.onnx{s}").exists()
    ],
}
LISTS: dict[str, Callable[[Any], Any]] = {
    "of numbers": lambda w: dict.fromkeys(w, 1),
    "of null": lambda w: dict.fromkeys(w),
    "of nothing": lambda w: {},
    "of lists": lambda w: {k: [] for k in w},
    "of other names": lambda w: {f"x{k}": v for k, v in w.items()},
    "of itself nested": lambda w: {k: {"": w} for k in w},
}


def _weights(change: Callable[[Any], Any]) -> Callable[[Path, dict[str, Any]], None]:
    def write(folder: Path, manifest: dict[str, Any]) -> None:
        path = folder / "weights.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return write


def cases() -> Iterator[Case]:
    """All cases."""
    for n, name in enumerate(FILES):
        for turn, (label, change) in enumerate(RAW.items()):
            for command in some(("sample", "verify", "plug"), turn + n, 1):
                allowed = (1, 2) if name == "unet.onnx" and label not in ("bytes behind",) else ANY
                yield Case(AREA, f"{command}, {name} is {label}", ON_X[command], allowed, spoil(_write(name, change)),
                           surroundings=HOME)  # fmt: skip
    limits = Surroundings(environment=AT_X, cpu=40)
    for label, change in TOKENIZERS.items():
        for prompt in (LONG * 3, ""):
            yield Case(AREA, f"sample, a tokenizer {label}, {len(prompt)} letters", sample(X, prompt=prompt), ANY,
                       spoil(_tokenizer(change)), surroundings=limits)  # fmt: skip
    for label, make in GOLDEN.items():
        for command in ("verify", "plug", "layers"):
            yield Case(AREA, f"{command}, golden inputs {label}", ON_X[command], ANY if label == "of zeros" else (1, 2),
                       spoil(_golden(make)), surroundings=HOME)  # fmt: skip
    for label, header in {
        "huge": "(9999999999999,)",
        "negative": "(-1,)",
        "calls": "__import__('os').getpid()",
    }.items():
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {header}, }}\n".encode()
        yield Case(AREA, f"verify, golden inputs claim a shape: {label}", ON_X["verify"], (1, 2), spoil(_npz_of(text)),
                   surroundings=HOME)  # fmt: skip
    for label, put in GRAPHS.items():
        for command in ("sample", "verify", "layers", "plug"):
            yield Case(AREA, f"{command}, graphs {label}", ON_X[command], (1, 2), spoil(put), surroundings=HOME)
    for label, alter in LISTS.items():
        for command in ("plug", "verify"):
            yield Case(AREA, f"{command}, weights.json {label}", ON_X[command], ANY, spoil(_weights(alter)),
                       surroundings=HOME)  # fmt: skip
    yield Case(AREA, "sample, a graph that is a named pipe", ON_X["sample"], (1, 2), spoil(_pipe, files=False),
               surroundings=Surroundings(environment=AT_X, wall=60))  # fmt: skip
    yield Case(AREA, "sample, unsealed: one byte of every file", ON_X["sample"], (1, 2), _flip, surroundings=HOME)


def _pipe(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "unet.onnx").unlink()
    os.mkfifo(folder / "unet.onnx")


def _flip(place: Any) -> None:
    from .common import copy

    for path in copy(place, GUIDED, X).glob("*.data"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
