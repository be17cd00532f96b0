"""Configs of the same computation are accepted and others refused; PyTorch's outputs are the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from pnp_trt.errors import InputError
from pnp_trt.models.configs import check_same_network

Inputs = dict[str, torch.Tensor]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


UNET_INPUTS = {
    "sample": noise(2, 4, 8, 8), "timestep": torch.tensor([801, 41]), "encoder_hidden_states": noise(2, 5, 32),
}  # fmt: skip
KL = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1, "act_fn": "silu", "sample_size": 16,
    "scaling_factor": 0.18215,
}  # fmt: skip


@torch.no_grad()
def unet_output(config: dict[str, Any], weights: Inputs) -> torch.Tensor:
    unet = UNet2DConditionModel.from_config(config).eval()
    unet.load_state_dict(weights)
    return unet(**UNET_INPUTS).sample


@torch.no_grad()
def vae_output(config: dict[str, Any], weights: Inputs) -> torch.Tensor:
    """Return pixels and latents, flattened, as diffusers' pipelines compute them."""
    kind = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}[config["_class_name"]]
    vae = kind.from_config(config).eval()
    vae.load_state_dict(weights)
    pixels = vae.decode(noise(1, 4, 8, 8) / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample
    encoded = vae.encode(noise(1, 3, 16, 16))
    latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
    return torch.cat([pixels.flatten(), (latents * vae.config.scaling_factor).flatten()])


@torch.no_grad()
def text_output(config: dict[str, Any], weights: Inputs) -> torch.Tensor:
    encoder = CLIPTextModel(CLIPTextConfig.from_dict(config)).eval()
    encoder.load_state_dict(weights)
    ids = torch.randint(0, 49408, (2, 77), generator=torch.Generator().manual_seed(0))
    return encoder(input_ids=ids).last_hidden_state


#: changes of a config as fine-tunes have them (``...`` removes an entry); errors name the first entry of a case
UNET_CASES = [
    {"upcast_attention": None}, {"upcast_attention": True}, {"dropout": 0.1}, {"attention_head_dim": [2, 2]},
    {"attention_head_dim": 4}, {"attention_head_dim": [2, 4]}, {"sample_size": 64}, {"_name_or_path": "/x"},
    {"_diffusers_version": "0.6.0"}, {"act_fn": "swish"}, {"act_fn": "gelu"}, {"norm_eps": 1e-5}, {"norm_eps": 1e-3},
    {"norm_num_groups": 4}, {"flip_sin_to_cos": False}, {"freq_shift": 1}, {"center_input_sample": True},
    {"mid_block_scale_factor": 2}, {"resnet_out_scale_factor": 2.0}, {"cross_attention_dim": [32, 32]},
    {"layers_per_block": [1, 1]}, {"transformer_layers_per_block": [1, 1]}, {"only_cross_attention": [False, False]},
    {"mid_block_only_cross_attention": False}, {"time_embedding_dim": 64}, {"addition_embed_type_num_heads": 32},
    {"class_embeddings_concat": None}, {"conv_in_kernel": 3}, {"resnet_time_scale_shift": "default"},
    {"mid_block_type": "UNetMidBlock2DCrossAttn"}, {"time_embedding_act_fn": "silu"}, {"timestep_post_act": "silu"},
    {"dual_cross_attention": ...}, {"use_linear_projection": ...}, {"num_class_embeds": ...}, {"upcast_attention": ...},
    {"resnet_skip_time_act": ...}, {"encoder_hid_dim": ..., "dropout": 0.2, "attention_head_dim": [2, 2]},
    {"downsample_padding": 0}, {"attention_type": ...}, {"resnet_skip_time_act": True},
]  # fmt: skip
TEXT_CASES = [
    {"eos_token_id": 2}, {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}, {"dtype": "float16"},
    {"torch_dtype": "float32", "dtype": ...}, {"attention_dropout": 0.1}, {"initializer_range": 1.0},
    {"initializer_factor": 0.5}, {"projection_dim": 768}, {"architectures": ["CLIPModel"]}, {"use_cache": False},
    {"transformers_version": "4.20.0"}, {"_name_or_path": "openai/clip"}, {"pad_token_id": None},
    {"hidden_act": "gelu"}, {"layer_norm_eps": 1e-2}, {"num_attention_heads": 4}, {"layer_norm_eps": ...},
    {"hidden_act": ...}, {"model_type": "clip_text_model"}, {"attention_dropout": ...},
]  # fmt: skip
VAE_CASES = [
    {"force_upcast": True}, {"force_upcast": False}, {"sample_size": 512}, {"scaling_factor": 0.13025},
    {"act_fn": "relu"}, {"norm_num_groups": 2}, {"shift_factor": 0.5}, {"latents_mean": None}, {"act_fn": "swish"},
    {"_name_or_path": "x"}, {"shift_factor": 0.0}, {"block_out_channels": (8, 8)}, {"mid_block_add_attention": True},
]  # fmt: skip
TINY_CASES = [
    {"scaling_factor": 0.5}, {"force_upcast": True}, {"act_fn": "silu"}, {"upsample_fn": "bilinear"},
    {"block_out_channels": ...}, {"_diffusers_version": "0.20.0"},
]  # fmt: skip


def changed(config: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in {**config, **change}.items() if v is not ...}


def check(kind: Any, run: Any, config: dict[str, Any], weights: Inputs, change: dict[str, Any]) -> None:
    """Check that the changed config is accepted exactly if PyTorch's outputs are bit-equal."""
    other = changed(config, change)
    try:
        equal = torch.equal(run(config, weights), run(other, weights))
    except (RuntimeError, ValueError, AttributeError):  # the weights do not fit the other network, or it does not run
        equal = False
    if equal:
        check_same_network(kind, other, config, "tuned", "this engine")
    else:
        with pytest.raises(
            InputError, match=rf"tuned is not a fine-tune of this engine: config entry {next(iter(change))} is"
        ):
            check_same_network(kind, other, config, "tuned", "this engine")


def ids(change: dict[str, Any]) -> str:
    return ",".join(f"{k}={'absent' if v is ... else v}" for k, v in change.items())


@pytest.mark.parametrize("change", UNET_CASES, ids=ids)
def test_unets(change: dict[str, Any], micro_base: Path) -> None:
    config = json.loads((micro_base / "unet" / "config.json").read_text())
    weights = load_file(micro_base / "unet" / "diffusion_pytorch_model.safetensors")
    check(UNet2DConditionModel, unet_output, config, weights, change)


@pytest.mark.parametrize("change", TEXT_CASES, ids=ids)
def test_text_encoders(change: dict[str, Any], micro_base: Path) -> None:
    config = json.loads((micro_base / "text_encoder" / "config.json").read_text())
    weights = CLIPTextModel.from_pretrained(micro_base / "text_encoder").state_dict()
    check(CLIPTextModel, text_output, config, weights, change)


@pytest.mark.parametrize("change", VAE_CASES, ids=ids)
def test_variational_autoencoders(change: dict[str, Any]) -> None:
    torch.manual_seed(0)
    check(AutoencoderKL, vae_output, KL, AutoencoderKL.from_config(KL).state_dict(), change)


@pytest.mark.parametrize("change", TINY_CASES, ids=ids)
def test_tiny_autoencoders(change: dict[str, Any], micro_base: Path) -> None:
    config = json.loads((micro_base / "vae" / "config.json").read_text())
    weights = load_file(micro_base / "vae" / "diffusion_pytorch_model.safetensors")
    check(AutoencoderTiny, vae_output, config, weights, change)


def test_a_config_of_an_early_diffusers_version_is_accepted(micro_base: Path) -> None:
    """Early versions lacked most entries."""
    config = json.loads((micro_base / "unet" / "config.json").read_text())
    early = ("act_fn", "attention_head_dim", "block_out_channels", "cross_attention_dim", "down_block_types",
             "in_channels", "layers_per_block", "norm_num_groups", "out_channels", "up_block_types")  # fmt: skip
    check_same_network(UNet2DConditionModel, {k: config[k] for k in early}, config, "tuned", "this engine")


def test_a_nonsensical_config_is_refused(micro_base: Path) -> None:
    config = json.loads((micro_base / "unet" / "config.json").read_text())
    with pytest.raises(InputError, match="tuned does not describe a UNet2DConditionModel"):
        check_same_network(UNet2DConditionModel, config | {"block_out_channels": "x"}, config, "tuned", "this engine")
