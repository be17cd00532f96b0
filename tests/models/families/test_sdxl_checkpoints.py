"""SDXL fine-tunes in users' formats: folders, single files in the original layout, LoRAs of both text encoders.

Oracles: diffusers' pipeline of the fine-tune, its own LoRA loader, and the formula W + scale · alpha/rank · B·A.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pnp_trt.build.swap.run import PlugSpec, plug
from pnp_trt.bundle.store import open_bundle
from pnp_trt.errors import InputError
from pnp_trt.models import catalog
from pnp_trt.models.bases import resolve
from pnp_trt.models.networks import load_network
from pnp_trt.models.single_base import SingleFileBase
from pnp_trt.runtime.pipeline import Pipeline

from ...conftest import Result, make_micro_sdxl, once
from ..original import open_clip, original_key
from .oracle import PROMPTS, assert_same, ours, theirs

FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors", "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors", "vae": "vae/diffusion_pytorch_model.safetensors",
}  # fmt: skip
#: layers that the LoRA changes, by network
LAYERS = {
    "unet": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k", "mid_block.attentions.0.proj_in",
    ),
    "text_encoder": (  # diffusers ignores projections of attention if the last one is missing
        "text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.out_proj",
        "text_model.encoder.layers.0.mlp.fc1",
    ),
    "text_encoder_2": (
        "text_model.encoder.layers.1.self_attn.out_proj", "text_model.encoder.layers.0.self_attn.k_proj",
    ),
}  # fmt: skip
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
RANK, ALPHA, SCALE = 2, 3.0, 0.75


def weights(folder: Path, part: str) -> dict[str, Tensor]:
    return load_file(folder / FILES[part])


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model of the micro SDXL's architecture with other weights; do not write into it."""
    return once(tmp_path_factory, "sdxl/tuned", partial(make_micro_sdxl, seed=11))


def original(folder: Path) -> dict[str, Tensor]:
    """Return a folder's weights under the names of SDXL's original code."""
    out = {f"model.diffusion_model.{original_key(k)}": v for k, v in weights(folder, "unet").items()}
    prefix = "conditioner.embedders.0.transformer.text_model."
    first = {prefix + k.removeprefix("text_model."): v for k, v in weights(folder, "text_encoder").items()}
    second = open_clip(weights(folder, "text_encoder_2"), 2, top=False)
    out |= first | {f"conditioner.embedders.1.model.{k}": v for k, v in second.items()}
    return out | {f"first_stage_model.{k}": v for k, v in weights(folder, "vae").items()}


