"""Lowering replaces nodes without changing the results; exports are deterministic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from pnp_trt.build.onnx_export import export
from pnp_trt.build.parity import relative_error
from pnp_trt.bundle.store import sha256
from pnp_trt.graph.lower import for_onnxruntime_cpu


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16, eps=1e-3)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.norm(self.conv(x)))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    export(Block(), {"x": torch.zeros(2, 4, 8, 8)}, "y", tmp_path / "block.onnx")
    return tmp_path / "block.onnx"


def ops(path: Path) -> list[str]:
    return [n.op_type for n in onnx.load(path, load_external_data=False).graph.node]


def test_export_keeps_group_norm_native(exported: Path) -> None:
    assert "GroupNormalization" in ops(exported)
    assert onnx.load(exported, load_external_data=False).opset_import[0].version == 23
    onnx.checker.check_model(str(exported), full_check=True)


def test_lowering_keeps_the_results_for_any_batch(exported: Path) -> None:
    assert for_onnxruntime_cpu(exported).counts == {"GroupNormalization": 1, "Attention": 0}
    assert "GroupNormalization" not in ops(exported) and "InstanceNormalization" in ops(exported)
    onnx.checker.check_model(str(exported), full_check=True)
    for batch in (1, 3):
        x = torch.randn(batch, 4, 8, 8) * 3 + 1
        with torch.no_grad():
            reference = Block()(x).numpy()
        assert relative_error(exported, {"x": x}, reference) < 1e-6


def test_lowering_does_not_change_other_graphs(tmp_path: Path) -> None:
    export(nn.Conv2d(4, 4, 1), {"input": torch.zeros(2, 4, 8, 8)}, "y", tmp_path / "conv.onnx")
    before = (tmp_path / "conv.onnx").read_bytes()
    assert not any(for_onnxruntime_cpu(tmp_path / "conv.onnx").counts.values())
    assert (tmp_path / "conv.onnx").read_bytes() == before


def test_equal_inputs_give_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export(Block(), {"x": torch.zeros(2, 4, 8, 8)}, "y", tmp_path / name / "block.onnx")
        for_onnxruntime_cpu(tmp_path / name / "block.onnx")
    for file in ("block.onnx", "block.onnx.data"):
        assert sha256(tmp_path / "a" / file) == sha256(tmp_path / "b" / file)


class Attend(nn.Module):
    """Cross-attention as in diffusers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(12, 16), nn.Linear(12, 16)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(source).view(source.shape[0], -1, 4, 4).transpose(1, 2)
            for layer, source in ((self.q, x), (self.k, text), (self.v, text))
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(x.shape[0], -1, 16)


def test_lowered_attention_takes_joined_heads(tmp_path: Path) -> None:
    path = tmp_path / "attend.onnx"
    export(Attend(), {"x": torch.randn(2, 9, 16), "text": torch.randn(2, 7, 12)}, "y", path)
    assert ops(path).count("Transpose") == 4
    assert for_onnxruntime_cpu(path).counts == {"GroupNormalization": 0, "Attention": 1}
    assert "Attention" in ops(path) and "Transpose" not in ops(path)
    onnx.checker.check_model(str(path), full_check=True)
    for batch in (1, 3):
        inputs = {"x": torch.randn(batch, 9, 16) * 3, "text": torch.randn(batch, 7, 12) * 3}
        with torch.no_grad():
            reference = Attend()(**inputs).numpy()
        assert relative_error(path, inputs, reference) < 1e-5


def test_relative_error_detects_deviations_and_is_nan_for_invalid_references(exported: Path) -> None:
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        reference = Block()(x).numpy()
    assert relative_error(exported, {"x": x}, reference * 1.01) == pytest.approx(0.01, rel=0.05)
    assert np.isnan(relative_error(exported, {"x": x}, reference[:1]))
    assert np.isnan(relative_error(exported, {"x": x}, np.full_like(reference, np.nan)))
