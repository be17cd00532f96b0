"""The bundles that are shipped without their weights are current and complete; damaged files are refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.torch import load_file

from pnp_trt.assets import ROOT
from pnp_trt.bundle import packed
from pnp_trt.bundle.store import open_bundle
from pnp_trt.errors import BundleCorrupt
from pnp_trt.models.identity import guide_identity

NAMES = ("emoji-teacher", "emoji-tiny")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_teacher_and_the_guided_bundle_are_shipped() -> None:
    assert packed.packed_bundles() == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_bundle_matches_the_shipped_weights(name: str) -> None:
    """If this fails, make the bundles again with ``python -m benchmarks.emoji.packed``."""
    manifest = json.loads((ROOT / "bundles" / name / "manifest.json").read_text())
    emoji = ROOT / "emoji"
    assert manifest["base"]["sha256"]["unet"] == sha256(emoji / "unet" / "diffusion_pytorch_model.safetensors")
    assert manifest["base"]["sha256"]["text_encoder"] == sha256(emoji / "text_encoder" / "model.safetensors")
    assert manifest["base"]["sha256"]["vae"] == sha256(emoji / "vae" / "diffusion_pytorch_model.safetensors")
    assert (manifest["guide"] is None) == (name == "emoji-teacher")
    if manifest["guide"]:
        config = json.loads((ROOT / "guides" / "emoji-tiny" / "config.json").read_text())
        assert {k: v for k, v in manifest["configs"]["guide"].items() if k in config} == config


def test_assembled_weights_equal_the_checkpoints(tmp_path: Path) -> None:
    """Compare the weights read with the onnx package with the checkpoints read with torch."""
    packed.assemble("emoji-tiny", tmp_path / "engines" / "bundle")
    bundle = open_bundle(tmp_path / "engines" / "bundle")
    maps = json.loads((bundle.folder / "weights.json").read_text())["networks"]
    emoji = ROOT / "emoji"
    checkpoints = {
        "unet": load_file(emoji / "unet" / "diffusion_pytorch_model.safetensors"),
        "text_encoder": load_file(emoji / "text_encoder" / "model.safetensors"),
        "vae": load_file(emoji / "vae" / "diffusion_pytorch_model.safetensors"),
        "guide": load_file(ROOT / "guides" / "emoji-tiny" / "diffusion_pytorch_model.safetensors"),
    }
    compared = 0
    for name, network in bundle.manifest.networks.items():
        model = onnx.load(bundle.folder / network.graph)
        tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        for initializer, weight in maps[name]["weights"].items():
            expected = checkpoints[weight["source"]][weight["key"]].float()
            for step in weight["transform"]:
                if step["op"] == "transpose":
                    expected = expected.permute(*step["perm"])
                elif step["op"] == "reshape":
                    expected = expected.reshape(step["shape"])
            np.testing.assert_array_equal(tensors[initializer], expected.numpy())
            compared += 1
    assert compared > 400


def test_an_existing_bundle_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "manifest.json").write_text("another's")
    packed.assemble("emoji-tiny", folder)
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("manifest.json", "another's")]


@pytest.mark.parametrize("damage", ["changed", "missing", "cut short"])
def test_a_damaged_checkpoint_is_refused_and_leaves_nothing(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "assets"
    for part in ("bundles/emoji-tiny", "emoji", "guides/emoji-tiny"):
        shutil.copytree(ROOT / part, root / part)
    checkpoint = root / "guides" / "emoji-tiny" / "diffusion_pytorch_model.safetensors"
    data = bytearray(checkpoint.read_bytes())
    data[-1] ^= 1
    checkpoint.write_bytes(data if damage == "changed" else data[:4000])
    if damage == "missing":
        checkpoint.unlink()
    monkeypatch.setattr(packed, "ROOT", root)
    with pytest.raises(BundleCorrupt, match="install pnp-trt again"):
        packed.assemble("emoji-tiny", tmp_path / "engines" / "bundle")
    assert not [p for p in (tmp_path / "engines").iterdir() if not p.name.endswith(".lock")]


def test_calibration_records_match_the_shipped_weights() -> None:
    """If this fails, make them again with ``pnp-trt calibrate --base emoji --guide NAME --force``."""
    base = json.loads((ROOT / "bundles" / "emoji-tiny" / "manifest.json").read_text())["base"]["sha256"]["all"]
    records = sorted((Path(__file__).parents[2] / "calibration").glob("emoji-*.int8.json"))
    assert [path.name for path in records] == ["emoji-tiny-8.int8.json", "emoji-tiny.int8.json"]
    for path in records:
        record = json.loads(path.read_text())
        assert record["base"] == {"name": "emoji", "sha256": base}
        assert record["guide"] == guide_identity("emoji", record["guide"]["name"])
