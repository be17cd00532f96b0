"""Read and check a LoRA file, and group its tensors into changes of layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ....errors import InputError
from .adapter_config import AdapterConfig
from .keys import by_layer
from .names import LayerNames, LoraTarget
from .source import Lora

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LayerChange:
    """One LoRA's change of one layer.

    Attributes:
        factor: scale · alpha/rank, which multiplies the factors' product and ``up_bias``.
        scale: the user's scale, which multiplies full differences.
        parts: tensors by part; ``down`` is ``[rank, inputs, *kernel]`` or flattened after the rank, ``up``
            ``[outputs, rank]``, ``mid`` (Tucker) ``[rank, rank, *kernel]``; ``up_bias`` and ``diff_b`` have the shape
            of the bias, ``diff`` that of the weight.
    """

    layer: LoraTarget
    factor: float
    scale: float
    parts: dict[str, Tensor]


@dataclass
class LoraWeights:
    """A LoRA's changes, by network and layer name."""

    lora: Lora
    changes: dict[str, dict[str, LayerChange]] = field(default_factory=dict)


def load(lora: Lora, names: LayerNames) -> LoraWeights:
    """Read a LoRA file and match it with the networks to merge it into.

    Raises:
        InputError: if it is damaged, empty, of an unsupported kind, for another architecture, or incomplete;
            if a key matches no layer; or if a tensor has a wrong shape or type, or values that are not finite.
    """
    tensors, metadata = _read(lora)
    config = AdapterConfig.read(lora, metadata)
    out = LoraWeights(lora)
    for layer, keys in by_layer(lora.path, tensors, names).items():
        for part, key in keys.items():
            _check_values(lora, part, key, tensors[key])
            _check_shape(lora, layer, part, key, tensors, keys)
        parts = {part: tensors[key] for part, key in keys.items() if part != "alpha"}
        factor = 0.0
        if "down" in parts:
            alpha = float(tensors[keys["alpha"]]) if "alpha" in keys else None
            factor = lora.scale * config.factor(layer, len(parts["down"]), alpha)
        out.changes.setdefault(layer.network, {})[layer.name] = LayerChange(layer, factor, lora.scale, parts)
    return out


def _read(lora: Lora) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(lora.path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as e:
        reason = " ".join(str(e).split())[:300]
        raise InputError(f"the LoRA {lora.path} cannot be read ({reason}); fetch it again") from None
    if not tensors:
        raise InputError(f"the LoRA {lora.path} holds no weights; fetch it again")
    return tensors, metadata


def _check_values(lora: Lora, part: str, key: str, tensor: Tensor) -> None:
    import torch

    if part == "alpha":
        if tensor.numel() != 1 or tensor.is_complex() or not math.isfinite(float(tensor)):
            raise InputError(f"the LoRA {lora.path}: {key} is {tensor.tolist()}, not a finite number; save it again")
        return
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(
            f"the LoRA {lora.path}: {key} has the type {str(tensor.dtype).removeprefix('torch.')}; weights must be "
            "float32, float16 or bfloat16; convert the file"
        )
    if not tensor.isfinite().all():
        raise InputError(f"the LoRA {lora.path}: {key} holds values that are not finite; fetch or train it again")


def _check_shape(
    lora: Lora, layer: LoraTarget, part: str, key: str, tensors: dict[str, Tensor], keys: dict[str, str]
) -> None:
    if part == "alpha":
        return
    if part in ("up_bias", "diff_b") and layer.bias is None:
        kind = {"up_bias": "lora_bias", "diff_b": "diff_b"}[part]
        raise InputError(
            f"the LoRA {lora.path}: {key} changes a bias ({kind}), and {layer} has none; train the LoRA without a bias"
        )
    shape = tuple(tensors[key].shape)
    rank = len(tensors[keys["down"]]) if "down" in keys and tensors[keys["down"]].ndim else 0
    if "down" in keys and not rank:
        raise InputError(f"the LoRA {lora.path}: {keys['down']} has rank 0; train or save it again")
    allowed = _shapes(layer, part, rank, tucker="mid" in keys)
    if _trimmed(shape) not in {_trimmed(s) for s in allowed}:
        raise InputError(
            f"the LoRA {lora.path} is for another {layer.network}: {key} has shape {list(shape)}, and the weight of "
            f"{layer} has {list(layer.shape)}{f' (rank {rank})' if rank else ''}"
        )


def _shapes(layer: LoraTarget, part: str, rank: int, tucker: bool) -> list[tuple[int, ...]]:
    """Legal shapes of a part, up to trailing axes of length 1."""
    outputs, inputs, *kernel = (*layer.shape, 1)[: max(len(layer.shape), 2)]
    if layer.embedding:
        outputs, inputs = inputs, outputs
    match part:
        case "up":
            return [(outputs, rank)]
        case "down" if tucker:
            return [(rank, inputs)]
        case "down":
            return [(rank, inputs, *kernel), (rank, inputs * math.prod(kernel))]
        case "mid":
            return [(rank, rank, *kernel)]
        case "diff":
            return [layer.shape]
    assert layer.bias is not None
    return [layer.bias]


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without trailing axes of length 1, so that a matrix and a 1×1 convolution are equal."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
