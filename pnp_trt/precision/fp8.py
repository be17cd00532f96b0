"""The FP8 recipe: most matrix products of the U-Net in E4M3, everything else in the backend's fast float type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .int8.recipes import Int8, is_fused_in_float

if TYPE_CHECKING:
    from ..graph.weights import Derived, WeightMap
    from .int8.record import LayerRange, Record


@dataclass(frozen=True)
class Fp8(Int8):
    """W8A8 in E4M3 (Micikevicius et al. 2022) with one scale per input and one per weight.

    Ranges come from the same record as for INT8, but are always the full ``max``: E4M3 has four bits of exponent, so a
    wide range costs small values no precision.  With more than one scale per weight, a convolution's bias would not be
    fused.
    """

    name: str = "fp8"

    @property
    def elements(self) -> frozenset[str]:
        """The quantised type; the backend chooses the float type of everything else."""
        return frozenset({"float8_e4m3fn"})

    def choices(self, record: Record) -> Mapping[str, LayerRange]:
        """Return the layers that the record assigns to 8 bits, except those in ``FUSED_IN_FLOAT``."""
        return {n: r for n, r in record.whole_ranges().items() if not is_fused_in_float(n)}

    def quantize(self, graph: Path, weights: WeightMap, record: Record | None) -> Derived | None:
        """Insert quantise/dequantise pairs around the layers of :meth:`choices`."""
        from .int8.qdq import FLOAT8, quantize_graph

        assert record is not None  # `needs_record`
        return quantize_graph(graph, weights, self.choices(record), FLOAT8)


FP8 = Fp8()
