"""The origin of every initialiser of an exported graph: its source, checkpoint key, and transform.

The map is written when a graph is exported, into the bundle's ``weights.json``::

    {"schema": 1, "networks": {"unet": {
        "weights": {"unet.conv_in.weight": {"source": "unet", "key": "conv_in.weight",
                                             "transform": [{"op": "cast", "to": "float16"}]}, …},
        "constants": ["val_21", …]}}}

``key`` is the key in the source module's ``state_dict``.  Applying the steps of ``transform`` in order to a
checkpoint's tensor gives the initialiser's bytes.  The export computes them in the same way, so a swap of weights
reproduces them exactly.
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
#: largest magnitude of quantised 8-bit integers; -128 is unused, so that the range is symmetric
LEVELS = 127
#: largest finite magnitude of E4M3 without infinities (Micikevicius et al. 2022, table 1)
FLOAT8_LARGEST = 448.0
#: new initialiser → (source initialiser, transform steps)
Derived = dict[str, tuple[str, list[dict[str, Any]]]]


@dataclass
class WeightMap:
    """The initialisers of one graph.

    Attributes:
        weights: initialiser → ``{"source", "key", "transform"}``.
        constants: initialisers that are not in a checkpoint, such as shapes and frequencies.
    """

    weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    constants: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the form stored in ``weights.json``."""
        return {"weights": self.weights, "constants": self.constants}

    def derive(self, steps: Derived, present: list[str]) -> WeightMap:
        """Return the map after a rewrite of the graph.

        Args:
            steps: new initialiser → (source initialiser, additional transform steps).
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
    """Transform a checkpoint's tensor into the form that the graph stores.

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
    """Return scales of symmetric 8-bit weights, one for each index of ``axis``: max|W| / 127, float32 ``[n]``.

    With ``axis`` None, a scalar for the whole weight.

    Scales are representable in float16, so that graphs of both types use the same ones, and at least float16's smallest
    normal number.
    """
    import torch

    over = [i for i in range(tensor.ndim) if axis is None or i != axis % tensor.ndim]
    largest = tensor.float().abs().amax(over) / LEVELS
    return largest.clamp_min(torch.finfo(torch.float16).smallest_normal).half().float()


def quantize(tensor: Tensor, axis: int | None) -> Tensor:
    """Return symmetric 8-bit weights, int8, of ``tensor``'s shape: round(W / scale), half to even, within ±127."""
    import torch

    scale = quantization_scale(tensor, axis)
    if axis is not None:
        scale = scale.reshape([-1 if i == axis % tensor.ndim else 1 for i in range(tensor.ndim)])
    return (tensor.float() / scale).round().clamp(-LEVELS, LEVELS).to(torch.int8)


def float8_scale(tensor: Tensor) -> Tensor:
    """Return the scale of an E4M3 weight: max|W| / 448, a float32 scalar, bounded as in ``quantization_scale``."""
    import torch

    largest = tensor.float().abs().amax() / FLOAT8_LARGEST
    return largest.clamp_min(torch.finfo(torch.float16).smallest_normal).half().float()


def float8(tensor: Tensor) -> Tensor:
    """Return a weight in E4M3 with one scale, float8_e4m3fn, of ``tensor``'s shape: W / scale, half to even.

    The scale is rounded to float16, so W / scale may exceed 448 by its rounding error; it is clamped.
    """
    import torch

    return (tensor.float() / float8_scale(tensor)).clamp(-FLOAT8_LARGEST, FLOAT8_LARGEST).to(torch.float8_e4m3fn)


