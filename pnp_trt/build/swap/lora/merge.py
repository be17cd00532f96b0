"""The arithmetic of a merge, layer by layer.

diffusers' own loader is not used: it gives all layers of a network the commonest alpha, and merges in the type that
the weights are stored in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ....errors import InputError
from .read import LayerChange, LoraWeights

if TYPE_CHECKING:
    from torch import Tensor, nn


def merge(module: nn.Module, network: str, loras: Sequence[LoraWeights]) -> nn.Module:
    """Add the parts that some LoRAs have for one network to its weights, in place.

    Sums are taken in float64 over all LoRAs and rounded once, to float32, whatever type the weights were stored in;
    weights that no LoRA changes stay as they are.

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
    """What is added to a layer's weight: float64, of its shape; None where nothing is."""
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
    """What is added to a layer's bias: float64, of its shape; None where nothing is."""
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
