"""Weights of a checkpoint in one file under diffusers' and transformers' names, converted by diffusers' own code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .files import check_types, computable
from .safetensors_header import read_header

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
#: the prefixes that diffusers' converters look for; OpenCLIP's may be any, but for that of Stable Diffusion 2, under
#: which the converter leaves out the projection
_UNET, _OPEN_CLIP, _VAE = "model.diffusion_model.", "open_clip.", "first_stage_model."


@dataclass(frozen=True)
class Part:
    """A network of a checkpoint.

    Attributes:
        layout: ``diffusers``, ``original``, ``clip`` or ``open_clip``: whose names it has.
        keys: the file's key by the key without its prefix.
    """

    layout: str
    keys: dict[str, str]


def unet_weights(path: Path, part: Part, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The U-Net's weights under diffusers' names, in the types that the file stores.

    Weights that the converter does not know keep the file's names, so that they are seen to be left over.

    Args:
        path, part: the file, and the U-Net in it.
        config: of the ``UNet2DConditionModel`` that they are for.

    Raises:
        InputError: if the file is damaged, or lacks what the converter needs.
    """
    if part.layout == "diffusers":
        return _read(path, part.keys)
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    names = _checked(
        path, _UNET, lambda: convert_ldm_unet_checkpoint({_UNET + k: k for k in part.keys}, config=dict(config))
    )  # the converter only renames, so it can be run on the names alone
    unknown = part.keys.keys() - set(names.values())
    renamed = {new: part.keys[old] for new, old in names.items()}
    return _read(path, renamed | {part.keys[k]: part.keys[k] for k in unknown})


def text_weights(path: Path, part: Part, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A text encoder's weights under the names of transformers' ``CLIPTextModel``, without ``text_model.``.

    Args:
        path, part: the file, and the text encoder in it.
        config: of the text encoder; a layer that an OpenCLIP encoder has on top of it is left out, as SD 2 does.

    Raises:
        InputError: as of ``unet_weights``.
    """
    weights = _read(path, part.keys)
    if part.layout == "clip":
        return weights
    from types import SimpleNamespace

    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    above = f"transformer.resblocks.{config['num_hidden_layers']}."
    given = {_OPEN_CLIP + k: v for k, v in weights.items() if not k.startswith(above)}
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    converted = _checked(path, _OPEN_CLIP, lambda: convert_open_clip_checkpoint(model, given, prefix=_OPEN_CLIP))
    return {k.removeprefix("text_model."): v for k, v in converted.items()}


def vae_weights(path: Path, part: Part, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The VAE's weights under diffusers' names; arguments and errors as of ``unet_weights``."""
    return converted_vae(_read(path, part.keys), config, path, part.keys)


def converted_vae(
    weights: dict[str, Tensor], config: Mapping[str, Any], path: Path, names: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """A VAE's weights, without prefix, under diffusers' names.

    Args:
        weights: under diffusers' or the original names.
        path: the file, for messages.
        names: the file's key of each, for those that are left over; None where they are the same.

    Raises:
        InputError: if the file lacks what the converter needs.
    """
    if config.get("_class_name") == "AutoencoderTiny" or any(
        k.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for k in weights
    ):
        return weights
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    given = {_VAE + k: v for k, v in weights.items()}
    converted = _checked(path, _VAE, lambda: convert_ldm_vae_checkpoint(given, config=dict(config)))
    taken = {v.data_ptr() for v in converted.values()}  # matrices are views of the file's 1×1 convolutions
    return converted | {(names or {}).get(k, k): v for k, v in weights.items() if v.data_ptr() not in taken}


def _checked(path: Path, prefix: str, convert: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return convert()
    except (KeyError, IndexError, ValueError, AttributeError) as e:
        raise InputError(
            f"{path} cannot be converted: {prefix}… lacks {e}; save the model as a diffusers folder"
        ) from None


def _read(path: Path, keys: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors by new name, mapped from the disk; ``keys`` gives the file's name of each.

    Types that networks are not computed in (float64, fp8) become float32.

    Raises:
        InputError: if the file is damaged, or holds types that are not read.
    """
    from safetensors import SafetensorError, safe_open

    dtypes = read_header(path).dtypes
    check_types(path, {old: dtypes[old] for old in keys.values()})
    try:
        with safe_open(path, "pt") as f:
            tensors = {new: f.get_tensor(old) for new, old in keys.items()}
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path} is not a readable safetensors file ({e}); download it again") from None
    return {k: computable(v) for k, v in tensors.items()}
