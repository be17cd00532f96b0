"""The report of an RTX engine's kernels, from real compilations, and the fusions that the graphs rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pnp_trt.backends.tensorrt.layer_report import report, sentence
from pnp_trt.precision.recipes import RECIPES

from .test_tensorrt import convert


class Block(nn.Module):
    """The parts of Stable Diffusion's U-Net: a residual block and self-attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList([nn.GroupNorm(32, 320), nn.GroupNorm(32, 320)])
        self.convs = nn.ModuleList([nn.Conv2d(320, 320, 3, padding=1), nn.Conv2d(320, 320, 3, padding=1)])
        self.qkv, self.out = nn.Linear(320, 960), nn.Linear(320, 320)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            hidden = conv(nn.functional.silu(norm(hidden)))
        x = x + hidden
        tokens = x.flatten(2).transpose(1, 2)
        parts = self.qkv(tokens).chunk(3, -1)
        q, k, v = (part.view(x.shape[0], -1, 5, 64).transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return tokens + self.out(mixed)


@pytest.fixture(scope="module")
def eight_bits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The reports in FP16, INT8 with one scale per weight and per channel, FP8, and INT8 weights only, by name."""
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    from pnp_trt import backends
    from pnp_trt.backends.base import CompileJob, Profile
    from pnp_trt.build.onnx_export import export
    from pnp_trt.precision.int8.qdq import FLOAT8, INT8, INT8_ONE_SCALE, quantize_graph, quantize_weights
    from pnp_trt.precision.int8.record import LayerRange

    layers = ("convs.0", "convs.1")
    choices = {layer: LayerRange(4.0) for layer in layers}
    rewrites: dict[str, Any] = {
        "fp16": lambda *_: None,
        "int8": lambda p, w: quantize_graph(p, w, choices, INT8_ONE_SCALE),
        "int8 by channel": lambda p, w: quantize_graph(p, w, choices, INT8),
        "fp8": lambda p, w: quantize_graph(p, w, choices, FLOAT8),
        "int8-weights": lambda p, w: quantize_weights(p, w, layers),
    }
    reports = {}
    for name, rewrite in rewrites.items():
        path = tmp_path_factory.mktemp("block") / "block.onnx"
        weights = export(convert(Block(), RECIPES["fp16"]), {"x": torch.zeros(2, 320, 32, 32)}, "y", path)
        rewrite(path, weights)
        inputs = {"x": ("float32", ("batch", 320, 32, 32))}
        job = CompileJob("unet", path, inputs, "fp16", "sm_89", (Profile("b1", 1, 1, 1),))
        (reports[name],) = backends.get("tensorrt-rtx").compile(job, lambda *_: None).notes["reports"]
    return reports


def test_int8_with_one_scale_per_weight_keeps_kernels_fused(eight_bits: dict[str, dict[str, Any]]) -> None:
    """Why ``int8`` has one scale per weight on TensorRT-RTX, and why ``int8-weights`` is not faster than FP16."""
    half, int8, by_channel = (eight_bits[name] for name in ("fp16", "int8", "int8 by channel"))
    counts = ("kernels", "convolutions", "with_residual")
    assert [int8[c] for c in counts] == [half[c] for c in counts]  # 13 kernels with 1.7.1
    assert int8["weight_bytes"] < half["weight_bytes"] and int8["activation_bytes"] < half["activation_bytes"]
    # with a scale per channel, convolutions write float32, and scale, bias and residual are separate kernels
    assert by_channel["with_residual"] == 0 and by_channel["kernels"] >= int8["kernels"] + 2
    assert by_channel["activation_bytes"] > 1.2 * int8["activation_bytes"]
    fp8, weights = eight_bits["fp8"], eight_bits["int8-weights"]
    assert fp8["kernels"] <= half["kernels"] + 1  # FP8 fuses the bias, but not the residual
    assert fp8["weight_bytes"] < half["weight_bytes"] and fp8["activation_bytes"] < by_channel["activation_bytes"]
    # each weight is read in 8 bits, written in 16 bits and read again
    assert weights["kernels"] >= half["kernels"] + 2
    assert weights["activation_bytes"] + weights["weight_bytes"] > half["activation_bytes"] + half["weight_bytes"]


class Attention(nn.Module):
    """Self-attention as in a transformer block: a norm, projections without bias, and one with bias and residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(320), nn.Linear(320, 320)
        self.q, self.k, self.v = (nn.Linear(320, 320, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (each(h).unflatten(2, (5, 64)).transpose(1, 2) for each in (self.q, self.k, self.v))
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_only_the_projection_after_attention_needs_more_kernels_in_8_bits(tmp_path: Path) -> None:
    """Why 8-bit recipes take queries, keys and values, but not the projection after attention (``FUSED_IN_FLOAT``)."""
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    from pnp_trt import backends
    from pnp_trt.backends.base import CompileJob, Profile
    from pnp_trt.build.onnx_export import export
    from pnp_trt.precision.int8.qdq import FLOAT8, quantize_graph
    from pnp_trt.precision.int8.record import LayerRange

    reports = {}
    for name, layers in {"fp16": (), "products": ("q", "k", "v"), "behind": ("q", "k", "v", "out")}.items():
        path = tmp_path / f"{name}.onnx"
        weights = export(convert(Attention(), RECIPES["fp16"]), {"x": torch.zeros(2, 1024, 320)}, "y", path)
        if layers:
            quantize_graph(path, weights, {layer: LayerRange(4.0) for layer in layers}, FLOAT8)
        inputs = {"x": ("float32", ("batch", 1024, 320))}
        job = CompileJob("unet", path, inputs, "fp16", "sm_89", (Profile("b1", 1, 1, 1),))
        (reports[name],) = backends.get("tensorrt-rtx").compile(job, lambda *_: None).notes["reports"]
    half, products, behind = (reports[name] for name in ("fp16", "products", "behind"))
    assert products["kernels"] <= half["kernels"] < behind["kernels"]
    assert behind["weight_bytes"] < products["weight_bytes"] < half["weight_bytes"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The reports of an FP16 engine for sm_89 with a static and a dynamic profile."""
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    from pnp_trt import backends
    from pnp_trt.backends.base import CompileJob, Profile
    from pnp_trt.build.onnx_export import export

    path = tmp_path_factory.mktemp("block") / "block.onnx"
    export(convert(Block(), RECIPES["fp16"]), {"x": torch.zeros(2, 320, 32, 32)}, "y", path)
    inputs = {"x": ("float32", ("batch", 320, 32, 32))}
    profiles = (Profile("b1", 1, 1, 1), Profile.parse("b2-8"))
    compiled = backends.get("tensorrt-rtx").compile(
        CompileJob("unet", path, inputs, "fp16", "sm_89", profiles), lambda *_: None
    )
    reports: list[dict[str, Any]] = compiled.notes["reports"]
    return reports


def test_norms_and_convolutions_stay_fused(built: list[dict[str, Any]]) -> None:
    assert [row["profile"] for row in built] == ["b1", "b2-8"]
    for row in built:
        assert (row["norms"], row["with_silu"]) == (2, 2)  # group norm + SiLU is one kernel
        assert (row["convolutions"], row["with_residual"]) == (2, 1)  # bias and residual are fused into the convolution
        assert row["attentions"] == 1
        assert row["weight_bytes"] > 2 * (2 * 9 * 320 * 320 + 4 * 320 * 320)
    static, open_ = built
    assert static["kernels"] <= 14 and open_["activation_bytes"] is None  # 13 with 1.7.1
    # x, inputs and outputs of norms and convolutions, q, k, v and the sum: 10 to 40 maps in half precision
    assert 10 < static["activation_bytes"] / (2 * 320 * 32 * 32) < 40
    assert "2 of 2 group norms with SiLU" in str(sentence(static)) and "MiB activations" not in str(sentence(open_))


def test_other_logs_and_malformed_notes_are_ignored() -> None:
    assert report("", ["b1"]) == [] and report("Layers:\nName: a, LayerType: kgen, Inputs: []", ["b1"]) == []
    for note in (None, "x", {}, {"kernels": "3"}, {"profile": "b1", "kernels": 3, "convolutions": None}):
        assert sentence(note) is None


def test_inspect_shows_the_report(micro_bundles: Path) -> None:
    import json
    from dataclasses import replace

    from pnp_trt.bundle.store import read_manifest
    from pnp_trt.cli.tables import render

    manifest = read_manifest(micro_bundles / "guided")
    row = {"profile": "b1", "kernels": 573, "convolutions": 98, "with_residual": 40, "norms": 61, "with_silu": 45,
           "attentions": 32, "activation_bytes": 1644 << 20, "weight_bytes": 1642 << 20}  # fmt: skip
    unet = manifest.networks["unet"]
    notes = {**unet.compiled.notes, "reports": [row, "nonsense"]}
    with_reports = replace(
        manifest, networks={**manifest.networks, "unet": replace(unet, compiled=replace(unet.compiled, notes=notes))}
    )
    from rich.console import Console

    console = Console(width=400, record=True, file=__import__("io").StringIO())
    console.print(render(micro_bundles / "guided", with_reports, None))
    text = console.export_text()
    assert "b1: 573 kernels, 1,644.0 MiB activations, 1,642.0 MiB weights per evaluation" in text
    assert "nonsense" not in text and json.dumps(with_reports.to_json())
