"""What a bundle brings along besides its manifest: graphs, tokenizer, golden inputs, maps of weights."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pnp_trt.assets import ROOT
from pnp_trt.bundle.onnx_file import read_graph
from pnp_trt.bundle.tokenizer_file import check_tokenizer, read_tokenizer
from pnp_trt.bundle.weights_file import read_weights
from pnp_trt.errors import InputError
from pnp_trt.io.text import printable

from ..bundles import reseal
from ..conftest import Result

onnx = pytest.importorskip("onnx")
Cli = Callable[..., Result]


@pytest.fixture
def copied(micro_bundles: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(micro_bundles / "guided", tmp_path / "guided"))


def test_a_graph_is_read_as_the_onnx_package_reads_it(micro_bundles: Path) -> None:
    for path in micro_bundles.glob("*/*.onnx"):
        model, graph = onnx.load(path, load_external_data=False), read_graph(path.read_bytes())
        assert list(graph.inputs) == [v.name for v in model.graph.input]
        assert list(graph.outputs) == [v.name for v in model.graph.output]
        for value in model.graph.input:
            kind = value.type.tensor_type
            dims = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim)
            numpy_type = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
            assert graph.inputs[value.name] == (numpy_type.name, dims)
        assert graph.operators == {(n.domain, n.op_type) for n in model.graph.node} and not graph.nested
        external = {e.value for i in model.graph.initializer for e in i.external_data if e.key == "location"}
        assert graph.locations == external == {f"{path.name}.data"}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.builds(lambda tail: b"\x3a" + bytes([len(tail)]) + tail, st.binary(max_size=120)))
def test_bytes_that_are_no_graph(data: bytes) -> None:
    try:
        read_graph(data)
    except ValueError:
        return
    onnx.load_from_string(data)  # only what protobuf reads too is taken


def model_of(*nodes: Any, initializers: tuple[Any, ...] = ()) -> Any:
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        list(nodes), "g", [info("sample", 1, ["batch", 4, 8, 8])], [info("y", 1, ["batch", 4, 8, 8])], initializers
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def stored_at(location: str) -> Any:
    value = onnx.helper.make_tensor("w", 1, [1], [0.0])
    del value.float_data[:]
    value.data_location = onnx.TensorProto.EXTERNAL
    value.external_data.add(key="location", value=location)
    return value


def constant_at(location: str) -> Any:
    return onnx.helper.make_node("Constant", [], ["c"], value=stored_at(location))


EVIL = onnx.helper.make_node("Evil", ["sample"], ["y"], domain="com.evil")
IDENTITY = onnx.helper.make_node("Identity", ["sample"], ["y"])
LOOP = onnx.helper.make_node(
    "Loop", ["", "", "sample"], ["y"], body=onnx.helper.make_graph([], "body", [], [], [stored_at("x")])
)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            model_of(onnx.helper.make_node("Evil", ["sample"], ["y"], domain="com.evil")),
            "custom operator com.evil.Evil",
        ),
        (model_of(IDENTITY), "unet.onnx has the inputs sample float32 batchx4x8x8, its manifest states"),
        (model_of(LOOP), "contains loops, branches or functions"),
        (model_of(IDENTITY, initializers=(stored_at("free.bin"),)), "reads its weights from 'free.bin'"),
        (model_of(IDENTITY, initializers=(stored_at("../../secret"),)), "reads its weights from '../../secret'"),
        (model_of(IDENTITY, initializers=(stored_at("/dev/zero"),)), "reads its weights from '/dev/zero'"),
        (model_of(IDENTITY, initializers=(stored_at("text_encoder.onnx.data"),)), "reads its weights from 'text_enc"),
        (model_of(IDENTITY, constant_at("free.bin")), "reads its weights from 'free.bin'"),
    ],
)
def test_graphs_that_are_not_the_manifests(copied: Path, cli: Cli, micro_base: Path, tmp_path: Path, model: Any,
                                           message: str) -> None:  # fmt: skip
    (copied / "free.bin").write_bytes(b"\0" * 4)
    (copied / "unet.onnx").write_bytes(model.SerializeToString())
    reseal(copied, lambda m: m["files"].pop("free.bin"))
    for command in (["sample", "a cat", "--engine", copied, "--out", tmp_path / "s"], ["verify", copied],
                    ["plug", copied, "--base", micro_base, "--out", tmp_path / "x"]):  # fmt: skip
        done = cli(*command)
        assert done.code == 2 and message in done.err and done.err.strip().count("\n") <= 6, done.err
    assert not (tmp_path / "x").exists()


def read_and_check(path: Path, vocabulary: int, advice: str) -> str:
    return check_tokenizer(path, read_tokenizer(path, advice), vocabulary, advice)


TOKENIZER = json.loads((ROOT / "emoji" / "tokenizer" / "tokenizer.json").read_text())


def bomb(letters: int) -> Any:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * letters}


def vocabulary(change: Callable[[dict[str, int]], Any]) -> dict[str, Any]:
    model = copy.deepcopy(TOKENIZER["model"])
    change(model["vocab"])
    return {"model": model}


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": bomb(10**6)}, {"normalizer": bomb(2)},
        {"normalizer": {"type": "Sequence", "normalizers": [bomb(1000), bomb(1000)]}},
        {"normalizer": {"type": "Prepend", "prepend": "x"}}, {"normalizer": {"type": "Precompiled"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a*)*(a*)*b"}, "behavior": "Isolated",
                           "invert": False}},
        {"pre_tokenizer": None}, {"pre_tokenizer": {"type": "Whitespace"}}, {"post_processor": None},
        {"post_processor": {"type": "BertProcessing"}}, {"model": None}, {"model": {"type": "Unigram"}},
        {"model": TOKENIZER["model"] | {"dropout": 0.5}}, vocabulary(lambda v: v.update(x=-1)),
        vocabulary(lambda v: v.update(x=49408)), vocabulary(lambda v: v.update(x="1")),
        vocabulary(lambda v: v.update(x=True)), {"added_tokens": [{"id": 10**9, "content": "x", "normalized": False}]},
        {"added_tokens": 3}, {"unknown": 1},
        {"post_processor": TOKENIZER["post_processor"] | {"cls": ["<|startoftext|>", 10**6]}},
    ],
)  # fmt: skip
def test_tokenizers_of_other_components_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER | change))
    with pytest.raises(InputError, match=r"tokenizer.json.*; build again"):
        read_and_check(tmp_path / "tokenizer.json", 49408, "build again")


def test_clips_own_tokenizer_is_taken(tmp_path: Path) -> None:
    path = ROOT / "emoji" / "tokenizer" / "tokenizer.json"
    assert read_and_check(path, 49408, "") == path.read_text()
    with pytest.raises(InputError, match="it must be a whole number from 0 to 49406"):
        read_and_check(path, 49407, "")


@pytest.mark.parametrize(
    ("name", "raw"),
    [(n, r) for n in ("tokenizer.json", "golden.npz", "weights.json", "unet.onnx")
     for r in (b"", b"hello", b"\x80\x04N.", b"[]", b"{}", bytes(range(256)))],
)  # fmt: skip
def test_files_that_are_something_else(copied: Path, cli: Cli, micro_base: Path, tmp_path: Path, name: str,
                                       raw: bytes) -> None:  # fmt: skip
    (copied / name).write_bytes(raw)
    reseal(copied)
    commands = {"tokenizer.json": ["sample", "a cat", "--engine", copied, "--out", tmp_path / "s"],
                "weights.json": ["plug", copied, "--base", micro_base, "--out", tmp_path / "x"]}  # fmt: skip
    done = cli(*commands.get(name, ["verify", copied]))
    assert done.code == 2 and name in done.err and "allow_pickle" not in done.err and "unexpected" not in done.err


def golden(change: Callable[[str, np.ndarray], Any]) -> Callable[[dict[str, np.ndarray]], dict[str, Any]]:
    return lambda arrays: {k: v for k, v in ((k, change(k, v)) for k, v in arrays.items()) if v is not None}


@pytest.mark.parametrize(
    "change",
    [
        golden(lambda k, v: np.array([{1: 2}], dtype=object)), golden(lambda k, v: None if k.endswith("=") else v),
        golden(lambda k, v: v * np.nan if v.dtype.kind == "f" else v), golden(lambda k, v: v[..., :1]),
        golden(lambda k, v: v[:0]), golden(lambda k, v: None), golden(lambda k, v: v.astype("complex64")),
        golden(lambda k, v: None if k.startswith("unet") else v), golden(lambda k, v: np.repeat(v, 100, axis=0)),
        lambda arrays: {f"x{k}": v for k, v in arrays.items()}, lambda arrays: arrays | {"unet/more": np.zeros(2)},
    ],
)  # fmt: skip
def test_golden_inputs_are_the_networks(copied: Path, cli: Cli, change: Any) -> None:
    np.savez(copied / "golden.npz", **change(dict(np.load(copied / "golden.npz"))))
    reseal(copied)
    done = cli("verify", copied)
    assert done.code == 2 and "golden.npz" in done.err and "unexpected" not in done.err, done.err


def test_golden_inputs_may_not_be_packed(copied: Path, cli: Cli) -> None:
    """A packed file of a megabyte can hold a terabyte of zeros."""
    np.savez_compressed(copied / "golden.npz", **dict(np.load(copied / "golden.npz")))
    reseal(copied)
    done = cli("verify", copied)
    assert done.code == 2 and "it is compressed" in done.err


STEPS = [{"op": "cast", "to": "float32"}, {"op": "transpose", "perm": [1, 0]}]


def weights(**entry: Any) -> dict[str, Any]:
    whole = {"source": "unet", "key": "k", "transform": STEPS} | entry
    return {"schema": 1, "networks": {"unet": {"weights": {"w": whole}, "constants": ["c"]}}}


@pytest.mark.parametrize(
    "document",
    [
        [], {"schema": 2, "networks": {}}, {"schema": 1, "networks": {}}, weights(source=1), weights(key=""),
        weights(transform=None), weights(transform=[{"op": "eval"}]), weights(transform=[{"op": "cast", "to": "load"}]),
        weights(transform=[{"op": "transpose", "perm": [0, 0]}]), weights(transform=[{"op": "reshape"}]),
        weights(transform=[{"op": "reshape", "shape": ["x"]}]), weights(transform=[{"op": "quantize", "axis": 1.5}]),
        weights(transform=[{"op": "shift", "axis": 0, "exponents": [10**6]}]), weights(more=1),
    ],
)  # fmt: skip
def test_maps_of_weights_are_checked(tmp_path: Path, document: Any) -> None:
    (tmp_path / "weights.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"weights.json.*; build again"):
        read_weights(tmp_path / "weights.json", ["unet"], "build again")


def test_a_map_of_weights_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "weights.json").write_text(json.dumps(weights()))
    assert read_weights(tmp_path / "weights.json", ["unet"], "") == weights()["networks"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a red apple", "a red apple"), ("naïve 苹果 🍎👩\u200d🌾", "naïve 苹果 🍎👩\u200d🌾"), ("\x1b[2J", "\\x1b[2J"),
        ("a\nb\r", "a\\nb\\r"), ("\x9b31m", "\\x9b31m"), ("\u202egnp", "\\u202egnp"), ("\udcff", "\\udcff"),
        ("\x7f\0", "\\x7f\\x00"), ("\u2028", "\\u2028"), ("\ufeffx", "\\ufeffx"), ("\U000e0041", "\\U000e0041"),
    ],
)  # fmt: skip
def test_text_that_steers_a_terminal_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@settings(deadline=None)
@given(st.text())
def test_printed_text_is_plain(text: str) -> None:
    shown = printable(text, limit=20)
    assert len(shown) <= 20 and not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown)
    shown.encode()  # no surrogate is left


def test_tables_print_text_as_text() -> None:
    import io

    from rich.table import Table
    from rich.text import Text

    from pnp_trt.cli.console import PlainTextConsole

    out = io.StringIO()
    console = PlainTextConsole(file=out, width=80, markup=False, force_terminal=True, color_system="truecolor")
    table = Table()
    table.add_column("\x1b[2J")
    table.add_row(Text("\x1b]0;pwned\x07", style="red"))
    table.add_row("[red]x[/nope]\u202e")
    console.print(table, "\x1b[3J")
    printed = out.getvalue()
    assert "\x1b[31m" in printed  # its own styles stay
    assert not any(part in printed for part in ("\x1b]", "\x1b[2J", "\x1b[3J", "\x07", "\u202e"))
    assert "\\x1b]0;pwned" in printed and "[red]x[/nope]" in printed


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("unet", {"block_out_channels": "x"}), ("unet", {"norm_num_groups": 7}),
        ("text_encoder", {"hidden_size": "x"}),
    ],
)  # fmt: skip
def test_configs_that_describe_no_network(copied: Path, cli: Cli, micro_base: Path, tmp_path: Path, part: str,
                                          change: dict[str, Any]) -> None:  # fmt: skip
    reseal(copied, lambda m: m["configs"][part].update(change))
    done = cli("plug", copied, "--base", micro_base, "--out", tmp_path / "x")
    assert done.code == 2 and "not describe" in done.err and "Traceback" not in done.err
    assert not (tmp_path / "x").exists()


def test_a_bundles_own_word_fetches_nothing(copied: Path, cli: Cli, tmp_path: Path) -> None:
    reseal(copied, lambda m: m["base"].update(name="evil/model"))
    done = cli("plug", copied, "--lora", "sepia", "--out", tmp_path / "x")
    assert done.code == 2 and "names its base 'evil/model', which is not on this machine" in done.err
