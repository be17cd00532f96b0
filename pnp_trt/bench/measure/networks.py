"""The networks whose cost is counted, built from their configs without reading weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .cost import CONDITION_PREFIX

if TYPE_CHECKING:
    from ...models.teacher import BaseModel


def networks(base: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return ``{name: (module, inputs of one forward at batch 1)}`` on the meta device.

    If a guide's condition runs once per image, it is listed as a separate network and is an input of the guide. The
    guide's parameters still include those of the condition.

    Args:
        base: a base model's name, or a random one such as ``random:sd15``.

    Raises:
        InputError: for an unknown base.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from ...models.bases import resolve
    from ...models.folders import latent_size
    from ...models.guides import GUIDES
    from ...models.guides.condition import Condition
    from ...models.networks import quiet_libraries
    from ...models.student import encode

    quiet_libraries()
    model: BaseModel = resolve(base)
    size = latent_size(model.config("unet"), base)[0]
    added = model.golden_added(torch.Generator(), 1, (size, size))  # for the shapes
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(model.config("unet"))
        sizes: dict[str, Any] = {name: guide_size(base, name) for name in GUIDES}
        guides = {name: kind.from_unet(unet, **sizes[name]) for name, kind in GUIDES.items()}
        inputs: dict[str, Any] = {
            "sample": torch.empty(1, unet.config.in_channels, size, size),
            "timestep": torch.empty(1, dtype=torch.long),
            "encoder_hidden_states": torch.empty(1, 77, unet.config.cross_attention_dim),
        }
        if added:
            inputs["added_cond_kwargs"] = {name: torch.empty(value.shape) for name, value in added.items()}

        _, features = encode(unet, **inputs)
        guide_inputs = inputs | {
            "guidance": torch.empty(1),
            "skips": list(features.down_block_res_samples),
            "mid": features.mid_block_res_sample,
        }
        counted: dict[str, tuple[Any, dict[str, Any]]] = {"teacher": (unet, inputs)}
        for name, guide in guides.items():
            condition = {}
            if guide.constant_parts:  # as in bundles: a separate network that runs once per image
                counted[f"{CONDITION_PREFIX}{name}"] = (
                    Condition(GUIDES[name].from_unet(unet, **sizes[name]), (size, size)),
                    {"guidance": torch.empty(1)},
                )
                condition = {"condition": guide.condition(torch.empty(1), (size, size))}
            counted[f"guide-{name}"] = (_alone(guide), guide_inputs | condition)
        if not base.startswith("random:"):
            counted |= _image_networks(model, inputs["sample"])
    return counted


def _alone(guide: Any) -> Any:
    """Wrap a guide so that it takes the teacher's features as inputs and its cost is counted separately."""
    import torch

    from ...models.guides import Features, GuideInput

    class GuideAlone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.guide = guide

        def forward(self, guidance: Any, skips: Any, mid: Any, **inputs: Any) -> Any:
            features = Features(tuple(skips), mid)
            return self.guide(GuideInput(**inputs, guidance=guidance, features=features)).mid_block_res_sample

    return GuideAlone()


def guide_size(base: str, guide: str) -> dict[str, Any]:
    """Size options of the bundled guide; empty, for the default size, if there is none or the base is random."""
    from ...errors import InputError
    from ...models.catalog import guide_folder
    from ...models.guides import GUIDES

    options = GUIDES[guide].size_options
    if base.startswith("random:") or not options:
        return {}
    try:
        config = json.loads((guide_folder(f"emoji-{guide}") / "config.json").read_text(encoding="utf-8"))
    except InputError:
        return {}
    return {k: config[k] for k in options if k in config}


def _image_networks(model: BaseModel, sample: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    import diffusers
    import torch
    import transformers

    from ...models import wrappers

    ids = {"input_ids": torch.empty(1, 77, dtype=torch.long)}
    counted: dict[str, tuple[Any, dict[str, Any]]] = {}
    for spec in model.text_specs:
        encoder = getattr(transformers, spec.kind)(transformers.CLIPTextConfig(**model.config(spec.name)))
        counted[spec.name.replace("_", "-")] = getattr(wrappers, spec.wrapper)(encoder), ids
    config = model.config("vae")
    vae = getattr(diffusers, config["_class_name"]).from_config(config)
    return counted | {"vae-decoder": (wrappers.VaeDecoder(vae), {"latents": sample})}
