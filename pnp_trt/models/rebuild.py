"""Modules as JSON and safetensors, which a bundle of backend ``torch`` contains instead of graphs.

``unet.json`` has the classes of a network's parts and their configs, and ``unet.safetensors`` its weights in the
precision that they run in.  Only the classes listed here are instantiated and nothing is unpickled, so that a bundle
cannot contain code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.document import Value, check_sizes, read_json
from ..errors import InputError, PnpError
from ..io.text import printable

if TYPE_CHECKING:
    from torch import nn

SCHEMA = 1


def describe(module: nn.Module) -> dict[str, Any]:
    """Describe a module for ``rebuild``: its class, and the class and config of each of its parts.

    Args:
        module: one of a bundle's networks: ``Student``, ``Teacher``, ``Condition``, ``Sharpen``, or a class of
            ``wrappers``.
    """
    options: dict[str, Any] = {}
    if isinstance(size := getattr(module, "latent_size", None), tuple):
        options["latent_size"] = list(size)
    if getattr(module, "conditioned", False):
        options["conditioned"] = True
    parts = {name: {"class": type(p).__name__, "config": _config(p)} for name, p in module.named_children()}
    return {"schema": SCHEMA, "network": type(module).__name__, "options": options, "parts": parts}


def rebuild(description: Path, weights: Path) -> nn.Module:
    """Create the module that ``describe`` described, with the weights of a safetensors file in their stored types.

    Raises:
        InputError: if the description is of another schema or names a class that this version does not support, or the
            keys of the weights are not exactly the module's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    document = read_json(description, "build again", limit=1 << 20)
    try:
        if document.get("schema") != SCHEMA:
            raise InputError(
                f"{description} has schema {document.get('schema')}, this version reads {SCHEMA}; build again"
            )
        module = _known(_networks(), document["network"], description)(
            *(_part(part["class"], part["config"], description) for part in document["parts"].values()),
            **document["options"],
        )
    except PnpError:
        raise
    except Exception as e:  # the libraries raise many types for a config that they reject
        why = printable(f"{type(e).__name__}: {e}", limit=200)
        raise InputError(f"{description} does not describe a network ({why}); build again") from e
    try:
        module.load_state_dict(load_file(weights), assign=True)
    except (SafetensorError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"{weights} does not fit {description.name} ({reason}); build again") from e
    return module.eval().requires_grad_(False)


def _config(part: Any) -> dict[str, Any]:
    """A part's config without the libraries' private keys."""
    config = json.loads(part.config.to_json_string()) if hasattr(part.config, "to_json_string") else dict(part.config)
    return {k: v for k, v in config.items() if not k.startswith("_")}


def _part(name: str, config: dict[str, Any], description: Path) -> Any:
    import torch

    from .networks import quiet_libraries

    quiet_libraries()
    kind = _known(_parts(), name, description)
    check_sizes(Value(config, f"parts.{name}.config", str(description), "build again"))
    if hasattr(kind, "from_config"):
        with torch.device("meta"):  # the weights come from the file
            return kind.from_config(config)
    return kind(kind.config_class.from_dict(config))  # CLIP has its position ids in a buffer, which no file contains


def _networks() -> dict[str, Any]:
    from .guides.condition import Condition
    from .guides.sharpener import Sharpen
    from .student import Student, Teacher
    from .wrappers import HiddenStates, ProjectedStates, TextEncoder, VaeDecoder, VaeEncoder

    text = (TextEncoder, HiddenStates, ProjectedStates)
    return {c.__name__: c for c in (Student, Teacher, Condition, Sharpen, *text, VaeDecoder, VaeEncoder)}


def _parts() -> dict[str, Any]:
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from .guides import GUIDES

    text = (CLIPTextModel, CLIPTextModelWithProjection)
    return {c.__name__: c for c in (UNet2DConditionModel, AutoencoderKL, AutoencoderTiny, *text, *GUIDES.values())}


def _known(classes: dict[str, Any], name: str, description: Path) -> Any:
    if name not in classes:
        raise InputError(f"{description} names the class '{name}'; known: {', '.join(classes)}; build again")
    return classes[name]
