"""Where every initialiser of an exported graph comes from: source, checkpoint key, and what was done to it.

The map is written when a graph is exported, into the bundle's ``weights.json``::

    {"schema": 1, "networks": {"unet": {
        "weights": {"unet.conv_in.weight": {"source": "unet", "key": "conv_in.weight",
                                             "transform": [{"op": "cast", "to": "float16"}]}, …},
        "constants": ["val_21", …]}}}

``key`` is the key in the source module's ``state_dict``.  Applying ``transform`` in order to a checkpoint's tensor
gives the initialiser's bytes: that is how they were made, so a swap of weights needs no guess.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.manifest import WEIGHTS
from ..errors import PnpError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

SCHEMA = 1
#: largest magnitude of a signed 8-bit number that is used; −128 is left out, so that the range is symmetric
LEVELS = 127
#: largest finite magnitude of E4M3 without infinities (Micikevicius et al. 2022, table 1)
FLOAT8_LARGEST = 448.0
#: new initialiser → (the one that it was made of, what was done to it)
Derived = dict[str, tuple[str, list[dict[str, Any]]]]


@dataclass
class WeightMap:
    """The initialisers of one graph.

    Attributes:
        weights: initialiser → ``{"source", "key", "transform"}``.
        constants: initialisers that no checkpoint holds, such as shapes and frequencies.
    """

    weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    constants: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """As ``weights.json`` holds it."""
        return {"weights": self.weights, "constants": self.constants}

    def derive(self, steps: Derived, present: list[str]) -> WeightMap:
        """The map after a rewrite of the graph.

        Args:
            steps: new initialiser → (the one that it was made of, the transform's further steps).
            present: all initialisers after the rewrite.
        """
        out = WeightMap()
        for name in present:
            if name in self.weights:
                out.weights[name] = self.weights[name]
            elif name in steps:
                old, more = steps[name]
                out.weights[name] = {**self.weights[old], "transform": [*self.weights[old]["transform"], *more]}
            else:
                out.constants.append(name)
        return out


def apply(transform: list[dict[str, Any]], tensor: Tensor) -> Tensor:
    """A checkpoint's tensor as the graph stores it.

    Raises:
        PnpError: for a step that this version does not support.
    """
    import torch

    for step in transform:
        match step["op"]:
            case "cast":
                tensor = tensor.to(getattr(torch, step["to"]))
            case "transpose":
                tensor = tensor.permute(step["perm"])
            case "reshape":
                tensor = tensor.reshape(step["shape"])
            case "shift":
                tensor = _shifted(tensor, step["axis"], step["exponents"])
            case "quantize":
                tensor = quantize(tensor, step.get("axis"))
            case "quantization_scale":
                tensor = quantization_scale(tensor, step.get("axis")).to(getattr(torch, step["to"]))
            case "float8":
                tensor = float8(tensor)
            case "float8_scale":
                tensor = float8_scale(tensor).to(getattr(torch, step["to"]))
            case other:
                raise PnpError(f"{WEIGHTS} has a transform '{other}', which this version does not support; build again")
    return tensor.contiguous()


def quantization_scale(tensor: Tensor, axis: int | None) -> Tensor:
    """Steps of symmetric 8-bit weights with a scale for each index of ``axis``: max|W| / 127, float32 ``[n]``.

    Where ``axis`` is None one step for the whole weight, a scalar.

    Each is a number of float16, so that the same steps serve graphs of both types; a channel smaller than float16's
    smallest normal number shares its step.
    """
    import torch

    over = [i for i in range(tensor.ndim) if axis is None or i != axis % tensor.ndim]
    largest = tensor.float().abs().amax(over) / LEVELS
    return largest.clamp_min(torch.finfo(torch.float16).smallest_normal).half().float()


def quantize(tensor: Tensor, axis: int | None) -> Tensor:
    """Symmetric 8-bit weights, int8, of ``tensor``'s shape: round(W / scale), half to even, within ±127."""
    import torch

    scale = quantization_scale(tensor, axis)
    if axis is not None:
        scale = scale.reshape([-1 if i == axis % tensor.ndim else 1 for i in range(tensor.ndim)])
    return (tensor.float() / scale).round().clamp(-LEVELS, LEVELS).to(torch.int8)


def float8_scale(tensor: Tensor) -> Tensor:
    """The step of a weight in E4M3: max|W| / 448, float32, a scalar; a number of float16, as ``quantization_scale``."""
    import torch

    largest = tensor.float().abs().amax() / FLOAT8_LARGEST
    return largest.clamp_min(torch.finfo(torch.float16).smallest_normal).half().float()


def float8(tensor: Tensor) -> Tensor:
    """A weight in E4M3 with one step for all of it, float8_e4m3fn, of ``tensor``'s shape: W / scale, half to even.

    The step is rounded to float16, so W / scale may pass 448 by its rounding error; it saturates.
    """
    import torch

    return (tensor.float() / float8_scale(tensor)).clamp(-FLOAT8_LARGEST, FLOAT8_LARGEST).to(torch.float8_e4m3fn)


def as_array(tensor: Tensor) -> np.ndarray:
    """A tensor as numpy has it; float8 as ``ml_dtypes`` has it, which torch cannot convert to."""
    import torch

    if tensor.dtype != torch.float8_e4m3fn:
        return tensor.numpy()
    import ml_dtypes

    return tensor.contiguous().view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)


