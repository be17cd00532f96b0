"""The quantised graph computes the same as the simulation, and every INT8 weight is derived from its checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn

from pnp_trt.backends.onnxruntime.backend import OrtNetwork
from pnp_trt.build.onnx_export import export
from pnp_trt.errors import PnpError
from pnp_trt.graph.weights import WeightMap, apply, check_complete, quantization_scale, quantize
from pnp_trt.precision.int8.qdq import INT8_ONE_SCALE, matrix_layers, quantize_graph, quantize_weights
from pnp_trt.precision.int8.record import LayerRange
from pnp_trt.precision.int8.simulate import quantised
from pnp_trt.precision.recipes import RECIPES, convert

CHOICES = {
    "unet.conv": LayerRange(3.0),
    "unet.plain": LayerRange(2.0),
    "unet.smooth": LayerRange(2.5, (1, 0, -1, 0, 2, 0, 0, -2)),
}


class Net(nn.Module):
    """A convolution, a grouped convolution, and two linear layers with the same input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.unet = nn.ModuleDict(
            {
                "conv": nn.Conv2d(4, 8, 3, padding=1), "deep": nn.Conv2d(8, 8, 3, padding=1, groups=8),
                "plain": nn.Linear(8, 8), "smooth": nn.Linear(8, 8),
            }
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.unet["deep"](self.unet["conv"](x)).flatten(2).transpose(1, 2)
        return self.unet["plain"](y) + self.unet["smooth"](y)


def exported(folder: Path, precision: str = "fp32") -> tuple[WeightMap, Path]:
    path = folder / "net.onnx"
    return export(convert(Net(), RECIPES[precision]), {"x": torch.zeros(2, 4, 6, 6)}, "y", path), path


def initializers(path: Path) -> list[str]:
    return list(ir.load(path).graph.initializers)


def test_the_graph_matches_the_simulation(tmp_path: Path) -> None:
    weights, path = exported(tmp_path)
    check_complete(path, weights.derive(quantize_graph(path, weights, CHOICES), initializers(path)))
    net, x = Net(), torch.randn(2, 4, 6, 6)
    with torch.no_grad(), quantised(dict(net.named_modules()), CHOICES):
        expected = net(x).numpy()
    got = OrtNetwork(path, "cpu")(x=x.numpy())
    # a value halfway between two steps may be rounded either way
    assert np.mean(np.abs(got - expected) > 1e-4) < 0.01
    assert np.abs(expected - net(x).detach().numpy()).max() > 1e-3
    ops = [n.op_type for n in ir.load(path).graph]
    assert ops.count("QuantizeLinear") == 3 and ops.count("DequantizeLinear") == 6


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_data_file_has_the_transformed_weights_in_order(tmp_path: Path, precision: str) -> None:
    weights, path = exported(tmp_path, precision)
    weights = weights.derive(quantize_graph(path, weights, CHOICES), initializers(path))
    own = Net().state_dict()
    transformed = [apply(w["transform"], own[f"{w['source']}.{w['key']}"]) for _, w in sorted(weights.weights.items())]
    data = b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in transformed)
    assert data == path.with_name("net.onnx.data").read_bytes()
    assert sum(t.dtype == torch.int8 for t in transformed) == 3


def test_one_scale_per_weight(tmp_path: Path) -> None:
    """The oracle is the formula: W ≈ round(W / s) · s with s = max|W| / 127 of the whole weight, in float16."""
    weights, path = exported(tmp_path)
    choices = {"unet.conv": LayerRange(3.0), "unet.plain": LayerRange(2.0)}
    weights = weights.derive(quantize_graph(path, weights, choices, INT8_ONE_SCALE), initializers(path))
    check_complete(path, weights)
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    net, x = Net(), torch.randn(2, 4, 6, 6)
    for name, limit in (("conv", 3.0), ("plain", 2.0)):
        layer = net.unet[name]
        weight = layer.weight.detach().numpy()
        step = np.float32(np.float16(np.abs(weight).max() / np.float32(127)))
        rounded = np.clip(np.rint(weight / step), -127, 127)
        stored, scale = (
            tensors[n]
            for last in ("quantize", "quantization_scale")
            for n, entry in weights.weights.items()
            if entry["key"] == f"{name}.weight" and entry["transform"][-1]["op"] == last
        )
        assert scale.shape == () and scale == step
        assert np.array_equal(stored if name == "conv" else stored.T, rounded)
        layer.weight.data = torch.from_numpy((rounded * step).astype(np.float32))
        layer.register_forward_pre_hook(
            lambda _, a, s=limit / 127: (torch.round(a[0] / s).clamp(-128, 127) * s,)  # type: ignore[misc]
        )
    expected = net(x).detach().numpy()
    got = OrtNetwork(path, "cpu")(x=x.numpy())
    assert np.mean(np.abs(got - expected) > 1e-4) < 0.01  # a value halfway between two steps may be rounded either way


def test_weight_only_quantisation_does_not_quantise_inputs(tmp_path: Path) -> None:
    weights, path = exported(tmp_path)
    layers = matrix_layers(path, weights)
    assert layers == ["unet.conv", "unet.plain", "unet.smooth"]  # not the grouped convolution
    quantize_weights(path, weights, layers)
    ops = [n.op_type for n in ir.load(path).graph]
    assert "QuantizeLinear" not in ops and ops.count("DequantizeLinear") == 3
    x = torch.randn(2, 4, 6, 6)
    expected = Net()(x).detach().numpy()
    error = np.linalg.norm(OrtNetwork(path, "cpu")(x=x.numpy()) - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < 2e-2


def test_layers_missing_from_the_graph_are_refused(tmp_path: Path) -> None:
    weights, path = exported(tmp_path)
    with pytest.raises(PnpError, match=r"2 layers that net.onnx does not have, for example guide.a"):
        quantize_graph(path, weights, {**CHOICES, "unet.b": LayerRange(1.0), "guide.a": LayerRange(1.0)})
    with pytest.raises(PnpError, match=r"unet.deep is read by Conv and cannot take INT8"):
        quantize_graph(path, weights, {"unet.deep": LayerRange(1.0)})


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 1), st.floats(1e-8, 1e4), st.integers(0, 2**31))
def test_rounding_is_within_half_a_step(rows: int, columns: int, axis: int, size: float, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    scale = quantization_scale(weight, axis)
    assert torch.equal(scale.half().float(), scale) and (scale > 0).all()
    wide = scale.reshape([-1, 1] if axis == 0 else [1, -1])
    values = quantize(weight, axis)
    assert values.dtype == torch.int8 and values.min() >= -127
    # the scale itself is rounded to float16, by at most 2⁻¹¹ of 127 steps
    assert ((values * wide - weight).abs() <= wide * (0.5 + 127 * 2.0**-11) + 1e-12).all()
