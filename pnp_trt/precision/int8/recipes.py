"""The INT8 recipes: quantise/dequantise pairs in the U-Net, everything else in the backend's fast float type."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..recipes import Recipe, recipe

if TYPE_CHECKING:
    from ...graph.weights import Derived, WeightMap
    from .record import LayerRange, Record

#: layers that stay in float on TensorRT-RTX: the projections into and out of transformer blocks and after attentions.
#: TensorRT-RTX fuses them with a transposition, or with bias and residual, but needs separate kernels for those in 8
#: bits; the other layers need as many kernels as in float (``benchmarks.eight_bit_kernels``)
FUSED_IN_FLOAT = ("*.proj_in", "*.proj_out", "*.to_out.0")


def is_fused_in_float(layer: str) -> bool:
    """Whether a layer is one of ``FUSED_IN_FLOAT``."""
    return any(fnmatch.fnmatch(layer, pattern) for pattern in FUSED_IN_FLOAT)


@dataclass(frozen=True)
class Int8(Recipe):
    """W8A8: the inputs and weights of selected U-Net layers in INT8, everything else in float16.

    A calibration record (``pnp-trt calibrate``) defines the layers and the ranges of their inputs.  Weights have a
    scale per output channel, inputs a single scale, and both are symmetric.  Text encoder and decoder stay in
    ``beside``.  The limit applies to golden inputs, which are noise at any timestep and exceed the ranges of real
    inputs.

    Attributes:
        one_scale: whether each weight has one scale and the layers in ``FUSED_IN_FLOAT`` stay in float, the form in
            which TensorRT-RTX fuses a convolution with its bias and residual.
    """

    name: str = "int8"
    dtype: str = "float16"
    limit: float = 0.1
    networks: tuple[str, ...] = ("unet",)
    beside: str = "fp16"
    calibrated: bool = True
    one_scale: bool = False

    @property
    def elements(self) -> frozenset[str]:
        """The quantised type; the backend chooses the float type of everything else."""
        return frozenset({"int8"})

    @property
    def needs_record(self) -> bool:
        """Whether it needs ranges of activations."""
        return self.calibrated

    def on_backend(self, beside: Recipe, one_scale: bool = False) -> Recipe:
        """Return this recipe with everything that is not quantised in the backend's fast type."""
        return replace(self, beside=beside.name, dtype=beside.dtype, one_scale=one_scale)

    def of_network(self, network: str) -> Recipe:
        """Return this recipe, or ``beside`` for networks that are not quantised."""
        return self if network in self.networks else recipe(self.beside)

    def choices(self, record: Record) -> Mapping[str, LayerRange]:
        """Return the layers with 8-bit inputs and weights and their ranges, from a record."""
        chosen = record.choices()
        return {n: c for n, c in chosen.items() if not (self.one_scale and is_fused_in_float(n))}

    def quantize(self, graph: Path, weights: WeightMap, record: Record | None) -> Derived | None:
        """Insert quantise/dequantise pairs for the record's layers, or without a record for all weights."""
        from .qdq import INT8, INT8_ONE_SCALE, matrix_layers, quantize_graph, quantize_weights

        if record is not None:
            return quantize_graph(graph, weights, self.choices(record), INT8_ONE_SCALE if self.one_scale else INT8)
        return quantize_weights(graph, weights, matrix_layers(graph, weights))


@dataclass(frozen=True)
class Int8Weights(Int8):
    """Weight-only: stored in INT8 and computed in float16, to save memory and disk space, not time.

    The rounding error of a weight is at most 1/254 (0.4 %) of the largest weight in its channel, and no record is
    needed.  TensorRT-RTX widens each weight in a separate kernel before the layer that reads it, which moves 5 bytes
    instead of 2.
    """

    name: str = "int8-weights"
    limit: float = 0.05
    calibrated: bool = False


INT8, INT8_WEIGHTS = Int8(), Int8Weights()
