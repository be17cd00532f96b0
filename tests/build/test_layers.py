"""Layer by layer: a planted overflow, a planted NaN and a planted error are found where they were planted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx import save as save_onnx
from torch import nn

from pnp_trt.build import layers
from pnp_trt.build.builder import build
from pnp_trt.build.layers import first_not_finite, first_past, in_float32, layerwise, verdict, worst
from pnp_trt.build.onnx_export import export
from pnp_trt.build.spec import BuildSpec
from pnp_trt.errors import InputError, PnpError
from pnp_trt.precision.recipes import convert, recipe

from ..bundles import reseal
from ..conftest import Result

Cli = Callable[..., Result]


class Chain(nn.Module):
    """Convolutions, one of which multiplies by a number that may be too large for float16."""

    def __init__(self, gains: tuple[float, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.steps = nn.ModuleList(nn.Conv2d(4, 4, 1, bias=False) for _ in gains)
        for step, gain in zip(self.steps, gains, strict=True):
            nn.init.eye_(step.weight[:, :, 0, 0])
            with torch.no_grad():
                step.weight.mul_(gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            x = step(x)
        return x


def made(gains: tuple[float, ...], precision: str, path: Path) -> dict[str, np.ndarray]:
    """Write the chain's graph; its inputs for one row."""
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    export(convert(Chain(gains), recipe(precision)), {"x": x}, "y", path)
    return {"x": x[:1].numpy()}


