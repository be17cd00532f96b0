"""Scaling of latents between U-Net and autoencoder, compared with diffusers' pipelines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from pnp_trt.errors import InputError
from pnp_trt.models.bases import resolve
from pnp_trt.models.latents import from_vae, to_vae
from pnp_trt.models.other_vae import OtherVae
from pnp_trt.models.wrappers import VaeDecoder

NORMAL = {"latents_mean": [-1.6, 1.1, 0.4, -0.2], "latents_std": [8.4, 5.9, 5.5, 0.7]}


def autoencoder(**config: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, **config).eval()


def test_images_of_normalised_latents_equal_diffusers(micro_sdxl: Path) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(micro_sdxl, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae = autoencoder(scaling_factor=0.5, force_upcast=False, **NORMAL)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = dict(num_inference_steps=1, guidance_scale=1.0, latents=noise, height=64, width=64)
    latents = pipe("a cat", output_type="latent", **options).images
    expected = pipe("a cat", output_type="pt", **options).images
    with torch.no_grad():
        decoded = VaeDecoder(pipe.vae)(latents)[..., : expected.shape[-2], : expected.shape[-1]]
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [{}, {"shift_factor": 0.3}, NORMAL], ids=["factor", "shift", "normal"])
def test_scaling_latents_and_back_is_the_identity(config: dict[str, Any]) -> None:
    vae = autoencoder(scaling_factor=0.18, **config)
    code = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(to_vae(from_vae(code, vae), vae), code)
    mean = torch.tensor(config.get("latents_mean", [config.get("shift_factor", 0.0)] * 4)).double()
    std = torch.tensor(config.get("latents_std", [1.0] * 4)).double()
    expected = (code.double().movedim(1, -1) - mean) / std * 0.18
    torch.testing.assert_close(from_vae(code, vae).double().movedim(1, -1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("latents_std", [1.0, 0.0, 1.0, 1.0], "must be a number from 1e-06"),
        ("latents_std", [1.0], "latents_std"),
        ("latents_mean", [0.0, "a", 0.0, 0.0], "must be a number from -1e"),
        ("latents_mean", 3, "latents_mean"),
    ],
)
def test_invalid_latent_statistics_are_refused(
    micro_base: Path, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    folder = Path(shutil.copytree(micro_base, tmp_path / "base"))
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | NORMAL | {key: value}))
    with pytest.raises(InputError, match=message):
        resolve(str(folder)).own_vae()


def test_an_autoencoder_with_other_latents_is_refused(tmp_path: Path) -> None:
    autoencoder(**NORMAL).save_pretrained(tmp_path / "vae")
    with pytest.raises(
        InputError, match=r"latents_mean = \[-1.6, 1.1, 0.4, -0.2\], but the base's autoencoder has None"
    ):
        OtherVae.find(tmp_path / "vae").config({"latent_channels": 4, "scaling_factor": 0.18215})
