"""Compare written weights with the LoRA formula: W + Σ scale · alpha/rank · B·A.

The comparison with PyTorch uses the merged weights themselves, so it would not detect a wrong merge.  Here, one row of
a few layers is computed independently, in NumPy from the factors, and compared with the data file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ....errors import PnpError
from ....graph.weights import apply
from .read import LayerChange, LoraWeights

if TYPE_CHECKING:
    from torch import Tensor, nn

#: number of layers per network to compare
_LAYERS = 6
#: unit roundoff and smallest subnormal number, by type in the data file
_ROUNDING = {"float32": (2.0**-24, 2.0**-149), "float16": (2.0**-11, 2.0**-24)}


@dataclass(frozen=True)
class WeightRow:
    """Expected values of one row of a layer's weight.

    Attributes:
        key: the weight's key in the network's state dict.
        shape: shape of the weight.
        index: index of the row.
        values: ``[inputs · kernel]`` float64.
        size: sum of the terms' absolute values, of the same shape, which roundoff is relative to.
    """

    key: str
    shape: tuple[int, ...]
    index: int
    values: np.ndarray
    size: np.ndarray


def rows(module: nn.Module, network: str, loras: Sequence[LoraWeights]) -> list[WeightRow]:
    """Expected rows of some layers that the LoRAs change; call this before merging.

    Args:
        module, network, loras: as for :func:`~pnp_trt.build.swap.lora.merge.merge`.
    """
    layers = dict(module.named_modules())
    changes: dict[str, list[LayerChange]] = {}
    for lora in loras:
        for name, change in lora.changes.get(network, {}).items():
            changes.setdefault(name, []).append(change)
    # skip Tucker factors, which need three products; the other layers are sufficient
    plain = [n for n in sorted(changes) if all("mid" not in c.parts for c in changes[n])]
    out = []
    for name in plain[:: max(1, len(plain) // _LAYERS)][:_LAYERS]:
        weight = layers[name].weight
        index = len(weight) // 2
        terms = [_numbers(weight[index]).ravel(), *(_added(c, index) for c in changes[name])]
        size = np.sum(np.abs(terms), 0)
        out.append(WeightRow(f"{name}.weight", tuple(weight.shape), index, np.sum(terms, 0), size))
    return out


def check(graph: Path, weights: Mapping[str, Any], source: str, expected: Sequence[WeightRow]) -> None:
    """Compare rows with the data file of a graph; quantised weights are skipped.

    Args:
        graph: an ONNX graph whose external data was written.
        weights: entries of ``weights.json``, initialiser → ``{"source", "key", "transform"}``.
        source: the network's name there.
        expected: result of :func:`rows`.

    Raises:
        PnpError: naming a weight that differs from the formula by more than the roundoff of its type.
    """
    import onnx_ir as ir
    import torch

    initializers = ir.load(graph).graph.initializers
    by_key = {row.key: row for row in expected}
    for name, w in weights.items():
        row = by_key.get(w["key"]) if w["source"] == source else None
        if row is None or any(step["op"] not in ("cast", "transpose", "reshape") for step in w["transform"]):
            continue
        tensor = initializers[name].const_value
        assert tensor is not None
        written = tensor.numpy()
        if str(written.dtype) not in _ROUNDING:
            continue
        # apply the same transpositions to element indices, to locate the row
        moves = [step for step in w["transform"] if step["op"] != "cast"]
        places = apply(moves, torch.arange(int(np.prod(row.shape))).reshape(row.shape)).numpy().ravel()
        length = len(row.values)
        in_row = places // length == row.index
        row_values = np.empty(length)
        row_values[places[in_row] % length] = written.ravel()[in_row]
        unit, least = _ROUNDING[str(written.dtype)]
        off = np.abs(row_values - row.values)
        # the sum is rounded to float32 and then to the file's type
        if not (off <= 2 * unit * row.size + least).all():
            worst = int(np.argmax(off))
            raise PnpError(
                f"the weight {source}.{row.key} was written as {row_values[worst]:.6g} where its LoRAs give "
                f"{row.values[worst]:.6g}; nothing was written; report it"
            )


def _added(change: LayerChange, index: int) -> np.ndarray:
    """A LoRA's change of a row, ``[inputs · kernel]``."""
    parts = change.parts
    length = int(np.prod(change.layer.shape[1:]))
    out = np.zeros(length)
    if "diff" in parts:
        return out + change.scale * _numbers(parts["diff"]).reshape(change.layer.shape)[index].ravel()
    if "down" in parts:
        rank = len(parts["down"])
        up, down = _numbers(parts["up"]).reshape(-1, rank), _numbers(parts["down"]).reshape(rank, -1)
        out += change.factor * (up @ down[:, index] if change.layer.embedding else up[index] @ down)
    return out


def _numbers(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().double().numpy())
