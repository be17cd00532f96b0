"""Checks of a diffusers folder by its configs: the pipeline's class, its parts, its U-Net's inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bundle.profiles import MAX_SIDE
from ..errors import InputError
from ..io.text import printable
from .files import FETCH, read_json, weight_files

_PARTS = ("unet", "text_encoder", "vae", "tokenizer", "scheduler")
_READ = "Stable Diffusion 1, 2 and XL are read (StableDiffusionPipeline, StableDiffusionXLPipeline)"


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not a complete Stable Diffusion model.

    Raises:
        InputError: for another kind of model, or a missing part or file; the message names it and how to get it.
    """
    index = folder / "model_index.json"
    kind = str(read_json(index).get("_class_name", "")) if index.exists() else ""
    missing = [p for p in _PARTS if not (folder / p).is_dir()]
    if missing:
        _refuse_parts(folder, kind, missing)
    for part in ("unet", "text_encoder", "vae", "text_encoder_2"):
        if (folder / part).is_dir():
            _need(folder / part / "config.json")
            weight_files(folder / part)
    _need(folder / "scheduler" / "scheduler_config.json")
    for part in ("tokenizer", "tokenizer_2"):
        if (folder / part).is_dir():
            _check_tokenizer(folder / part)
    if (folder / "text_encoder_2").is_dir() and not (folder / "tokenizer_2").is_dir():
        raise InputError(f"{folder} has text_encoder_2 and no tokenizer_2; {FETCH}")


def _refuse_parts(folder: Path, kind: str, missing: list[str]) -> None:
    if (folder / "transformer").is_dir() or (folder / "prior").is_dir() or (kind and not _is_stable_diffusion(kind)):
        network = "a transformer" if (folder / "transformer").is_dir() else "another kind of network"
        raise InputError(
            f"{folder} is a {kind or 'pipeline of another kind'}, which denoises with {network} and not with Stable "
            f"Diffusion's U-Net; {_READ}"
        )
    if kind.startswith("StableDiffusionXL") and "text_encoder" in missing and (folder / "text_encoder_2").is_dir():
        raise InputError(
            f"{folder} is SDXL's refiner ({kind}): it has only the second text encoder and refines the base "
            "model's images; pass the base model's folder"
        )
    what = f"is a {kind} but has" if kind else "is not a diffusers folder: it has"
    raise InputError(f"{folder} {what} no {', '.join(missing)}; {FETCH}")


def _is_stable_diffusion(kind: str) -> bool:
    other = ("StableDiffusion3", "StableCascade", "StableAudio", "StableVideo", "StableUnCLIP")
    return kind.startswith(("StableDiffusion", "LatentConsistency", "AltDiffusion")) and not kind.startswith(other)


def _need(path: Path) -> None:
    """Raise ``InputError`` if a config is missing; the message names the file if it has an older name."""
    if path.is_file():
        return
    older = path.parent / "config.json"
    if path.name != "config.json" and older.is_file():
        raise InputError(
            f"{path} is missing, but {older} (its name in Flax models and old ones) exists; rename it to {path.name}"
        )
    raise InputError(f"{path} is missing; {FETCH}")


def _check_tokenizer(folder: Path) -> None:
    """Check that the files exist: without them transformers creates an empty tokenizer that ignores the prompt."""
    if (folder / "tokenizer.json").is_file():
        return
    lacks = [n for n in ("vocab.json", "merges.txt") if not (folder / n).is_file()]
    if lacks:
        raise InputError(f"{folder / lacks[0]} is missing, and there is no tokenizer.json either; {FETCH}")


def check_unet(
    unet: Mapping[str, Any], vae: Mapping[str, Any], where: str, additions: tuple[str | None, ...] = (None,)
) -> None:
    """Refuse a U-Net whose config has inputs other than noisy latents, timestep and text.

    Args:
        unet: the U-Net's config.
        vae: the autoencoder's config.
        where: the model, for messages.
        additions: values of ``addition_embed_type`` that the model's family supports.

    Raises:
        InputError: if it has other inputs; the message states what the U-Net is for.
    """
    inputs, outputs = unet.get("in_channels", 4), unet.get("out_channels", 4)
    latent = vae.get("latent_channels", 4)
    if inputs != outputs or outputs != latent:
        raise InputError(f"{where}: {_channels(inputs, outputs, latent)}; use a text-to-image model")
    if unet.get("time_cond_proj_dim") is not None:
        raise InputError(
            f"{where}: the U-Net takes the guidance scale as an input (time_cond_proj_dim = "
            f"{unet['time_cond_proj_dim']}), as latent consistency models do; it is guided already, so use the model "
            "that it was distilled from"
        )
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "encoder_hid_dim"):
        if unet.get(key) is not None:
            raise InputError(
                f"{where}: the U-Net takes more than latents, timestep and text ({key} = {unet[key]}); "
                "use a text-to-image model"
            )
    if (addition := unet.get("addition_embed_type")) not in additions:
        if addition in (None, "text_time"):
            has, lacks = ("no", "two text encoders") if addition is None else ("SDXL's", "no second text encoder")
            raise InputError(
                f"{where}: the U-Net has {has} pooled text and image sizes (addition_embed_type = {addition}), but the "
                f"model has {lacks}; use the parts of one model"
            )
        raise InputError(f"{where}: the U-Net's addition_embed_type is {addition}; known: text_time (SDXL)")
    if unet.get("center_input_sample"):
        raise InputError(f"{where}: the U-Net shifts its input (center_input_sample), which is not supported")


def latent_size(unet: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Height and width of the latents that a U-Net was trained on: its config's ``sample_size``.

    Raises:
        InputError: if it is missing, or not a size from 1 to 4096.
    """
    size = unet.get("sample_size")
    if size is None:
        raise InputError(f"{where}: a config.json lacks 'sample_size'; download the model again")
    sides = [s for s in (size if isinstance(size, list | tuple) else (size, size)) if type(s) is int]
    if len(sides) != 2 or not all(1 <= s <= MAX_SIDE for s in sides):
        raise InputError(
            f"{where}: the U-Net's sample_size is {printable(json.dumps(size), limit=80)}; it must be one or two whole "
            f"numbers from 1 to {MAX_SIDE}; download the model again"
        )
    return sides[0], sides[1]


def _channels(inputs: Any, outputs: Any, latent: Any) -> str:
    what = f"the U-Net has {inputs} input channels, but the VAE's latents have {latent}"
    if outputs != latent:
        return f"the U-Net has {outputs} output channels, but the VAE's latents have {latent}"
    if inputs == 2 * latent + 1:
        return f"{what}: it is for inpainting (latents, a masked image and its mask)"
    if inputs == 2 * latent:
        return f"{what}: it edits images (latents and those of an image, as InstructPix2Pix)"
    if inputs == latent + 1:
        return f"{what}: it takes a depth map besides the latents"
    if inputs == latent + 3:
        return f"{what}: it is for upscaling (latents and a small image)"
    return what


def left_out(folder: Path) -> list[str]:
    """Parts of a pipeline that affect images but are not part of a bundle, such as the safety checker."""
    return [p for p in ("safety_checker", "watermarker", "controlnet", "image_encoder") if (folder / p).is_dir()]