@settings(max_examples=4)
@given(place=st.integers(0, 3), precision=st.sampled_from(["fp16", "bf16"]))
def test_an_overflow_is_named_by_its_weight(place: int, precision: str, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("graph") / "chain.onnx"
    gains = [1.0] * 4
    gains[place] = 6e4  # 65504 is float16's largest; bfloat16 goes as far as float32
    inputs = made(tuple(gains), precision, path)
    inputs["x"] = inputs["x"] * 50
    found = layerwise(path, inputs)
    bad = first_not_finite(found)
    said, problem = verdict(found, 4e-2)
    if precision == "bf16":
        assert bad is None and not problem and f"all {len(found)} tensors are finite" in said
    else:
        assert bad is not None and problem and bad.finite_in_float32 and bad.largest > 65504
        assert bad.near == f"steps.{place}.weight" and f"near steps.{place}.weight); " in said and bad.op == "Conv"


def test_a_weight_that_is_not_a_number_is_bad_in_float32_too(tmp_path: Path) -> None:
    inputs = made((1.0, float("nan"), 1.0), "fp16", tmp_path / "chain.onnx")
    bad = first_not_finite(layerwise(tmp_path / "chain.onnx", inputs))
    assert bad is not None and bad.near == "steps.1.weight" and not bad.finite_in_float32
    assert "in float32 too: check the weights" in verdict(layerwise(tmp_path / "chain.onnx", inputs), 1e-3)[0]


def test_batches_of_outputs_find_the_same(tmp_path: Path) -> None:
    inputs = made((1.0, 3.0, 0.1), "fp16", tmp_path / "chain.onnx")
    seen: list[tuple[int, int]] = []
    whole = layerwise(tmp_path / "chain.onnx", inputs, budget=1 << 30)
    parts = layerwise(tmp_path / "chain.onnx", inputs, budget=1, progress=lambda i, n: seen.append((i, n)))
    assert whole == parts and len(parts) > 3
    assert seen == [(i + 1, len(parts)) for i in range(len(parts))]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chain.onnx", "chain.onnx.data"]  # nothing is left behind


def test_half_precision_errs_and_float32_does_not(tmp_path: Path) -> None:
    for precision, low, high in (("fp32", 0.0, 0.0), ("fp16", 1e-5, 1e-3), ("bf16", 1e-4, 1e-2)):
        inputs = made((1.1, 0.7, 1.3), precision, tmp_path / f"{precision}.onnx")
        errors = [layer.error for layer in layerwise(tmp_path / f"{precision}.onnx", inputs)]
        assert low <= max(errors) <= high


def test_what_is_furthest_off_comes_in_the_order_of_running(tmp_path: Path) -> None:
    found = layerwise(tmp_path / "c.onnx", made((1.1, 0.7, 1.3, 1.7), "fp16", tmp_path / "c.onnx"))
    shown = worst(found, 2)
    assert [s.place for s in shown] == sorted(s.place for s in shown)
    assert min(s.error for s in shown) == sorted((f.error for f in found), reverse=True)[1]
    small = min(f.error for f in found if f.error)
    past = first_past(found, small)
    assert past is not None and all(f.error <= small for f in found if f.place < past.place)
    assert "and the first tensor above the limit is" in verdict(found, small / 2)[0]


def test_quantisers_are_taken_out_of_the_reference(tmp_path: Path) -> None:
    """x → quantise → dequantise → · weight: the reference multiplies x itself."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        helper.make_node("Mul", ["dq", "weight"], ["y"]),
    ]
    held = [numpy_helper.from_array(np.array(v), n) for n, v in (("scale", np.float32(0.5)), ("zero", np.int8(0)),
                                                                 ("weight", np.float32(2)))]  # fmt: skip
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    save_onnx(model, tmp_path / "q.onnx")
    loaded = ir.load(tmp_path / "q.onnx")
    in_float32(loaded)
    assert [n.op_type for n in loaded.graph if any(v is not None and v.name == "x" for v in n.inputs)] == [
        "QuantizeLinear", "Mul"
    ]  # fmt: skip
    found = layerwise(tmp_path / "q.onnx", {"x": np.array([[0.5, 1.0, 1.2]], np.float32)})
    y = next(layer for layer in found if layer.tensor == "y")
    assert y.error == pytest.approx(0.2 / np.linalg.norm([0.5, 1.0, 1.2]), rel=1e-3)


def test_a_graph_that_cannot_run_is_a_sentence(tmp_path: Path) -> None:
    inputs = made((1.0,), "fp32", tmp_path / "c.onnx")
    (tmp_path / "c.onnx.data").unlink()
    with pytest.raises(PnpError, match="ONNX Runtime cannot load a graph of"):
        layerwise(tmp_path / "c.onnx", inputs)


def test_verify_looks_into_a_bundle(cli: Cli, engines: Path, tmp_path: Path) -> None:
    done = cli("verify", "guided", "--layers", "--network", "unet", "--worst", 3)
    assert done.code == 0 and "unet: all" in done.out and "text_encoder" not in done.out, done.err
    assert "has no network 'u'; it has: unet" in cli("verify", "guided", "--layers", "--network", "u").err
    copy = Path(shutil.copytree(engines / "guided", tmp_path / "guided"))
    model = ir.load(copy / "unet.onnx")
    spoilt = model.graph.initializers["unet.mid_block.resnets.0.conv1.weight"].const_value
    data = bytearray((copy / "unet.onnx.data").read_bytes())
    data[spoilt.offset : spoilt.offset + 4] = np.float32("nan").tobytes()
    (copy / "unet.onnx.data").write_bytes(data)
    reseal(copy)
    done = cli("verify", copy)
    assert done.code == 1 and f"compare layers with: pnp-trt verify {copy} --layers" in done.err
    done = cli("verify", copy, "--layers", "--network", "unet")
    assert done.code == 1 and "the first tensor that is not finite is" in done.err
    assert "Conv, near unet.mid_block.resnets.0.conv1.weight); in float32 too: check the weights" in done.err


def test_a_build_that_fails_says_where(micro_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "verdict", lambda found, limit: (f"one of {len(found)} tensors is bad", True))
    monkeypatch.setattr("pnp_trt.build.parity.relative_error", lambda *_: 1.0)
    with pytest.raises(PnpError, match=r"the exported unet differs .*; one of \d+ tensors is bad; nothing was written"):
        build(BuildSpec(str(micro_base), "none", out=tmp_path / "x"))


def test_modules_have_no_graphs(cli: Cli, micro_base: Path, tmp_path: Path) -> None:
    build(BuildSpec(str(micro_base), "none", backend="torch", out=tmp_path / "t"))
    done = cli("verify", tmp_path / "t", "--layers")
    assert done.code == 2 and "contains modules and no graphs; build it with another --backend" in done.err


def test_without_polygraphy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "polygraphy", None)
    with pytest.raises(InputError, match=r"comparing layers needs polygraphy; install with: pip install 'pnp-trt\[b"):
        layerwise(tmp_path / "none.onnx", {})
