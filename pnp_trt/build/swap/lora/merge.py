"""Merge LoRAs layer by layer.

diffusers' loader is not used: it applies the most common alpha to all layers of a network, and merges in the type of
the stored weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ....errors import InputError
from .read import LayerChange, LoraWeights

if TYPE_CHECKING:
    from torch import Tensor, nn


def merge(module: nn.Module, network: str, loras: Sequence[LoraWeights]) -> nn.Module:
    """Add the LoRAs' changes of one network to its weights, in place.

    All LoRAs are summed in float64 and rounded once, to float32, regardless of the weights' stored type.  Weights that
    no LoRA changes are not modified.

    Args:
        module: a network of the architecture that the LoRAs were loaded for.
        network: ``unet`` or a text encoder's name.

    Raises:
        InputError: if a merged weight is too large for float32.
    """
    layers = dict(module.named_modules())
    changed = {name: None for lora in loras for name in lora.changes.get(network, {})}
    for name in changed:
        changes = [lora.changes[network][name] for lora in loras if name in lora.changes.get(network, {})]
        _add(layers[name], "weight", [d for c in changes if (d := weight_change(c)) is not None], changes)
        _add(layers[name], "bias", [d for c in changes if (d := bias_change(c)) is not None], changes)
    return module.requires_grad_(False)


def weight_change(change: LayerChange) -> Tensor | None:
    """Change of a layer's weight, float64 and of its shape; None if there is none."""
    parts = change.parts
    if "diff" in parts and change.scale:
        return change.scale * parts["diff"].double().reshape(change.layer.shape)
    if "down" not in parts or not change.factor:
        return None
    rank = len(parts["down"])
    up = parts["up"].double().reshape(-1, rank)
    down = parts["down"].double().reshape(rank, -1)
    if "mid" in parts:  # Tucker: 1×1, then k×k among the ranks, then 1×1
        mid = parts["mid"].double().reshape(rank, rank, -1)
        down = (mid.permute(0, 2, 1) @ down).permute(0, 2, 1).reshape(rank, -1)
    product = up @ down
    return change.factor * (product.T if change.layer.embedding else product).reshape(change.layer.shape)


def bias_change(change: LayerChange) -> Tensor | None:
    """Change of a layer's bias, float64 and of its shape; None if there is none."""
    terms = [
        factor * change.parts[part].double().flatten()
        for part, factor in (("up_bias", change.factor), ("diff_b", change.scale))
        if part in change.parts and factor
    ]
    return sum(terms[1:], terms[0]) if terms else None


def _add(layer: nn.Module, name: str, terms: list[Tensor], changes: list[LayerChange]) -> None:
    from torch import nn

    if not terms:
        return
    base = getattr(layer, name).data
    total = base.double()
    for term in terms:
        total = total + term
    merged = total.float()
    if not merged.isfinite().all() and base.isfinite().all():
        raise InputError(
            f"the {name} of {changes[0].layer} reaches {float(total.abs().max()):.1e} with the LoRAs merged, too large "
            "for float32; use smaller scales"
        )
    setattr(layer, name, nn.Parameter(merged, requires_grad=False))
