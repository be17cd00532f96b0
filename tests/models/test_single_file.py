"""Single-file checkpoints: weights are read under every known prefix, and nothing is dropped silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pnp_trt.errors import InputError
from pnp_trt.models.single_file import SingleFile, read_single_file
from pnp_trt.models.state_dicts import check_fits

from .original import open_clip, original_key, original_vae

CLIP = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 12}  # fmt: skip
TINY = {"_class_name": "AutoencoderTiny"}
KL = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4, "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16], "layers_per_block": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def unet(micro_base: Path) -> dict[str, Tensor]:
    return load_file(micro_base / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def config(micro_base: Path) -> dict[str, Any]:
    from pnp_trt.models.bases import resolve

    return resolve(str(micro_base)).config("unet")


@pytest.fixture(scope="module")
def text() -> dict[str, Tensor]:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    state = CLIPTextModel(CLIPTextConfig(**CLIP, hidden_act="gelu")).state_dict()
    return {k.removeprefix("text_model."): v.clone() for k, v in state.items() if "position_ids" not in k}


def written(folder: Path, weights: dict[str, Tensor], metadata: dict[str, str] | None = None) -> SingleFile:
    path = folder / "x.safetensors"
    save_file({k: v.clone().contiguous() for k, v in weights.items()}, path, metadata)
    return read_single_file(path)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "unet.", "diffusion_model.", "model.", "state_dict.", "model.diffusion_model.",
     "state_dict.model.diffusion_model.", "module.unet.", "unet.module.", "module.model.diffusion_model.",
     "_orig_mod.", "model.diffusion_model._orig_mod."],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_a_unet_is_read_under_any_known_prefix(
    tmp_path: Path, unet: dict[str, Tensor], config: dict[str, Any], prefix: str, layout: str
) -> None:
    names = {k: original_key(k) if layout == "original" else k for k in unet}
    file = written(tmp_path, {prefix + names[k]: v for k, v in unet.items()})
    assert file.prefix == prefix and file.parts.keys() == {"unet"} and not file.unused
    assert same(file.weights("unet", config), unet)


def test_unknown_prefixes_and_two_unets_are_refused(tmp_path: Path, unet: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match="holds no U-Net: its keys begin with 'foo.', which is not a known prefix"):
        written(tmp_path, {f"foo.{k}": v for k, v in unet.items()})
    with pytest.raises(InputError, match="holds more than one U-Net: .* under 'unet.' and .* under ''"):
        written(tmp_path, {f"unet.{k}": v for k, v in unet.items()} | {"conv_in.weight": unet["conv_in.weight"]})


@pytest.mark.parametrize(
    "prefix",
    ["cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.", "text_encoder.text_model.",
     "text_encoder.", "state_dict.cond_stage_model.transformer.text_model."],
)  # fmt: skip
def test_a_text_encoder_with_transformers_names_is_read(
    tmp_path: Path, unet: dict[str, Tensor], text: dict[str, Tensor], prefix: str
) -> None:
    ids = {f"{prefix}embeddings.position_ids": torch.arange(12)[None]}
    file = written(tmp_path, unet | {prefix + k: v for k, v in text.items()} | ids)
    assert file.misfits({"text_encoder": CLIP, "vae": TINY}) == {}
    assert same(file.weights("text_encoder", CLIP), text)


@pytest.mark.parametrize("prefix", ["cond_stage_model.model.", "module.cond_stage_model.model."])
def test_an_open_clip_text_encoder_is_converted(
    tmp_path: Path, unet: dict[str, Tensor], text: dict[str, Tensor], prefix: str
) -> None:
    file = written(tmp_path, unet | {prefix + k: v for k, v in open_clip(text, 2).items()})
    config = CLIP | {"hidden_act": "gelu"}
    file.refuse_unused({"text_encoder": config, "vae": TINY}, "the engine")
    assert same(file.weights("text_encoder", config), text)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "quick_gelu"}, "OpenCLIP encoder with gelu, but the engine's has quick_gelu"),
        ({"hidden_size": 32}, r"has shape \[60, 16\], not \[60, 32\]"),
        ({"num_hidden_layers": 4}, "it has 3 layers, not 4"),
        ({"num_hidden_layers": 1}, "it has 3 layers, not 1"),
    ],
)
def test_an_open_clip_text_encoder_of_another_architecture_is_refused(
    tmp_path: Path, unet: dict[str, Tensor], text: dict[str, Tensor], changes: dict[str, Any], reason: str
) -> None:
    file = written(tmp_path, unet | {f"cond_stage_model.model.{k}": v for k, v in open_clip(text, 2).items()})
    config = CLIP | {"hidden_act": "gelu"} | changes
    with pytest.raises(InputError, match=f"a text encoder that the engine cannot take .*{reason}.*--unet-only"):
        file.refuse_unused({"text_encoder": config, "vae": TINY}, "the engine")


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_an_autoencoder_kl_is_read_in_both_layouts(tmp_path: Path, unet: dict[str, Tensor], layout: str) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = {k: v.clone() for k, v in AutoencoderKL.from_config(KL).state_dict().items()}
    stored = original_vae(vae, 2) if layout == "original" else vae
    prefix = "first_stage_model." if layout == "original" else "vae."
    file = written(tmp_path, unet | {prefix + k: v for k, v in stored.items()})
    file.refuse_unused({"text_encoder": CLIP, "vae": KL}, "the engine")
    assert same(file.weights("vae", KL), vae)
    with pytest.raises(
        InputError, match=r"a VAE that the engine cannot take \(it is an AutoencoderKL, but the engine has"
    ):
        file.refuse_unused({"text_encoder": CLIP, "vae": TINY}, "the engine")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("conditioner.embedders.2.encoder.weight", "text encoders of SDXL"),
        ("text_encoder_3.shared.weight", "further text encoders"),
        ("cond_stage_model.roberta.weight", "a text encoder of another kind"),
        ("control_model.zero_convs.0.0.weight", "a ControlNet"),
        ("lora_unet_mid_block_x.lora_up.weight", "a LoRA"),
        ("safety_checker.concept_embeds", "a safety checker"),
        ("encoder.conv_in.weight", "a VAE"),
        ("what.is.this", "an unknown kind"),
    ],
)
def test_weights_that_no_engine_uses_are_named_and_refused(
    tmp_path: Path, unet: dict[str, Tensor], key: str, kind: str
) -> None:
    file = written(tmp_path, unet | {key: torch.zeros(2)})
    assert file.unused == {kind: [key]}
    with pytest.raises(
        InputError, match=rf"holds 1 weight \({key}\) of {kind}, which would not be used; .*--unet-only"
    ):
        file.refuse_unused({}, "the engine")


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", "text_encoder"),
        ("conditioner.embedders.1.model.ln_final.weight", "text_encoder_2"),
        ("state_dict.conditioner.embedders.0.model.ln_final.weight", "text_encoder_2"),
        ("text_encoder_2.text_model.final_layer_norm.weight", "text_encoder_2"),
    ],
)
def test_sdxls_text_encoders_are_parts_that_other_engines_refuse(
    tmp_path: Path, unet: dict[str, Tensor], key: str, part: str
) -> None:
    file = written(tmp_path, unet | {key: torch.zeros(2)})
    assert file.parts.keys() == {"unet", part} and not file.unused
    with pytest.raises(InputError, match=r"text encoder that the engine cannot take \(it .*--unet-only"):
        file.refuse_unused({"text_encoder": CLIP, "vae": TINY}, "the engine")


@pytest.mark.parametrize(
    "key",
    ["model_ema.decay", "model_ema.num_updates", "model_ema.diffusion_modelout2bias", "betas", "alphas_cumprod",
     "alphas_cumprod_prev", "sqrt_one_minus_alphas_cumprod", "posterior_variance", "logvar", "denoiser.sigmas",
     "optimizer.state.0.exp_avg", "global_step", "cond_stage_model.transformer.text_model.embeddings.position_ids",
     "first_stage_model.loss.logvar", "cond_stage_model.model.logit_scale", "state_dict.model_ema.decay",
     "conditioner.embedders.1.model.logit_scale",
     "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"],
)  # fmt: skip
def test_training_leftovers_are_ignored(tmp_path: Path, unet: dict[str, Tensor], key: str) -> None:
    file = written(tmp_path, unet | {key: torch.zeros(1, dtype=torch.int64)})
    assert [key] in file.leftovers.values() and file.parts.keys() == {"unet"}
    file.refuse_unused({"text_encoder": CLIP, "vae": TINY}, "the engine")


def test_errors_state_what_a_file_without_a_unet_is(tmp_path: Path, text: dict[str, Tensor]) -> None:
    for weights, message in (
        (text, "it is a text encoder"),
        ({"encoder.conv_in.weight": torch.zeros(1), "quant_conv.weight": torch.zeros(1)}, "it is a VAE"),
        ({"lora_unet_x.lora_down.weight": torch.zeros(1)}, "it is a LoRA; pass it with --lora"),
        ({"double_blocks.0.x": torch.zeros(1)}, "it is a diffusion transformer"),
        ({f"first_stage_model.{k}": torch.zeros(1) for k in ("a", "b")}, "it is a VAE"),
    ):
        with pytest.raises(InputError, match=f"holds no U-Net: {message}"):
            written(tmp_path, weights)


def test_errors_list_the_differing_weights() -> None:
    own = {"a": torch.zeros(2, 3), "b": torch.zeros(2), "c": torch.zeros(1)}
    check_fits(own, {k: v + 1 for k, v in own.items()}, "x", "y")
    other = {"a": torch.zeros(2, 4), "b": torch.zeros(3), "d": torch.zeros(1)}
    with pytest.raises(
        InputError,
        match=r"x is not a fine-tune of y: a has shape \[2, 4\], not \[2, 3\], and 1 more differ in shape and "
        r"1 weight \(c\) missing and 1 weight \(d\) left over",
    ):
        check_fits(own, other, "x", "y")


def test_keys_unknown_to_the_converter_keep_their_names(
    tmp_path: Path, unet: dict[str, Tensor], config: dict[str, Any]
) -> None:
    prefix = "model.diffusion_model."
    file = written(tmp_path, {prefix + original_key(k): v for k, v in unet.items()} | {f"{prefix}x.y": torch.ones(1)})
    assert file.weights("unet", config).keys() - unet.keys() == {f"{prefix}x.y"}
    assert read_single_file(file.path).noise.prediction_type is None


def test_float64_and_fp8_weights_become_float32(
    tmp_path: Path, unet: dict[str, Tensor], config: dict[str, Any]
) -> None:
    for dtype in (torch.float64, torch.float8_e4m3fn):
        weights = written(tmp_path, {k: v.to(dtype) for k, v in unet.items()}).weights("unet", config)
        assert all(torch.equal(weights[k], v.to(dtype).float()) for k, v in unet.items())