@pytest.fixture(scope="session")
def single(tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fine-tune as one file in the original layout."""
    path = tmp_path_factory.mktemp("single") / "tuned.safetensors"
    save_file({k: v.contiguous().clone() for k, v in original(tuned).items()}, path)
    return path


@pytest.fixture
def tiny_architectures(micro_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the known architectures by the micro SDXL."""
    for part in ("text_encoder", "text_encoder_2", "vae"):
        (tmp_path / "presets" / "micro").mkdir(parents=True, exist_ok=True)
        shutil.copy(micro_sdxl / part / "config.json", tmp_path / "presets" / "micro" / f"{part}.json")
    shutil.copy(micro_sdxl / "unet" / "config.json", tmp_path / "presets" / "micro.json")
    shutil.copy(micro_sdxl / "scheduler" / "scheduler_config.json", tmp_path / "presets" / "micro" / "scheduler.json")
    monkeypatch.setattr(catalog, "PRESETS", tmp_path / "presets")


@pytest.fixture
def lora(tmp_path: Path, micro_sdxl: Path) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """A LoRA in kohya's format, and the change of each weight by the formula."""
    g = torch.Generator().manual_seed(5)
    written: dict[str, Tensor] = {}
    changes: dict[str, dict[str, Tensor]] = {}
    for part, layers in LAYERS.items():
        # only some versions of transformers write this prefix
        state = {("text_model." if part != "unet" else "") + k.removeprefix("text_model."): v
                for k, v in weights(micro_sdxl, part).items()}  # fmt: skip
        for layer in layers:
            shape = state[f"{layer}.weight"].shape
            a = torch.randn(RANK, *shape[1:], generator=g) * 0.3
            b = torch.randn(shape[0], RANK, *(1 for _ in shape[2:]), generator=g) * 0.3
            name = KOHYA[part] + layer.replace(".", "_")
            written |= {
                f"{name}.lora_down.weight": a,
                f"{name}.lora_up.weight": b,
                f"{name}.alpha": torch.tensor(ALPHA),
            }
            product = (b.flatten(1).double() @ a.flatten(1).double()).reshape(shape)
            changes.setdefault(part, {})[f"{layer}.weight"] = SCALE * ALPHA / RANK * product
    path = tmp_path / "both.safetensors"
    save_file(written, path)
    return path, changes


def test_plug_accepts_a_folder_and_a_single_file(
    cli: Callable[..., Result], sdxl_plain: Path, tuned: Path, single: Path, tmp_path: Path
) -> None:
    """Images equal diffusers' of the fine-tune, and a single file in the original layout gives the same bytes."""
    done = cli("plug", sdxl_plain, "--base", tuned, "--out", tmp_path / "folder")
    assert done.code == 0, done.err
    manifest = open_bundle(tmp_path / "folder").manifest
    assert manifest.plugged is not None and set(manifest.plugged.networks.values()) == {"external weights"}
    assert manifest.family == "sdxl" and manifest.text == open_bundle(sdxl_plain).manifest.text
    images, noise = ours(Pipeline.load(tmp_path / "folder", provider="cpu", threads=1), (32, 32), guidance=4.0)
    reference = theirs(tuned)(
        PROMPTS, num_inference_steps=3, guidance_scale=4.0, latents=noise, height=32, width=32, output_type="np"
    ).images  # fmt: skip
    assert_same(images, reference)

    done = cli("plug", sdxl_plain, "--base", single, "--out", tmp_path / "single")
    assert done.code == 0, done.err
    for network in ("unet", "text_encoder", "text_encoder_2", "vae_decoder"):
        file = f"{network}.onnx.data"
        assert (tmp_path / "single" / file).read_bytes() == (tmp_path / "folder" / file).read_bytes(), network


def test_a_lora_of_both_text_encoders_equals_the_formula_and_diffusers_loader(
    sdxl_plain: Path, micro_sdxl: Path, lora: tuple[Path, dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    path, changes = lora
    plugged = plug(PlugSpec(str(sdxl_plain), str(micro_sdxl), (f"{path}:{SCALE}",), tmp_path / "x"))
    assert plugged.manifest.plugged is not None and plugged.manifest.plugged.networks == {
        "unet": "external weights", "text_encoder": "external weights", "text_encoder_2": "external weights",
        "vae_decoder": "kept",
    }  # fmt: skip
    images, noise = ours(Pipeline.load(plugged.folder, provider="cpu", threads=1), (32, 32), guidance=4.0)
    run = {"num_inference_steps": 3, "guidance_scale": 4.0, "latents": noise, "height": 32, "width": 32}

    by_formula = theirs(micro_sdxl)
    for part, own in changes.items():
        state = getattr(by_formula, part).state_dict()
        names = {k.removeprefix("text_model."): k for k in state}
        for key, change in own.items():
            target = state[names[key.removeprefix("text_model.")]]
            target.copy_((target.double() + change).float())
    assert_same(images, by_formula(PROMPTS, output_type="np", **run).images)

    by_loader = theirs(micro_sdxl)
    by_loader.load_lora_weights(path.parent, weight_name=path.name, local_files_only=True, adapter_name="x")
    by_loader.set_adapters(["x"], [SCALE])
    assert_same(images, by_loader(PROMPTS, output_type="np", **run).images)


@pytest.mark.usefixtures("tiny_architectures")
def test_a_single_file_can_be_a_base(tuned: Path, single: Path) -> None:
    """Its networks equal those of the folder that it was made from, and its second tokenizer pads like OpenCLIP's."""
    base = resolve(str(single))
    assert isinstance(base, SingleFileBase) and base.family == "sdxl" and list(base.networks()) == [
        "unet", "text_encoder", "text_encoder_2", "vae_decoder",
    ]  # fmt: skip
    base.check()
    folder = resolve(str(tuned))
    pairs = [(base.unet(), folder.unet()), (base.vae(), folder.vae())]
    pairs += [(base.text_encoder(spec), folder.text_encoder(spec)) for spec in base.text_specs]
    for network, expected in pairs:
        state, other = network.state_dict(), expected.state_dict()
        assert state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in other)
    for spec in base.text_specs:
        assert (
            base.tokenizer(spec)(["a cat"], padding="max_length").input_ids
            == folder.tokenizer(spec)(["a cat"], padding="max_length").input_ids
        )
    assert base.zero_empty_prompt() and base.sizes() == folder.sizes()
    unet = load_network(type(folder.unet()), tuned / "unet")
    assert base.unet().config.addition_embed_type == unet.config.addition_embed_type


def change(single: Path, folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Return a copy of the single file with edited weights."""
    path = folder / "changed.safetensors"
    save_file({k: v.contiguous().clone() for k, v in edit(load_file(single)).items()}, path)
    return path


def without(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {k: v for k, v in state.items() if not k.startswith(prefix)}


def widened(channels: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    return lambda state: state | {key: state[key].repeat(1, 3, 1, 1)[:, :channels]}


@pytest.mark.usefixtures("tiny_architectures")
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("first_stage_model."), "is a checkpoint of micro and has no vae; pass the complete checkpoint"),
        (without("conditioner.embedders.1."), "is a checkpoint of micro and has no text_encoder_2"),
        (widened(9), "has 9 input channels, but the VAE's latents have 4: it is for inpainting"),
        (widened(8), "has 8 input channels, but the VAE's latents have 4: it edits images"),
        (lambda state: {k.replace("embedders.1.", "embedders.0."): v for k, v in state.items()
                       if "embedders.0." not in k}, "is SDXL's refiner"),
        (lambda state: state | {"model.diffusion_model.time_embed.cond_proj.weight": torch.zeros(8, 5)},
         "takes the guidance scale as an input (time_cond_proj_dim = 5), as latent consistency models do"),
    ],
    ids=["no VAE", "no second text encoder", "inpainting", "pix2pix", "refiner", "LCM"],
)  # fmt: skip
def test_unsupported_single_files_are_refused(
    edit: Any, message: str, single: Path, cli: Callable[..., Result], tmp_path: Path
) -> None:
    file = change(single, tmp_path, edit)
    done = cli("build", "--base", file, "--guide", "none", "--out", tmp_path / "x")
    assert done.code == 2 and message in " ".join(done.err.split()), done.err
    assert not (tmp_path / "x").exists()


def test_a_single_file_of_sd_2_must_state_its_prediction_type(
    micro_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Result]
) -> None:
    presets = tmp_path / "presets"
    (presets / "sd21").mkdir(parents=True)
    shutil.copy(micro_base / "unet" / "config.json", presets / "sd21.json")
    for part in ("text_encoder", "vae"):
        shutil.copy(micro_base / part / "config.json", presets / "sd21" / f"{part}.json")
    shutil.copy(catalog.PRESETS / "sd21" / "scheduler.json", presets / "sd21")
    monkeypatch.setattr(catalog, "PRESETS", presets)
    file = tmp_path / "sd2.safetensors"
    state = {f"model.diffusion_model.{original_key(k)}": v for k, v in weights(micro_base, "unet").items()}
    state |= {f"cond_stage_model.transformer.{k}": v for k, v in weights(micro_base, "text_encoder").items()}
    state |= {f"first_stage_model.{k}": v for k, v in weights(micro_base, "vae").items()}
    save_file({k: v.contiguous() for k, v in state.items()}, file)
    done = cli("build", "--base", file, "--guide", "none", "--out", tmp_path / "x")
    assert done.code == 2 and "does not state what its U-Net predicts; pass --prediction-type" in " ".join(
        done.err.split()
    ), done.err
    save_file({k: v.contiguous() for k, v in state.items()}, file, {"modelspec.prediction_type": "v"})
    base = resolve(str(file))
    base.check()
    assert base.scheduler_config()["prediction_type"] == "v_prediction" and base.family == "sd"


def test_plug_refuses_models_of_other_families(
    sdxl_plain: Path, micro_bundles: Path, micro_base: Path, micro_sdxl: Path, single: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        InputError, match="has one text encoder, but engine 'plain' has 2 text encoders; build it instead"
    ):
        plug(PlugSpec(str(sdxl_plain), str(micro_base), out=tmp_path / "x"))
    with pytest.raises(InputError, match="has 2 text encoders, but engine 'plain' has one text encoder"):
        plug(PlugSpec(str(micro_bundles / "plain"), str(micro_sdxl), out=tmp_path / "x"))
    with pytest.raises(
        InputError, match="a second text encoder that engine 'plain' cannot take .it has no such network."
    ):
        plug(PlugSpec(str(micro_bundles / "plain"), str(single), out=tmp_path / "x"))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"in_channels": 9}, "it is for inpainting"),
        ("unet", {"in_channels": 8}, "it edits images (latents and those of an image, as InstructPix2Pix)"),
        ("unet", {"time_cond_proj_dim": 256}, "takes the guidance scale as an input"),
        ("unet", {"addition_embed_type": None}, "no pooled text and image sizes (addition_embed_type = None)"),
    ],
)
def test_unsupported_folders_are_refused_before_their_weights_are_read(
    part: str, changes: dict[str, Any], message: str, micro_sdxl: Path, cli: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "org" / "stable-diffusion-xl-base-1.0"
    for own in (*FILES, "tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(micro_sdxl / own, folder / own)
    config = json.loads((folder / part / "config.json").read_text()) | changes
    (folder / part / "config.json").write_text(json.dumps(config))
    for file in FILES.values():
        (folder / file).write_bytes(b"")
    done = cli("build", "--base", folder, "--guide", "none", "--out", tmp_path / "x")
    assert done.code == 2 and message in " ".join(done.err.split()), done.err
