"""The report of an RTX engine's kernels, of a real build; the fused forms that graphs are written for stay fused."""

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
    """What Stable Diffusion's U-Net is made of: a residual block and an attention."""

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
def built(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The reports of an FP16 engine for sm_89 with a static profile and a dynamic one."""
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    from pnp_trt import backends
    from pnp_trt.backends.base import CompileJob, Profile
    from pnp_trt.build.onnx_export import export

    path = tmp_path_factory.mktemp("block") / "block.onnx"
    export(convert(Block(), RECIPES["fp16"]), {"x": torch.zeros(2, 320, 32, 32)}, "y", path)
    inputs = {"x": ("float32", ("batch", 320, 32, 32))}
    profiles = (Profile("b1", 1, 1, 1), Profile.parse("b2-8"))
    made = backends.get("tensorrt-rtx").compile(
        CompileJob("unet", path, inputs, "fp16", "sm_89", profiles), lambda *_: None
    )
    reports: list[dict[str, Any]] = made.notes["reports"]
    return reports


def test_the_fused_forms_stay_fused(built: list[dict[str, Any]]) -> None:
    assert [row["profile"] for row in built] == ["b1", "b2-8"]
    for row in built:
        assert (row["norms"], row["with_silu"]) == (2, 2)  # group norm + SiLU is one kernel
        assert (row["convolutions"], row["with_residual"]) == (2, 1)  # bias and the residual are the convolution's
        assert row["attentions"] == 1
        assert row["weight_bytes"] > 2 * (2 * 9 * 320 * 320 + 4 * 320 * 320)
    static, open_ = built
    assert static["kernels"] <= 14 and open_["activation_bytes"] is None  # 13 with 1.7.1
    # x, what the norms and convolutions write and read, q, k, v and the sum: from 10 to 40 maps in half precision
    assert 10 < static["activation_bytes"] / (2 * 320 * 32 * 32) < 40
    assert "2 of 2 group norms with SiLU" in str(sentence(static)) and "MiB activations" not in str(sentence(open_))


def test_other_logs_and_strangers_notes_are_left_out() -> None:
    assert report("", ["b1"]) == [] and report("Layers:\nName: a, LayerType: kgen, Inputs: []", ["b1"]) == []
    for note in (None, "x", {}, {"kernels": "3"}, {"profile": "b1", "kernels": 3, "convolutions": None}):
        assert sentence(note) is None


def test_inspect_shows_it(micro_bundles: Path) -> None:
    import json
    from dataclasses import replace

    from pnp_trt.bundle.store import read_manifest
    from pnp_trt.cli.tables import render

    manifest = read_manifest(micro_bundles / "guided")
    row = {"profile": "b1", "kernels": 573, "convolutions": 98, "with_residual": 40, "norms": 61, "with_silu": 45,
           "attentions": 32, "activation_bytes": 1644 << 20, "weight_bytes": 1642 << 20}  # fmt: skip
    unet = manifest.networks["unet"]
    notes = {**unet.compiled.notes, "reports": [row, "nonsense"]}
    told = replace(
        manifest, networks={**manifest.networks, "unet": replace(unet, compiled=replace(unet.compiled, notes=notes))}
    )
    from rich.console import Console

    console = Console(width=400, record=True, file=__import__("io").StringIO())
    console.print(render(micro_bundles / "guided", told, None))
    text = console.export_text()
    assert "b1: 573 kernels, 1,644.0 MiB activations, 1,642.0 MiB weights per evaluation" in text
    assert "nonsense" not in text and json.dumps(told.to_json())