def _shifted(tensor: Tensor, axis: int, exponents: list[int]) -> Tensor:
    import torch

    shape = [-1 if i == axis % tensor.ndim else 1 for i in range(tensor.ndim)]
    return tensor.float() * torch.exp2(torch.tensor(exponents).float()).reshape(shape)


def invert(transform: list[dict[str, Any]], stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The checkpoint's tensor of ``shape``, float32, from the output of ``apply``.

    Raises:
        PnpError: for a step that cannot be undone.
    """
    import torch

    shapes, probe = [], torch.empty(shape, device="meta")
    for step in transform:
        if step["op"] not in ("cast", "transpose", "reshape"):
            raise PnpError(f"the transform '{step['op']}' of {WEIGHTS} cannot be undone")
        shapes.append(probe.shape)
        probe = apply([step], probe)
    for step, before in zip(reversed(transform), reversed(shapes), strict=True):
        if step["op"] == "transpose":
            stored = stored.permute([step["perm"].index(i) for i in range(stored.ndim)])
        elif step["op"] == "reshape":
            stored = stored.reshape(before)
    return stored.float().contiguous()


def hide(graph: Any, names: set[str]) -> list[str]:
    """Turn a graph's weights into inputs, so that no pass over it can see what they hold.

    Optimisers merge weights that happen to be equal, drop biases that happen to be zero and fold small products.  A
    graph made so fits this one checkpoint; with its weights hidden it depends on the architecture alone, and every
    fine-tune fits it.

    Returns:
        The weights that the graph reads: an autoencoder's other half is not among them.
    """
    hidden = []
    for name in sorted(names & graph.initializers.keys()):
        value = graph.initializers.pop(name)
        if list(value.uses()) or value.is_graph_output():
            value.const_value = None
            graph.inputs.append(value)
            hidden.append(name)
    return hidden


def restore(graph: Any, module: nn.Module, hidden: list[str]) -> WeightMap:
    """Turn them into initialisers again, with transposes of a weight alone taken into it.

    The bytes are made by ``apply`` when they are written, one weight at a time, so the map is right by construction
    and no second copy of the model is held.

    Args:
        module: the one that was exported; its ``state_dict`` keys are the graph's weight names.
        hidden: of ``hide``.

    Raises:
        PnpError: if a weight was lost on the way.
    """
    own = module.state_dict()
    out = WeightMap()
    inputs = {v.name: v for v in graph.inputs}
    for name in hidden:
        value = inputs[name]
        graph.inputs.remove(value)
        cast = {"op": "cast", "to": str(own[name].dtype).removeprefix("torch.")}
        for node in [use.node for use in value.uses()]:
            if node.op_type == "Transpose":
                perm = list(node.attributes["perm"].as_ints())
                _register(graph, out, node.outputs[0], name, own[name], [cast, {"op": "transpose", "perm": perm}])
                graph.remove(node, safe=True)
        if list(value.uses()) or value.is_graph_output():
            _register(graph, out, value, name, own[name], [cast])
    made = {f"{w['source']}.{w['key']}".lstrip(".") for w in out.weights.values()}
    if lost := sorted(set(hidden) - made):
        raise PnpError(f"the exported graph lost {len(lost)} weights, for example {lost[0]}; please report it")
    out.weights = dict(sorted(out.weights.items()))
    out.constants = sorted(n for n in graph.initializers if n not in out.weights)
    return out


def _register(graph: Any, out: WeightMap, old: Any, key: str, tensor: Tensor, transform: list[dict[str, Any]]) -> None:
    """Let a new initialiser stand for the value ``old``, and note where it comes from."""
    import onnx_ir as ir

    name = ".".join([key, *("transposed" for step in transform if step["op"] == "transpose")])
    if name in out.weights:  # a weight that is transposed in two places is held once
        value = graph.initializers[name]
    else:
        made = apply(transform, tensor.to("meta"))
        value = ir.Value(name=name, shape=ir.Shape(list(made.shape)), type=ir.TensorType(onnx_type(tensor.dtype)))
        value.const_value = ir.LazyTensor(
            lambda: ir.tensor(apply(transform, tensor), name=name),
            dtype=onnx_type(tensor.dtype),
            shape=ir.Shape(list(made.shape)),
            name=name,
        )
        if old.name == name:
            old.name = f"{name}.hidden"
        graph.register_initializer(value)
        source, dot, rest = key.partition(".")
        out.weights[name] = {"source": source if dot else "", "key": rest if dot else key, "transform": transform}
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)


def check_complete(path: Path, weights: WeightMap) -> None:
    """Raise ``PnpError`` unless the map names just the graph's initialisers, every one once."""
    import onnx_ir as ir

    present = list(ir.load(path).graph.initializers)
    named = [*weights.weights, *weights.constants]
    if sorted(present) != sorted(named):
        differ = sorted(set(present) ^ set(named))
        raise PnpError(f"{WEIGHTS} and {path.name} differ in {len(differ)} initialisers, for example {differ[:1]}")


def save_with_weights(model: Any, path: Path, weights: list[str]) -> None:
    """Write ``path`` and ``path.data``: the named weights in the data file, in this order, constants in the graph.

    A weight's place then depends on the architecture alone, so new weights are a new data file for the same graph.
    """
    import onnx_ir as ir

    initializers = model.graph.initializers
    # weights that were loaded are memory-mapped from the very file that is about to be replaced
    tensors = [_in_memory(initializers[name].const_value) for name in weights]
    external = ir.external_data.convert_tensors_to_external(tensors, path.parent, path.name + ".data")
    for name, tensor in zip(weights, external, strict=True):
        initializers[name].const_value = tensor
    ir.save(model, path)


def _in_memory(tensor: Any) -> Any:
    import onnx_ir as ir

    return ir.Tensor(tensor.numpy().copy(), name=tensor.name) if isinstance(tensor, ir.ExternalTensor) else tensor


def onnx_type(dtype: Any) -> Any:
    """ONNX's name of a torch type."""
    import onnx_ir as ir

    names = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "float8_e4m3fn": "FLOAT8E4M3FN"}
    name = str(dtype).removeprefix("torch.")
    return ir.DataType[names.get(name, name.upper())]
