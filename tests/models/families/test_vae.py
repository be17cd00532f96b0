"""Autoencoders: replacing the base's, and half precision checked on latents of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from pnp_trt import backends
from pnp_trt.build import parity
from pnp_trt.build.network import NetworkExport
from pnp_trt.build.parity import golden_rows, latents_of_images
from pnp_trt.build.spec import BuildSpec
from pnp_trt.bundle.store import open_bundle
from pnp_trt.errors import InputError
from pnp_trt.precision.recipes import FP16
from pnp_trt.runtime.pipeline import Pipeline

from ...conftest import Result
from ..original import original_vae


def micro_kl(loud: float = 1.0, **config: Any) -> AutoencoderKL:
    """Return a small ``AutoencoderKL`` for the micro teacher's latents.

    Args:
        loud: factor of the encoder's latents; the decoder is the same.
    """
    torch.manual_seed(4)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=4, **({"scaling_factor": 1.0} | config),
    )  # fmt: skip
    with torch.no_grad():
        vae.quant_conv.weight.mul_(loud)
    return vae.eval()


@pytest.fixture
def loud(tmp_path: Path) -> Path:
    """A VAE whose decoder overflows in float16 on latents of images, but not on unit noise."""
    micro_kl(1e6).save_pretrained(tmp_path / "loud")
    return tmp_path / "loud"


def test_latents_of_images_come_from_the_encoder() -> None:
    vae = micro_kl(3.0, scaling_factor=0.5)
    latents = latents_of_images(vae, torch.zeros(3, 4, 8, 40), 4)
    assert (
        latents.shape == (3, 4, 8, 40)
        and torch.equal(latents[0], latents[2])
        and not torch.equal(latents[0], latents[1])
    )
    board = torch.ones(1, 3, 64, 64)
    board[..., :32, :32] = board[..., 32:, 32:] = -1
    with torch.no_grad():
        expected = vae.encode(board).latent_dist.mean * 0.5
    torch.testing.assert_close(latents[1, :, :, :16], expected[0, :, :8])


def test_a_single_row_contains_both_images() -> None:
    vae = micro_kl()
    two, one = (latents_of_images(vae, torch.zeros(rows, 4, 20, 40), 4) for rows in (2, 1))
    assert one.shape == (1, 4, 20, 40)
    torch.testing.assert_close(one[0, :, :16, :16], two[0, :, :16, :16])
    torch.testing.assert_close(one[0, :, 16:, 16:32], two[1, :, :4, :16])


@pytest.mark.parametrize(
    ("network", "weights", "size", "rows"),
    [("vae_decoder", 50_000_000, (512, 512), 1), ("vae_decoder", 50_000_000, (256, 256), 2),
     ("unet", 10, (512, 512), 2), ("unet", 860_000_000, (64, 64), 1), ("text_encoder", 123_000_000, (512, 512), 2)],
)  # fmt: skip
def test_number_of_golden_rows(network: str, weights: int, size: tuple[int, int], rows: int) -> None:
    assert golden_rows(network, weights, size) == rows


def test_bfloat16_comes_before_float32_where_a_backend_runs_it() -> None:
    def order(backend: str, network: str, target: str | None = None) -> list[str]:
        plan: Any = SimpleNamespace()
        return [r.name for r in NetworkExport(backends.get(backend), FP16, plan, target=target).recipes(network)]

    assert order("torch", "vae_decoder") == order("tensorrt-rtx", "vae_decoder") == ["fp16", "bf16", "fp32"]
    assert order("onnxruntime", "vae_decoder") == ["fp16", "fp32"] and order("torch", "unet") == ["fp16"]
    assert order("tensorrt-rtx", "vae_decoder", "sm_75") == ["fp16", "fp32"]  # Turing has no bfloat16
    assert order("tensorrt-rtx", "vae_decoder", "sm_80") == ["fp16", "bf16", "fp32"]


@pytest.mark.parametrize("large", [False, True])
def test_a_decoder_that_overflows_on_images_is_built_in_bfloat16(
    large: bool, cli: Callable[..., Result], micro_base: Path, loud: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if large:  # one golden row has noise and latents of images
        monkeypatch.setattr(parity, "LARGE_IMAGE", 0)
    out = tmp_path / "engine"
    done = cli("build", "--base", micro_base, "--guide", "none", "--backend", "torch", "--precision", "fp16",
               "--vae", loud, "--out", out)  # fmt: skip
    assert done.code == 0 and "vae_decoder stays in bf16" in done.out, (done.out, done.err)
    manifest = open_bundle(out).manifest
    assert manifest.networks["unet"].precision == "fp16" and manifest.networks["vae_decoder"].precision == "bf16"
    assert manifest.networks["vae_decoder"].parity.rows == (1 if large else 2)
    assert f"--vae {loud}" in manifest.rebuild
    plain = BuildSpec(str(micro_base)).base_model().fingerprint()
    assert {k for k in plain if plain[k] != manifest.base.sha256[k]} == {"vae", "all"}
    pipe = Pipeline.load(out, provider="cpu", threads=1)
    latents = pipe.noise([0, 1])
    with torch.no_grad():
        expected = (micro_kl().decode(torch.from_numpy(latents)).sample.permute(0, 2, 3, 1) + 1) * 127.5
    assert np.abs(pipe.decode(latents) - expected.clamp(0, 255).numpy()).mean() < 1.5


def test_a_single_file_vae_under_original_names_equals_its_folder(micro_base: Path, loud: Path, tmp_path: Path) -> None:
    folder = BuildSpec(str(micro_base), vae=loud).base_model()
    # a file has no config, so the base's is used: the file must be of the same class as the base's VAE
    state = {k: v.contiguous() for k, v in original_vae(micro_kl(1e6).state_dict(), 3).items()}
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(InputError, match=r"vae.safetensors is not a fine-tune of the base's autoencoder"):
        BuildSpec(str(micro_base), vae=tmp_path / "vae.safetensors").base_model().vae()
    folder.folder = tmp_path  # a base whose own autoencoder is of this class
    micro_kl().save_pretrained(tmp_path / "vae")
    file = BuildSpec(str(micro_base), vae=tmp_path / "vae.safetensors").base_model()
    file.folder = tmp_path
    expected, loaded = folder.vae().state_dict(), file.vae().state_dict()
    assert all(torch.equal(loaded[k], expected[k]) for k in expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scaling_factor": 0.13}, "has scaling_factor = 0.13, but the base's autoencoder has 1"),
        (None, "pass an autoencoder's"),
    ],
)
def test_incompatible_and_missing_vaes_are_refused(
    config: dict[str, Any] | None, message: str, micro_base: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    if config is not None:
        micro_kl(**config).save_pretrained(tmp_path / "vae")
    done = cli("build", "--base", micro_base, "--guide", "none", "--vae", tmp_path / "vae", "--out", tmp_path / "x")
    assert done.code == 2 and message in " ".join(done.err.split()), done.err
