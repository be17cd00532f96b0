"""The FP8 recipe: most of the U-Net's products in E4M3, everything else in the backend's fast float type."""

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
    """W8A8 in E4M3 (Micikevicius et al. 2022) with one scale for an input and one for a weight.

    Ranges are those of the same record that INT8 takes, their whole ``max``: E4M3 has four bits of exponent, so a wide
    range costs its small values no precision.  Convolutions keep their fused bias with one scale a weight only.
    """

    name: str = "fp8"

    @property
    def elements(self) -> frozenset[str]:
        """The quantised type; the float type beside it is the backend's choice."""
        return frozenset({"float8_e4m3fn"})

    def choices(self, record: Record) -> Mapping[str, LayerRange]:
        """The layers that the record's decision allows 8 bits, less ``FUSED_IN_FLOAT``."""
        return {n: r for n, r in record.whole_ranges().items() if not is_fused_in_float(n)}

    def quantize(self, graph: Path, weights: WeightMap, record: Record | None) -> Derived | None:
        """Insert quantise/dequantise pairs around the layers of :meth:`choices`."""
        from .int8.qdq import FLOAT8, quantize_graph

        assert record is not None  # `needs_record`
        return quantize_graph(graph, weights, self.choices(record), FLOAT8)


FP8 = Fp8()
