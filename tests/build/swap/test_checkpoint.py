"""Checkpoints with original keys, sharded U-Net folders, and weights read back from a graph."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pnp_trt.build.swap.checkpoint import find
from pnp_trt.build.swap.run import PlugSpec, plug
from pnp_trt.bundle.store import sha256
from pnp_trt.errors import InputError, PnpError
from pnp_trt.graph.weights import apply, invert
from pnp_trt.models.files import weight_files

from ...models.original import original_key

LDM = {"unet": "model.diffusion_model.", "text_encoder": "cond_stage_model.transformer."}


@pytest.fixture(scope="module")
def original(tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fine-tune's U-Net and text encoder in one file with original keys."""
    unet = load_file(tuned / "unet" / "diffusion_pytorch_model.safetensors")
    text = load_file(tuned / "text_encoder" / "model.safetensors")
    weights = {LDM["unet"] + original_key(k): v for k, v in unet.items()}
    assert len(weights) == len(unet)
    weights |= {f"{LDM['text_encoder']}text_model.{k.removeprefix('text_model.')}": v.clone() for k, v in text.items()}
    weights |= {f"{LDM['text_encoder']}text_model.embeddings.position_ids": torch.arange(77)[None]}
    path = tmp_path_factory.mktemp("original") / "original.safetensors"
    save_file(weights, path)
    return path


def test_an_original_checkpoint_gives_the_same_weights(
    micro_bundles: Path, original: Path, tuned: Path, tmp_path: Path
) -> None:
    ours = plug(PlugSpec(str(micro_bundles / "guided"), str(original), out=tmp_path / "original"))
    theirs = plug(PlugSpec(str(micro_bundles / "guided"), str(tuned), out=tmp_path / "folder"))
    assert ours.manifest.plugged.networks["vae_decoder"] == "kept"
    for name in ("unet.onnx.data", "text_encoder.onnx.data"):
        assert sha256(ours.folder / name) == sha256(theirs.folder / name)


def test_an_unknown_original_weight_is_refused(micro_bundles: Path, original: Path, tmp_path: Path) -> None:
    weights = load_file(original) | {f"{LDM['unet']}control.weight": torch.zeros(3)}
    save_file(weights, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match=r"1 weight \(model.diffusion_model.control.weight\) left over"):
        plug(PlugSpec(str(micro_bundles / "guided"), str(tmp_path / "odd.safetensors"), out=tmp_path / "x"))


def test_a_sharded_unet_folder_equals_a_single_file(
    micro_bundles: Path, tuned: Path, tuned_unet: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    shutil.copyfile(tuned / "unet" / "config.json", folder / "config.json")
    weights = load_file(tuned_unet)
    parts = {"a.safetensors": list(weights)[::2], "b.safetensors": list(weights)[1::2]}
    for name, keys in parts.items():
        save_file({k: weights[k] for k in keys}, folder / name)
    index = {"weight_map": {k: name for name, keys in parts.items() for k in keys}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert [p.name for p in weight_files(folder)] == ["a.safetensors", "b.safetensors"]
    one = plug(PlugSpec(str(micro_bundles / "plain"), str(folder), out=tmp_path / "one"))
    other = plug(PlugSpec(str(micro_bundles / "plain"), str(tuned_unet), out=tmp_path / "other"))
    assert sha256(one.folder / "unet.onnx.data") == sha256(other.folder / "unet.onnx.data")


def test_another_seed_changes_only_the_random_unet() -> None:
    """Plugging such a U-Net therefore costs as much as plugging a real fine-tuned U-Net."""
    one, other = find("random:sd15").fingerprint(), find("random:sd15#2").fingerprint()
    assert {k for k in one if one[k] != other[k]} == {"unet"}
    with pytest.raises(InputError, match="the seed of 'random:sd15#x' is not a whole number; write random:sd15#2"):
        find("random:sd15#x")


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_transforms_can_be_undone(shape: list[int], data: st.DataObject) -> None:
    transform: list[dict] = [{"op": "cast", "to": "float32"}]
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    for kind in data.draw(st.lists(st.sampled_from(["transpose", "reshape"]), max_size=3)):
        now = apply(transform, tensor)
        step = (
            {"perm": data.draw(st.permutations(range(now.ndim)))} if kind == "transpose" else {"shape": [-1, *(1,) * 2]}
        )
        transform.append({"op": kind, **step})
    assert torch.equal(invert(transform, apply(transform, tensor), tuple(shape)), tensor)
    with pytest.raises(PnpError, match="transform 'quantize' of weights.json cannot be undone"):
        invert([{"op": "quantize"}], tensor, tuple(shape))
