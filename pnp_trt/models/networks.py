"""Loading of networks from their folders: config and weights, where every weight is checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .files import read_json, read_weights, weight_files
from .state_dicts import check_fits, counted, differences

if TYPE_CHECKING:
    from torch import Tensor

#: weights in checkpoints of text encoders that the last hidden state does not depend on
_UNUSED_TEXT = ("text_projection.weight", "logit_scale")
#: names of autoencoders' attention layers in the first versions of diffusers → present names
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def quiet_libraries() -> None:
    """Disable the libraries' warnings (such as on AutoencoderTiny's ``block_out_channels``) and progress bars."""
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_network(kind: Any, folder: Path) -> Any:
    """Load a network of diffusers or transformers in float32.

    Args:
        kind: the network's class.
        folder: folder with ``config.json`` and safetensors files.

    Raises:
        InputError: if a file is missing or damaged, the config is not one of this class, or weights are missing,
            unexpected, of another shape, or of an unsupported type.
    """
    config = network_config(folder)
    module = empty(kind, config, str(folder / "config.json"))
    weights = module_keys(read_weights(weight_files(folder)), module)
    check_complete(module.state_dict(), weights, folder, kind.__name__)
    single = {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
    return filled(module, config, single)


def network_config(folder: Path) -> dict[str, Any]:
    """A network's config from its folder; of the config of a complete CLIP, the text encoder's part."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    return text if config.get("model_type") == "clip" and isinstance(text, dict) else config


def empty(kind: Any, config: Mapping[str, Any], name: str) -> Any:
    """Create a network of this config without allocating its weights.

    Raises:
        InputError: if the class cannot be created from the config; ``name`` is the config's name in the message.
    """
    import torch

    quiet_libraries()
    try:
        with torch.device("meta"):
            if hasattr(kind, "from_config"):
                return kind.from_config(dict(config))
            return kind(kind.config_class.from_dict(dict(config)))
    except Exception as e:  # TypeError, ValueError, KeyError, ZeroDivisionError …, depending on the fault
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(f"{name} does not describe a {kind.__name__} ({reason}); download it again") from e


def filled(module: Any, config: Mapping[str, Any], weights: dict[str, Tensor]) -> Any:
    """Put checked weights into a network of ``empty``, without copying them."""
    if hasattr(module, "from_config"):
        module.load_state_dict(weights, assign=True)
        return module
    kind = type(module)  # transformers' classes have position ids in a buffer that no file contains
    return kind.from_pretrained(
        None,
        config=kind.config_class.from_dict(dict(config)),
        state_dict=weights,
        dtype=next(iter(weights.values())).dtype,
    )


def module_keys(weights: dict[str, Tensor], module: Any) -> dict[str, Tensor]:
    """Rename weights from older versions to the module's keys, and omit those without effect."""
    if not hasattr(module, "from_config"):
        return _text_keys(weights, module)

    def renamed(key: str) -> str:
        m = re.fullmatch(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", key)
        return f"{m[1]}.{_OLD_ATTENTION[m[2]]}.{m[3]}" if m else key

    return {renamed(k): v for k, v in weights.items()}


def _text_keys(weights: dict[str, Tensor], module: Any) -> dict[str, Tensor]:
    """A text encoder's weights under this version of transformers' keys, with or without the prefix ``text_model.``.

    Layers beyond the config's number of layers are omitted, as transformers does: models that use an earlier layer
    ("clip skip") are saved in this way.
    """
    own = module.state_dict()
    prefix = "text_model." if any(k.startswith("text_model.") for k in own) else ""
    out = {}
    for key, value in weights.items():
        name = key if key in own else prefix + key.removeprefix("text_model.")
        layer = re.match(r"encoder\.layers\.(\d+)\.", name.removeprefix(prefix))
        skipped = layer is not None and int(layer[1]) >= module.config.num_hidden_layers
        if name in own or not (skipped or key.endswith("position_ids") or key in _UNUSED_TEXT):
            out[name] = value
    return out


def check_complete(expected: Mapping[str, Any], weights: Mapping[str, Any], folder: Path, kind: str) -> None:
    """Check that a folder's weights are those of the network that its config describes.

    Raises:
        InputError: if not; the message lists missing or unexpected weights, or the first one of another shape.
    """
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing:
        raise InputError(f"{folder} lacks {counted(missing)} of {kind}; download it again")
    if extra:
        raise InputError(
            f"{folder} holds {counted(extra)} that the {kind} of its config.json does not have; "
            "use the config and the weights of one model"
        )
    if (difference := differences(expected, weights)) is not None:
        raise InputError(f"{folder} does not fit its config.json: {difference}; use the files of one model")


def load_unet_weights(unet: Any, file: Path) -> None:
    """Replace a U-Net's weights by those of a safetensors file with the same keys and shapes.

    Raises:
        InputError: if the file is damaged, or weights are missing, unexpected, or of another shape or type.
    """
    weights = read_weights([file])
    own = unet.state_dict()
    check_fits(own, weights, str(file), "this U-Net")
    unet.load_state_dict({k: v.to(own[k].dtype) for k, v in weights.items()})


def check_finite(module: Any, name: str) -> Any:
    """Return the module; raise ``InputError`` with the name of the first weight that is not finite."""
    for key, value in module.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(
                f"base model '{name}': the weight {key} holds values that are not finite; fetch or train it again"
            )
    return module