def as_array(tensor: Tensor) -> np.ndarray:
    """Convert a tensor to numpy; float8 to the type of ``ml_dtypes``, which torch cannot convert to directly."""
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
    """Recover the checkpoint's tensor of ``shape``, in float32, from the output of ``apply``.

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
    """Turn a graph's weights into inputs, so that optimisation passes cannot depend on their values.

    Optimisers merge weights that happen to be equal, drop biases that happen to be zero and fold small products.  The
    resulting graph would fit only this checkpoint.  With hidden weights it depends only on the architecture, and fits
    every fine-tune.

    Returns:
        Names of the weights that the graph reads, without those of, for example, the autoencoder's other half.
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
    """Turn hidden weights into initialisers again, and fold transposes of a weight into it.

    ``apply`` computes the bytes when they are written, one weight at a time.  The map is therefore correct by
    construction, and there is no second copy of the model in memory.

    Args:
        module: the exported module; its ``state_dict`` keys are the graph's weight names.
        hidden: the names that ``hide`` returned.

    Raises:
        PnpError: if a hidden weight is missing from the graph.
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
    restored = {f"{w['source']}.{w['key']}".lstrip(".") for w in out.weights.values()}
    if lost := sorted(set(hidden) - restored):
        raise PnpError(f"the exported graph lost {len(lost)} weights, for example {lost[0]}; please report it")
    out.weights = dict(sorted(out.weights.items()))
    out.constants = sorted(n for n in graph.initializers if n not in out.weights)
    return out


def _register(graph: Any, out: WeightMap, old: Any, key: str, tensor: Tensor, transform: list[dict[str, Any]]) -> None:
    """Replace the value ``old`` by a new initialiser, and record its origin."""
    import onnx_ir as ir

    name = ".".join([key, *("transposed" for step in transform if step["op"] == "transpose")])
    if name in out.weights:  # a weight that is transposed in two places is stored once
        value = graph.initializers[name]
    else:
        meta = apply(transform, tensor.to("meta"))
        value = ir.Value(name=name, shape=ir.Shape(list(meta.shape)), type=ir.TensorType(onnx_type(tensor.dtype)))
        value.const_value = ir.LazyTensor(
            lambda: ir.tensor(apply(transform, tensor), name=name),
            dtype=onnx_type(tensor.dtype),
            shape=ir.Shape(list(meta.shape)),
            name=name,
        )
        if old.name == name:
            old.name = f"{name}.hidden"
        graph.register_initializer(value)
        source, dot, rest = key.partition(".")
        out.weights[name] = {"source": source if dot else "", "key": rest if dot else key, "transform": transform}
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)


def check_complete(path: Path, weights: WeightMap) -> None:
    """Raise ``PnpError`` unless the map names each of the graph's initialisers exactly once, and no others."""
    import onnx_ir as ir

    present = list(ir.load(path).graph.initializers)
    named = [*weights.weights, *weights.constants]
    if sorted(present) != sorted(named):
        differ = sorted(set(present) ^ set(named))
        raise PnpError(f"{WEIGHTS} and {path.name} differ in {len(differ)} initialisers, for example {differ[:1]}")


def save_with_weights(model: Any, path: Path, weights: list[str]) -> None:
    """Write ``path`` and ``path.data``: the named weights in the data file, in this order, constants in the graph.

    The offset of a weight then depends only on the architecture, so replacing weights replaces only the data file.
    """
    import onnx_ir as ir

    initializers = model.graph.initializers
    # loaded weights are memory-mapped from the file that is about to be replaced
    tensors = [_in_memory(initializers[name].const_value) for name in weights]
    external = ir.external_data.convert_tensors_to_external(tensors, path.parent, path.name + ".data")
    for name, tensor in zip(weights, external, strict=True):
        initializers[name].const_value = tensor
    ir.save(model, path)


def _in_memory(tensor: Any) -> Any:
    import onnx_ir as ir

    return ir.Tensor(tensor.numpy().copy(), name=tensor.name) if isinstance(tensor, ir.ExternalTensor) else tensor


def onnx_type(dtype: Any) -> Any:
    """Return the ONNX type that corresponds to a torch type."""
    import onnx_ir as ir

    names = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "float8_e4m3fn": "FLOAT8E4M3FN"}
    name = str(dtype).removeprefix("torch.")
    return ir.DataType[names.get(name, name.upper())]
