"""Recipes change the numbers and keep the meaning; parity tells by how much."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from pnp_trt.build.builder import build
from pnp_trt.build.onnx_export import export
from pnp_trt.build.parity import relative_error
from pnp_trt.build.spec import BuildSpec
from pnp_trt.bundle.store import open_bundle, read_manifest
from pnp_trt.errors import InputError
from pnp_trt.precision import recipes as precision
from pnp_trt.precision.recipes import RECIPES, Recipe, convert, reference
from pnp_trt.runtime.pipeline import Pipeline


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.last = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.silu(self.norm(self.first(x))))


X = {"x": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))}


def error_of(recipe: Recipe, path: Path) -> float:
    wanted = reference(Net(), X).numpy()
    export(convert(Net(), recipe), X, "y", path)
    return relative_error(path, X, wanted)


def types(path: Path) -> dict[str, set[str]]:
    """Types that each kind of node puts out."""
    out: dict[str, set[str]] = {}
    for node in ir.load(path).graph:
        out.setdefault(node.op_type, set()).update(o.dtype.name for o in node.outputs if o.dtype is not None)
    return out


def test_types_are_in_the_graph_and_the_boundary_stays_float32(tmp_path: Path) -> None:
    for name, kind in (("fp16", "FLOAT16"), ("bf16", "BFLOAT16")):
        path = tmp_path / name / "net.onnx"
        error = error_of(RECIPES[name], path)
        # the rounding of every result is seen, and stays inside the recipe's limit
        assert RECIPES[name].limit / 100 < error < RECIPES[name].limit
        graph = ir.load(path).graph
        assert {v.dtype.name for v in (*graph.inputs, *graph.outputs)} == {"FLOAT"}
        assert types(path)["Conv"] == types(path)["GroupNormalization"] == {kind}
        norm = next(n for n in graph if n.op_type == "GroupNormalization")
        assert norm.attributes["stash_type"].as_int() == ir.DataType.FLOAT
        assert [p.name for p in path.parent.iterdir() if "stepwise" in p.name] == []


def test_islands_compute_in_float32(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPES["bf16"], islands=("first", "la*"))
    error = error_of(recipe, tmp_path / "net.onnx")
    assert types(tmp_path / "net.onnx")["Conv"] == {"FLOAT"}
    assert error < error_of(RECIPES["bf16"], tmp_path / "plain" / "net.onnx")


def test_a_half_precision_model_has_a_float32_reference() -> None:
    """Widened one layer at a time; the weights are as they were afterwards."""
    half = Net().half()
    before = {k: v.clone() for k, v in half.state_dict().items()}
    wanted = reference(Net().half().float(), X)
    assert torch.equal(reference(half, X), wanted)
    assert all(torch.equal(v, before[k]) and v.dtype == torch.float16 for k, v in half.state_dict().items())


def test_the_bundled_format_in_half_precision(
    micro_base: Path, micro_guide: Path, micro_bundles: Path, tmp_path: Path
) -> None:
    spec = BuildSpec(str(micro_base), str(micro_guide), precision="fp16", out=tmp_path / "half")
    build(spec)
    manifest = open_bundle(tmp_path / "half").manifest
    assert manifest.precision == "fp16" and manifest.parity.limit == RECIPES["fp16"].limit
    assert all(1e-5 < e < 5e-3 for e in manifest.parity.relative_error.values())
    assert {n.precision for n in manifest.networks.values()} == {"fp16"}
    sizes = [sum(f.size for n, f in read_manifest(d).files.items() if n.endswith(".data")) for d in
             (tmp_path / "half", micro_bundles / "guided")]  # fmt: skip
    assert sizes[0] * 2 == sizes[1]
    half, full = (Pipeline.load(d, provider="cpu")("a cat", steps=4)[0].pixels.astype(int) for d in
                  (tmp_path / "half", micro_bundles / "guided"))  # fmt: skip
    assert 0 <= np.abs(half - full).mean() < 3


def test_a_decoder_that_overflows_falls_back(micro_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pnp_trt.models.teacher import BaseModel

    load = BaseModel.vae

    def loud(self: BaseModel) -> nn.Module:
        vae = load(self)
        with torch.no_grad():  # large inside, the same outside
            vae.decoder.layers[0].weight *= 1e6
            vae.decoder.layers[0].bias *= 1e6
            vae.decoder.layers[-1].weight /= 1e6
        return vae

    monkeypatch.setattr(BaseModel, "vae", loud)
    build(BuildSpec(str(micro_base), "none", precision="fp16", out=tmp_path / "loud"))
    networks = read_manifest(tmp_path / "loud").networks
    assert networks["vae_decoder"].precision == "fp32" and networks["unet"].precision == "fp16"
    assert "nan in fp16" in (networks["vae_decoder"].fallback or "")
    assert networks["vae_decoder"].parity.graph < 1e-4


def test_precisions_are_refused_by_name(micro_base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="precision is 'fp12'; known: fp32, fp16, bf16"):
        precision.recipe("fp12")
    with pytest.raises(InputError, match="'onnxruntime' does not support bf16; it supports: fp32, fp16"):
        build(BuildSpec(str(micro_base), "none", precision="bf16", out=tmp_path / "x"))
    assert json.dumps(dataclasses.asdict(RECIPES["fp16"]))
