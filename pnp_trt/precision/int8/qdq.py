"""8-bit quantisation of an exported graph: QuantizeLinear and DequantizeLinear around the quantised layers.

Quantisation is explicit and symmetric, as TensorRT requires, with zero points of zero.  An input has one scale.  A
weight has one scale per output channel or a single one (``Format``), and is stored in 8 bits, at half or a quarter of
its size.  The graph's float type is unchanged: a float16 graph has float16 scales, so everything that is not quantised
computes as before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import PnpError
from ...graph.weights import FLOAT8_LARGEST, LEVELS, Derived, WeightMap, apply, as_array, save_with_weights

if TYPE_CHECKING:
    from .record import LayerRange


@dataclass(frozen=True)
class Format:
    """An 8-bit type, and the form of its scales.

    Attributes:
        name: part of the names of initialisers.
        onnx: ONNX's name of the type.
        largest: magnitude to which an input's range is scaled.
        by_channel: whether a weight has a scale per output channel instead of a single one.
    """

    name: str
    onnx: str
    largest: float
    by_channel: bool

    def steps(self, axis: int, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the transform steps from a weight to its 8-bit values, and to its scale of type ``dtype``."""
        if self.onnx == "FLOAT8E4M3FN":
            return {"op": "float8"}, {"op": "float8_scale", "to": dtype}
        along = {"axis": axis} if self.by_channel else {}
        return {"op": "quantize", **along}, {"op": "quantization_scale", **along, "to": dtype}

    def zeros(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return zero points of a shape."""
        import onnx_ir as ir

        return np.zeros(shape, ir.DataType[self.onnx].numpy())


INT8 = Format("int8", "INT8", LEVELS, by_channel=True)
#: TensorRT-RTX fuses bias and residual only into convolutions whose weight has one scale
INT8_ONE_SCALE = replace(INT8, by_channel=False)
#: E4M3; with one scale the bias stays fused, and the loss of precision is negligible
FLOAT8 = Format("float8", "FLOAT8E4M3FN", FLOAT8_LARGEST, by_channel=False)


def layer_of(entry: Mapping[str, Any]) -> str:
    """Return the layer of an entry of the weight map, such as ``unet.conv_in``; empty if it is not a weight."""
    name = f"{entry['source']}.{entry['key']}"
    return name.removesuffix(".weight") if name.endswith(".weight") else ""


def quantize_graph(path: Path, weights: WeightMap, choices: Mapping[str, LayerRange], form: Format = INT8) -> Derived:
    """Give the named layers 8-bit inputs and weights (W8A8), in place.

    Args:
        path: the ONNX file.
        weights: its weight map.
        choices: how each layer is quantised, by name.
        form: the 8-bit type; SmoothQuant's exponents are for INT8.

    Returns:
        The sources and steps of the new initialisers, for ``WeightMap.derive``.

    Raises:
        PnpError: if the graph lacks a layer, or computes one with another operator than Conv, MatMul or Gemm.
    """
    return _rewrite(path, weights, choices, choices.keys(), form)


def quantize_weights(path: Path, weights: WeightMap, layers: Collection[str]) -> Derived:
    """Store the weights of the named layers in INT8, in place, and compute as before; see ``quantize_graph``."""
    return _rewrite(path, weights, {}, layers, INT8)


def matrix_layers(path: Path, weights: WeightMap) -> list[str]:
    """Return the layers that are a Conv without groups, a MatMul or a Gemm with an initialiser as weight."""
    import onnx_ir as ir

    graph = ir.load(path).graph
    layers = []
    for name, entry in weights.weights.items():
        users = [] if not layer_of(entry) else list(graph.initializers[name].uses())
        if users and all(_axis(use.node, use.idx) is not None for use in users):
            layers.append(layer_of(entry))
    return list(dict.fromkeys(layers))


def _rewrite(
    path: Path, weights: WeightMap, choices: Mapping[str, LayerRange], layers: Collection[str], form: Format
) -> Derived:
    import onnx_ir as ir

    model = ir.load(path)
    inserted = _Inserted(model.graph, form)
    derived: Derived = {}
    done = set()
    for name, entry in weights.weights.items():
        layer = layer_of(entry)
        if layer not in layers:
            continue
        done.add(layer)
        value, choice = model.graph.initializers[name], choices.get(layer)
        for use in list(value.uses()):
            axis = _axis(use.node, use.idx)
            if axis is None:
                raise PnpError(
                    f"{layer} is read by {use.node.op_type} and cannot take {form.name.upper()}; "
                    "leave it out, or report it"
                )
            if choice is not None:
                use.node.replace_input_with(0, inserted.activation(use.node.inputs[0], choice, use.node))
            use.node.replace_input_with(use.idx, inserted.weight(value, axis, choice, use.node, derived))
        model.graph.initializers.pop(name)
    if missing := sorted(set(layers) - done):
        raise PnpError(
            f"the record names {len(missing)} layers that {path.name} does not have, for example {missing[0]}; "
            "calibrate this base and guide again"
        )
    model.graph.sort()  # an input that several layers read must be quantised before the first of them
    graph = model.graph.initializers
    stored = [n for n, v in graph.items() if n in derived or isinstance(v.const_value, ir.ExternalTensor)]
    save_with_weights(model, path, sorted(stored))
    return derived


def _axis(node: Any, index: int) -> int | None:
    """Return the axis of a weight's output channels in a node that reads it; None if it cannot be quantised."""
    if index != 1:
        return None
    if node.op_type == "Conv":
        return 0 if "group" not in node.attributes or node.attributes["group"].as_int() == 1 else None
    if node.op_type == "Gemm":
        return 0 if "transB" in node.attributes and node.attributes["transB"].as_int() else 1
    return 1 if node.op_type == "MatMul" and len(node.inputs[1].shape) == 2 else None


class _Inserted:
    """Inserts nodes into a graph, and reuses equal ones."""

    def __init__(self, graph: Any, form: Format) -> None:
        self.graph = graph
        self.form = form
        self._inserted: dict[Any, Any] = {}

    def activation(self, x: Any, choice: LayerRange, before: Any) -> Any:
        """Insert quantisation and dequantisation of ``x``; with SmoothQuant, after dividing by the factors."""
        kind = x.dtype.numpy()
        key = (x.name, choice)
        if key not in self._inserted:
            y = x
            if choice.exponents is not None:
                factors = np.exp2(-np.array(choice.exponents, np.float64)).astype(kind)
                y = self._node("Mul", [x, self._constant(f"{x.name}.smooth{len(self._inserted)}", factors)], before)
            self._inserted[key] = self._pair(y, choice.step(self.form.largest), kind, before)
        return self._inserted[key]

    def weight(self, value: Any, axis: int, choice: LayerRange | None, before: Any, derived: Derived) -> Any:
        """Store a weight in 8 bits, and return its dequantised value."""
        import torch

        key = (value.name, axis, choice)
        if key in self._inserted:
            return self._inserted[key]
        base = value.name.removesuffix(".weight") if value.name.endswith(".weight") else value.name
        tensor = torch.from_numpy(value.const_value.numpy().copy())
        dtype = str(tensor.dtype).removeprefix("torch.")
        smooth: list[dict[str, Any]] = []
        if choice is not None and choice.exponents is not None:
            smooth = [{"op": "shift", "axis": 1 - axis, "exponents": list(choice.exponents)}]
        values, scale = self.form.steps(axis, dtype)
        steps = {f"{base}.{self.form.name}": [*smooth, values], f"{base}.scale": [*smooth, scale]}
        stored = []
        for name, more in steps.items():
            derived[name] = (value.name, more)
            stored.append(self._constant(name, as_array(apply(more, tensor))))
        if self.form.by_channel:
            channels = len(stored[1].const_value.numpy())
            zero = self._constant(f"quantize.zeros_{channels}", self.form.zeros((channels,)))
        else:
            zero = self._constant("quantize.zero", self.form.zeros(()))
        along = axis if self.form.by_channel else None
        self._inserted[key] = self._node("DequantizeLinear", [*stored, zero], before, axis=along, like=value)
        return self._inserted[key]

    def _pair(self, x: Any, scale: float, kind: Any, before: Any) -> Any:
        step = np.asarray(scale, np.float32).astype(kind)
        if not np.isfinite(step) or step < np.finfo(kind).smallest_normal:
            step = np.asarray(np.finfo(kind).smallest_normal, kind)
        step_value = self._constant(f"{x.name}.scale{len(self._inserted)}", step)
        zero = self._constant("quantize.zero", self.form.zeros(()))
        rounded = self._node("QuantizeLinear", [x, step_value, zero], before)
        return self._node("DequantizeLinear", [rounded, step_value, zero], before, like=x)

    def _constant(self, name: str, array: np.ndarray) -> Any:
        import onnx_ir as ir

        if name not in self.graph.initializers:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
            )
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _node(self, op: str, inputs: list[Any], before: Any, axis: int | None = None, like: Any = None) -> Any:
        import onnx_ir as ir

        attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
        node = ir.Node("", op, inputs, attributes=attributes)
        source = like if like is not None else inputs[0]
        out = node.outputs[0]
        out.name = f"{inputs[0].name}.{op}.{len(self._inserted)}"
        quantised = op == "QuantizeLinear"
        out.shape, out.type = source.shape, ir.TensorType(ir.DataType[self.form.onnx] if quantised else source.dtype)
        self.graph.insert_before(before, node)
        return out
