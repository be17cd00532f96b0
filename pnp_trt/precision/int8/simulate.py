"""Simulation in float32 modules of the INT8 arithmetic of the quantised graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...graph.weights import LEVELS, quantization_scale, quantize
from .record import LayerRange


@contextmanager
def quantised(layers: Mapping[str, nn.Module], choices: Mapping[str, LayerRange]) -> Iterator[None]:
    """Simulate INT8 inside the block for the layers in ``choices``.

    Args:
        layers: all layers by name.
        choices: how to quantise some of them.
    """
    handles = []
    originals: list[tuple[nn.Linear | nn.Conv2d, Tensor]] = []
    try:
        for name, choice in choices.items():
            layer = layers[name]
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            factors = None if choice.exponents is None else torch.exp2(torch.tensor(choice.exponents).float())
            originals.append((layer, layer.weight.data))
            layer.weight.data = _weight(layer.weight.data, factors)

            def hook(
                _: nn.Module, args: tuple[Tensor, ...], c: LayerRange = choice, f: Tensor | None = factors
            ) -> Tensor:
                return _input(args[0], c.scale, f)

            handles.append(layer.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, data in originals:
            layer.weight.data = data


def _input(x: Tensor, scale: float, factors: Tensor | None) -> Tensor:
    smooth = x if factors is None else x / factors
    out = torch.fake_quantize_per_tensor_affine(smooth, scale, 0, -LEVELS - 1, LEVELS)
    return out if factors is None else out * factors


def _weight(weight: Tensor, factors: Tensor | None) -> Tensor:
    smooth = weight if factors is None else weight * factors
    scale = quantization_scale(smooth, 0)
    out = quantize(smooth, 0).float() * scale.reshape(-1, *(1,) * (weight.ndim - 1))
    return (out if factors is None else out / factors).to(weight.dtype)
