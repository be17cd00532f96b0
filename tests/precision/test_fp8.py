"""FP8 in a graph: the oracle is ml_dtypes' E4M3 and the formula W ≈ E4M3(W / s) · s with s = max|W| / 448."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from pnp_trt.backends.onnxruntime.backend import OrtNetwork
from pnp_trt.graph.weights import apply, as_array, check_complete
from pnp_trt.precision.int8.qdq import FLOAT8, quantize_graph
from pnp_trt.precision.int8.record import LayerRange

from .test_quantize import Net, exported, initializers

CHOICES = {"unet.conv": LayerRange(3.0)}


def e4m3(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return ``values / scale`` rounded to E4M3 with saturation, as uint8."""
    return np.clip(values / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def rounded(values: np.ndarray, scale: float) -> np.ndarray:
    return e4m3(values, np.float32(scale)).view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(scale)


def test_the_graph_computes_the_formula(tmp_path: Path) -> None:
    weights, path = exported(tmp_path)
    check_complete(path, weights.derive(quantize_graph(path, weights, CHOICES, FLOAT8), initializers(path)))
    net, x = Net(), torch.randn(2, 4, 6, 6) * 2  # some values are beyond the range and saturate
    plain = net(x).detach().numpy()
    conv = net.unet["conv"]
    largest = float(conv.weight.detach().abs().max())
    step = float(np.float32(np.float16(np.float32(largest) / np.float32(448))))
    conv.weight.data = torch.from_numpy(rounded(conv.weight.detach().numpy(), step))
    conv.register_forward_pre_hook(lambda _, a: (torch.from_numpy(rounded(a[0].numpy(), 3.0 / 448)),))
    expected = net(x).detach().numpy()
    got = OrtNetwork(path, "cpu")(x=x.numpy())
    assert np.mean(np.abs(got - expected) > 1e-4) < 0.01  # a value halfway between two steps may be rounded either way
    assert np.linalg.norm(expected - plain) / np.linalg.norm(plain) > 1e-2
    ops = [n.op_type for n in ir.load(path).graph]
    assert ops.count("QuantizeLinear") == 1 and ops.count("DequantizeLinear") == 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_stored_weight_is_e4m3_with_one_scale(tmp_path: Path, precision: str) -> None:
    weights, path = exported(tmp_path, precision)
    weights = weights.derive(quantize_graph(path, weights, CHOICES, FLOAT8), initializers(path))
    tensors = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    stored, scale = tensors["unet.conv.float8"], numpy_helper.to_array(tensors["unet.conv.scale"])
    assert stored.data_type == onnx.TensorProto.FLOAT8E4M3FN
    assert scale.shape == () and scale.dtype == (np.float32 if precision == "fp32" else np.float16)
    weight = Net().unet["conv"].weight.detach().numpy()
    weight = weight if precision == "fp32" else weight.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(numpy_helper.to_array(stored).view(np.uint8), e4m3(weight, np.float32(scale)))
    entry = weights.weights["unet.conv.float8"]
    assert [step["op"] for step in entry["transform"]] == ["cast", "float8"]


@settings(max_examples=50)
@given(st.floats(1e-8, 6e4), st.integers(0, 2**31))
def test_rounding_is_within_e4m3s_bound(size: float, seed: int) -> None:
    """Normal numbers: half a unit of a three-bit mantissa, 2⁻⁴ of the value; below 2⁻⁶ half a step of 2⁻⁹."""
    weight = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * size
    weight = weight.clamp(-6e4, 6e4)  # within float16's range
    scale = float(apply([{"op": "float8_scale", "to": "float32"}], weight))
    values = as_array(apply([{"op": "float8"}], weight)).astype(np.float64) * scale
    bound = np.maximum(np.abs(weight.double().numpy()) * (2**-4 + 2**-11), scale * 2**-10 * (1 + 2**-11))
    assert (np.abs(values - weight.double().numpy()) <= bound).all()


def test_zeros_stay_zeros() -> None:
    zeros = apply([{"op": "float8"}], torch.zeros(3, 3))
    assert zeros.dtype == torch.float8_e4m3fn and not as_array(zeros).astype(np.float32).any()
