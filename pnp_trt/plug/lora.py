"""LoRA files (Hu et al. 2021) merged into a network before it is plugged: W + scale · alpha/rank · B·A.

Reading and merging are diffusers' and peft's, which know diffusers' and kohya's formats.  What they only warn of, a
key that fits nothing, is an error here: a LoRA that was half applied looks like one that was badly trained.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts import cached_sha256
from ..assets import ROOT as ASSETS
from ..errors import InputError
from .checkpoint import header

if TYPE_CHECKING:
    from torch import Tensor

#: networks that a LoRA's keys may name
NETWORKS = ("unet", "text_encoder")


def bundled_loras() -> list[str]:
    """LoRAs of the bundled model."""
    return sorted(p.stem for p in (ASSETS / "loras").glob("*.safetensors"))


@dataclass(frozen=True)
class Lora:
    """A LoRA file and how strongly it is merged."""

    name: str
    path: Path
    scale: float

    @classmethod
    def parse(cls, text: str) -> Lora:
        """``FILE`` or ``FILE:scale``; a bundled name stands for its file.

        Raises:
            InputError: if there is no such file, it is no safetensors, or the scale is no number.
        """
        name, colon, scale = text.rpartition(":")
        if not colon or not name or _find(text) is not None:
            name, scale = text, "1"
        path = _find(name)
        if path is None:
            known = ", ".join(bundled_loras()) or "none bundled"
            raise InputError(f"no LoRA '{name}'; --lora wants FILE.safetensors or FILE.safetensors:scale, or: {known}")
        if path.suffix != ".safetensors":
            raise InputError(f"the LoRA {path} is not a .safetensors; pickled weights are not read")
        try:
            number = float(scale)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"the scale of --lora {text} is '{scale}'; write a number, such as {name}:0.8")
        header(path)  # damaged files are told before anything heavy begins
        return cls(path.stem, path, number)

    def identity(self) -> dict[str, Any]:
        """What tells two merges apart."""
        return {"name": self.name, "sha256": cached_sha256(self.path), "scale": self.scale}


def _find(name: str) -> Path | None:
    for path in (ASSETS / "loras" / f"{name}.safetensors", Path(name)):
        if path.is_file():
            return path
    return None


@dataclass
class Loaded:
    """A LoRA's weights.

    Attributes:
        weights: by network, ``{key: tensor}`` with the network's name before each key.
        alphas: of kohya's format; None where the file's own metadata has them.
        metadata: of peft's configuration; None where the format has none.
    """

    lora: Lora
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    alphas: dict[str, float] | None = None
    metadata: dict[str, Any] | None = None


def load(lora: Lora) -> Loaded:
    """Read a LoRA file.

    Raises:
        InputError: if it is damaged, of a kind that is not merged (DoRA, LoHa, LoKr), or for another architecture.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError("--lora needs the package peft; install with: pip install 'pnp-trt[build]'")
    keys = header(lora.path)
    for mark, kind in (("dora_scale", "DoRA"), ("lora_magnitude", "DoRA"), ("hada_", "LoHa"), ("lokr_", "LoKr")):
        if odd := [k for k in keys if mark in k]:
            raise InputError(f"{lora.path} is a {kind} (for example {odd[0]}), which cannot be merged; use plain LoRA")
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from safetensors import SafetensorError

    with _quiet():
        try:
            held, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
                str(lora.path), use_safetensors=True, local_files_only=True, return_lora_metadata=True
            )
        except (ValueError, KeyError, OSError, SafetensorError) as e:
            raise InputError(f"the LoRA {lora.path} cannot be read: {' '.join(str(e).split())[:300]}") from None
    out = Loaded(lora, {}, alphas or None, metadata or None)
    for key, tensor in held.items():
        network = key.partition(".")[0]
        if network not in NETWORKS:
            raise InputError(f"the LoRA {lora.path} has {key}, and {network} is not among {', '.join(NETWORKS)}")
        if not tensor.isfinite().all():
            raise InputError(f"the LoRA {lora.path}: {key} holds values that are not finite; fetch or train it again")
        out.weights.setdefault(network, {})[key] = tensor
    if not out.weights:
        raise InputError(f"the LoRA {lora.path} holds no weights; fetch it again")
    return out


