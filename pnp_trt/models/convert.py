"""Conversion of single-file checkpoints to diffusers' and transformers' names, by diffusers' own converters."""

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
#: prefixes that diffusers' converters expect; OpenCLIP's can be any except that of Stable Diffusion 2, for which the
#: converter omits the projection
_UNET, _OPEN_CLIP, _VAE = "model.diffusion_model.", "open_clip.", "first_stage_model."


@dataclass(frozen=True)
class Part:
    """A network in a checkpoint.

    Attributes:
        layout: naming scheme of the keys: ``diffusers``, ``original``, ``clip`` or ``open_clip``.
        keys: key without prefix → key in the file.
    """

    layout: str
    keys: dict[str, str]


def unet_weights(path: Path, part: Part, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The U-Net's weights under diffusers' names.

    Weights unknown to the converter keep their names in the file, so that later checks report them as unexpected.

    Args:
        path: the file.
        part: the U-Net in it.
        config: config of the ``UNet2DConditionModel`` that the weights are for.

    Raises:
        InputError: if the file is damaged, or lacks weights that the converter needs.
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
        path: the file.
        part: the text encoder in it.
        config: the text encoder's config; if an OpenCLIP encoder has one layer more, it is omitted, as in SD 2.

    Raises:
        InputError: as in ``unet_weights``.
    """
    weights = _read(path, part.keys)
    if part.layout == "clip":
        return weights
    from types import SimpleNamespace

    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    above = f"transformer.resblocks.{config['num_hidden_layers']}."
    prefixed = {_OPEN_CLIP + k: v for k, v in weights.items() if not k.startswith(above)}
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    converted = _checked(path, _OPEN_CLIP, lambda: convert_open_clip_checkpoint(model, prefixed, prefix=_OPEN_CLIP))
    return {k.removeprefix("text_model."): v for k, v in converted.items()}


def vae_weights(path: Path, part: Part, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The VAE's weights under diffusers' names; arguments and errors as in ``unet_weights``."""
    return converted_vae(_read(path, part.keys), config, path, part.keys)


def converted_vae(
    weights: dict[str, Tensor], config: Mapping[str, Any], path: Path, names: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Convert a VAE's weights, which have no prefix, to diffusers' names.

    Args:
        weights: weights under diffusers' or the original names.
        path: the file, for messages.
        names: key in the file of each weight, used for weights that are not converted; None if the keys are the same.

    Raises:
        InputError: if the file lacks weights that the converter needs.
    """
    if config.get("_class_name") == "AutoencoderTiny" or any(
        k.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for k in weights
    ):
        return weights
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    prefixed = {_VAE + k: v for k, v in weights.items()}
    converted = _checked(path, _VAE, lambda: convert_ldm_vae_checkpoint(prefixed, config=dict(config)))
    used_pointers = {v.data_ptr() for v in converted.values()}  # matrices are views of the file's 1×1 convolutions
    return converted | {(names or {}).get(k, k): v for k, v in weights.items() if v.data_ptr() not in used_pointers}


def _checked(path: Path, prefix: str, convert: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return convert()
    except (KeyError, IndexError, ValueError, AttributeError) as e:
        raise InputError(
            f"{path} cannot be converted: {prefix}… lacks {e}; save the model as a diffusers folder"
        ) from None


def _read(path: Path, keys: Mapping[str, str]) -> dict[str, Tensor]:
    """Read tensors, memory-mapped; ``keys`` maps each new name to the name in the file.

    Float64 and fp8 are converted to float32.

    Raises:
        InputError: if the file is damaged, or contains unsupported types.
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
