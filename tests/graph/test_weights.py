"""The origin of every initialiser is recorded, and the graph depends only on the architecture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from pnp_trt.build.onnx_export import export
from pnp_trt.bundle.store import sha256
from pnp_trt.errors import PnpError
from pnp_trt.graph.weights import WeightMap, apply, check_complete
from pnp_trt.models.bases import resolve
from pnp_trt.models.guides.load import load_guide
from pnp_trt.precision.recipes import RECIPES, convert

from ..exports import unshared


@pytest.fixture(autouse=True)
def own_traces() -> Iterator[None]:
    with unshared():
        yield


class Net(nn.Module):
    """Equal norms, a zero bias and a linear layer, which optimisers tend to merge."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.unet = nn.ModuleDict(
            {"a": nn.GroupNorm(2, 8), "b": nn.GroupNorm(2, 8), "c": nn.Conv2d(8, 8, 1), "d": nn.Linear(4, 4)}
        )
        if seed:
            for p in self.parameters():
                nn.init.normal_(p)
        else:
            nn.init.zeros_(self.unet["c"].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.unet["d"](self.unet["c"](self.unet["b"](self.unet["a"](x))))


def export_net(seed: int, folder: Path, precision: str = "fp32") -> tuple[Net, WeightMap, Path]:
    net = Net(seed)
    path = folder / f"{seed}-{precision}" / "net.onnx"
    weights = export(convert(net, RECIPES[precision]), {"x": torch.zeros(2, 8, 4, 4)}, "y", path)
    return net, weights, path


def test_equal_weights_are_not_merged_and_the_graph_depends_only_on_the_architecture(tmp_path: Path) -> None:
    """A checkpoint of ones and zeros gives the same graph as one of random numbers."""
    _, plain, first = export_net(0, tmp_path)
    _, other, second = export_net(1, tmp_path)
    assert plain == other
    assert set(plain.weights) == {f"unet.{m}.{p}" for m in "abc" for p in ("weight", "bias")} | {
        "unet.d.weight.transposed", "unet.d.bias",
    }  # fmt: skip
    assert sha256(first) == sha256(second)
    assert sha256(first.with_name("net.onnx.data")) != sha256(second.with_name("net.onnx.data"))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_data_file_has_the_transformed_weights_in_order(tmp_path: Path, precision: str) -> None:
    _, weights, path = export_net(1, tmp_path, precision)
    check_complete(path, weights)
    own = Net(1).state_dict()  # float32, as a checkpoint has it
    transformed = [apply(w["transform"], own[f"{w['source']}.{w['key']}"]) for w in weights.weights.values()]
    data = b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in transformed)
    assert data == path.with_name("net.onnx.data").read_bytes()


def test_an_incomplete_map_is_refused(tmp_path: Path) -> None:
    _, weights, path = export_net(1, tmp_path)
    weights.weights.pop("unet.c.bias")
    with pytest.raises(PnpError, match="differ in 1 initialisers, for example \\['unet.c.bias'\\]"):
        check_complete(path, weights)


def test_unknown_transforms_are_refused() -> None:
    with pytest.raises(PnpError, match="transform 'rotate'"):
        apply([{"op": "rotate"}], torch.zeros(1))


def test_a_bundles_map_covers_every_initialiser(micro_bundles: Path, micro_base: Path, micro_guide: Path) -> None:
    """In the bundle's graphs, after the backend's rewrites, weights equal the transformed ones of the checkpoint."""
    networks = json.loads((micro_bundles / "guided" / "weights.json").read_text())["networks"]
    base = resolve(str(micro_base))
    sources: dict[str, dict[str, Any]] = {
        "unet": base.unet().state_dict(),
        "guide": load_guide(str(micro_guide)).state_dict(),
        "text_encoder": base.text_encoder().state_dict(),
        "vae": base.vae().state_dict(),
    }
    used: dict[str, set[str]] = {name: set() for name in sources}
    for network, maps in networks.items():
        initializers = ir.load(micro_bundles / "guided" / f"{network}.onnx").graph.initializers
        assert sorted(initializers) == sorted([*maps["weights"], *maps["constants"]])
        for name, w in maps["weights"].items():
            used[w["source"]].add(w["key"])
            expected = apply(w["transform"], sources[w["source"]][w["key"]]).numpy()
            assert np.array_equal(expected, initializers[name].const_value.numpy()), name
        # constants are small: shapes, scales, frequencies, a causal mask
        assert max(initializers[n].const_value.size for n in maps["constants"]) <= 77 * 77
    assert used["unet"] == set(sources["unet"]) and used["guide"] == set(sources["guide"])
    assert used["text_encoder"] == set(sources["text_encoder"])
    assert used["vae"] == {k for k in sources["vae"] if k.startswith("decoder.")}