def merge(module: Any, network: str, loaded: Loaded) -> Any:
    """Merge a LoRA's part for one network into it, in place.

    Args:
        module: ``UNet2DConditionModel`` or ``CLIPTextModel``.
        network: ``unet`` or ``text_encoder``.

    Raises:
        InputError: listing the keys that fit nothing in the network, or naming the first of another shape.
    """
    weights = loaded.weights.get(network)
    if not weights:
        return module
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.utils import recurse_remove_peft_layers
    from peft.tuners.tuners_utils import BaseTunerLayer

    with _quiet():
        try:
            wanted = _check_fits(module, network, loaded)
        except (ValueError, KeyError) as e:
            raise InputError(f"the LoRA {loaded.lora.path} has no {network} keys that are understood: {e}") from None
        kept = dict(network_alphas=loaded.alphas, metadata=loaded.metadata, adapter_name="plugged")
        mixin = StableDiffusionLoraLoaderMixin
        try:
            if network == "unet":
                mixin.load_lora_into_unet(weights, unet=module, **kept)
            else:
                mixin.load_lora_into_text_encoder(weights, text_encoder=module, **kept)
        except (ValueError, KeyError, RuntimeError) as e:
            raise InputError(f"the LoRA {loaded.lora.path} does not load: {' '.join(str(e).split())[:300]}") from None
        merged = set()
        for name, part in module.named_modules():
            if isinstance(part, BaseTunerLayer):
                part.scale_layer(loaded.lora.scale)
                part.merge()
                merged.add(name)
        recurse_remove_peft_layers(module)
        for mark in ("peft_config", "_hf_peft_config_loaded"):
            if hasattr(module, mark):
                delattr(module, mark)
    if lost := sorted(wanted - merged):
        raise InputError(f"the LoRA {loaded.lora.path}: {len(lost)} layers were not merged, for example {lost[0]}")
    return module.requires_grad_(False)


def _check_fits(module: Any, network: str, loaded: Loaded) -> set[str]:
    """Names of the layers that a LoRA changes, each of them there and of its shape."""
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    held = {k.removeprefix(f"{network}."): v for k, v in loaded.weights[network].items()}
    if network == "unet":
        held = held if "lora_A" in next(iter(held)) else convert_unet_state_dict_to_peft(held)
    else:
        held = convert_state_dict_to_peft(convert_state_dict_to_diffusers(held))
        if not hasattr(module, "text_model"):  # recent transformers: one level less
            held = {k.removeprefix("text_model."): v for k, v in held.items()}
    layers = dict(module.named_modules())
    unfit, names = [], set()
    for key, tensor in held.items():
        name, mark, side = key.partition(".lora_")
        weight = getattr(layers.get(name), "weight", None)
        if not mark or weight is None:
            unfit.append(key)
            continue
        names.add(name)
        axis = {"A.weight": 1, "B.weight": 0}.get(side)
        if axis is not None and tensor.shape[axis] != weight.shape[axis]:
            raise InputError(
                f"the LoRA {loaded.lora.path} is for another {network}: {key} has shape {list(tensor.shape)}, and the "
                f"layer's weight {list(weight.shape)}"
            )
    if unfit:
        raise InputError(
            f"the LoRA {loaded.lora.path} has {len(unfit)} keys of {len(held)} that fit nothing in the {network}: "
            f"{', '.join(sorted(unfit)[:6])}{' …' if len(unfit) > 6 else ''}; use one for the same architecture"
        )
    return names


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The libraries' warnings on keys are errors of ours, said once."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
