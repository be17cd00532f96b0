"""Plugging in an autoencoder, alone or instead of a fine-tune's; diffusers decodes the references."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from pnp_trt.build.builder import build
from pnp_trt.build.spec import BuildSpec
from pnp_trt.build.swap.run import PlugSpec, plug
from pnp_trt.bundle.store import open_bundle, read_manifest
from pnp_trt.errors import PnpError
from pnp_trt.runtime.pipeline import Pipeline

from ...conftest import Result
from ...models.families.test_vae import micro_kl

Cli = Callable[..., Result]


def assert_decodes(engine: Path, vae: AutoencoderTiny | AutoencoderKL) -> None:
    """Compare an engine's decoded latents with those of diffusers' autoencoder."""
    pipe = Pipeline.load(engine, provider="cpu", threads=1)
    latents = pipe.noise([0, 1])
    with torch.no_grad():
        pixels = (vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample.clamp(-1, 1) + 1) * 127.5
    assert np.abs(pipe.decode(latents) - pixels.permute(0, 2, 3, 1).numpy()).max() <= 1


def test_an_autoencoder_alone_changes_nothing_else(cli: Cli, micro_base: Path, tuned: Path, tmp_path: Path) -> None:
    """The base may be missing from the machine; the U-Net keeps its precision, weights and provenance."""
    base = shutil.copytree(micro_base, tmp_path / "base")
    cli("build", "--base", base, "--guide", "none", "--precision", "fp16", "--image-to-image", "--out", tmp_path / "a")
    shutil.rmtree(base)
    done = cli("plug", tmp_path / "a", "--vae", tuned / "vae", "--out", tmp_path / "b")
    assert done.code == 0 and "unet: kept" in done.out and "vae_encoder: external weights" in done.out, done
    before, after = (read_manifest(tmp_path / name) for name in "ab")
    changed = {n for n in before.files if before.files[n] != after.files[n]}
    assert changed == {"vae_decoder.onnx.data", "vae_encoder.onnx.data", "golden.npz"}
    own, new = before.base.sha256, after.base.sha256
    assert {part for part in own if own[part] != new[part]} == {"vae", "all"}
    assert f"--vae {tuned / 'vae'}" in after.rebuild and after.base.name == before.base.name
    assert after.networks["unet"].precision == "fp16"
    assert_decodes(tmp_path / "b", AutoencoderTiny.from_pretrained(tuned / "vae").eval())
    assert cli("plug", tmp_path / "a", "--vae", tuned, "--out", tmp_path / "b").out.count("up to date") == 1


def test_an_autoencoder_file_uses_the_engines_config(micro_bundles: Path, tuned: Path, tmp_path: Path) -> None:
    file = tuned / "vae" / "diffusion_pytorch_model.safetensors"
    plugged = plug(PlugSpec(str(micro_bundles / "guided"), vae=file, out=tmp_path / "b"))
    assert_decodes(plugged.folder, AutoencoderTiny.from_pretrained(tuned / "vae").eval())


def test_it_replaces_the_autoencoder_of_the_fine_tune(
    micro_bundles: Path, micro_base: Path, tuned: Path, tmp_path: Path
) -> None:
    plugged = plug(PlugSpec(str(micro_bundles / "guided"), str(tuned), vae=micro_base / "vae", out=tmp_path / "b"))
    ours, engine = plugged.manifest, read_manifest(micro_bundles / "guided")
    fine_tune = BuildSpec(str(tuned)).base_model().fingerprint()
    assert ours.base.sha256["unet"] == fine_tune["unet"] and ours.base.sha256["vae"] == engine.base.sha256["vae"]
    assert ours.plugged.networks["vae_decoder"] == "kept" and ours.plugged.networks["unet"] == "external weights"
    assert_decodes(plugged.folder, AutoencoderTiny.from_pretrained(micro_base / "vae").eval())


def test_a_lora_keeps_the_autoencoder_of_the_engine(micro_base: Path, tmp_path: Path, kohya_lora: Path) -> None:
    """The base on disk has another autoencoder, here even of another class."""
    micro_kl().save_pretrained(tmp_path / "vae")
    build(BuildSpec(str(micro_base), "none", vae=tmp_path / "vae", out=tmp_path / "a"))
    plugged = plug(PlugSpec(str(tmp_path / "a"), loras=(str(kohya_lora),), out=tmp_path / "b"))
    assert plugged.manifest.plugged.networks["vae_decoder"] == "kept"
    assert_decodes(plugged.folder, micro_kl())
    # plugging in only an autoencoder keeps the LoRA
    other = plug(PlugSpec(str(plugged.folder), vae=tmp_path / "vae", out=tmp_path / "c")).manifest
    assert (
        other.base.loras == plugged.manifest.base.loras
        and other.files["unet.onnx.data"] == (plugged.manifest.files["unet.onnx.data"])
    )


def test_an_autoencoder_that_does_not_fit_the_graph_is_refused(
    cli: Cli, micro_bundles: Path, micro_base: Path, tmp_path: Path
) -> None:
    micro_kl().save_pretrained(tmp_path / "kl")
    done = cli("plug", micro_bundles / "guided", "--vae", tmp_path / "kl", "--out", tmp_path / "b")
    assert done.code == 2 and "is an AutoencoderKL" in done.err and "build --vae" in done.err, done
    micro_kl(scaling_factor=0.5).save_pretrained(tmp_path / "scaled")
    done = cli("plug", micro_bundles / "guided", "--vae", tmp_path / "scaled", "--out", tmp_path / "b")
    assert done.code == 2 and "has scaling_factor = 0.5" in done.err, done
    done = cli("plug", micro_bundles / "guided", "--vae", tmp_path / "none", "--out", tmp_path / "b")
    assert done.code == 2 and "--vae is" in done.err, done
    assert not (tmp_path / "b").exists()


def test_an_autoencoder_that_overflows_half_precision_is_refused(micro_base: Path, tmp_path: Path) -> None:
    """The same decoder with ordinary weights passes, and the failed plug leaves nothing behind."""
    micro_kl().save_pretrained(tmp_path / "kl")
    micro_kl(1e6).save_pretrained(tmp_path / "loud")
    build(BuildSpec(str(micro_base), "none", precision="fp16", vae=tmp_path / "kl", out=tmp_path / "a"))
    assert open_bundle(tmp_path / "a").manifest.networks["vae_decoder"].precision == "fp16"
    with pytest.raises(PnpError, match=r"vae_decoder with the weights of --vae .*loud differs from PyTorch"):
        plug(PlugSpec(str(tmp_path / "a"), vae=tmp_path / "loud", out=tmp_path / "b"))
    assert not (tmp_path / "b").exists()
