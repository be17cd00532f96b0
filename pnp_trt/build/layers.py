"""Locate a graph's numerical errors: compare every intermediate tensor with the same graph computed in float32.

The graph is run as written, with each half-precision result rounded to its type (``parity.round_at_every_node``), and
again with half-precision types widened and quantisers removed.  Both runs use ONNX Runtime on the CPU through
polygraphy's runners, so that no GPU is needed.  The weights are the same in both, so all differences come from the
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import memory
from ..bundle.golden_file import difference, read_golden
from ..bundle.manifest import GOLDEN
from ..bundle.onnx_file import check_graph
from ..bundle.store import Bundle
from ..errors import InputError, MissingDependency, PnpError
from .parity import round_at_every_node

#: share of the free memory that the outputs of one run of both graphs may take
_SHARE = 0.25
#: suffix of the graph outputs that are added to read a tensor as float32
_SEEN = ".seen"


@dataclass(frozen=True)
class LayerParity:
    """One tensor of a graph.

    Attributes:
        place: index of its node in execution order.
        node: name of the node that computes it.
        op: type of that node.
        near: the last weight read up to this node, which locates it in the model; empty before the first weight.
        error: ‖as written − float32‖ / ‖float32‖; NaN where either is not finite.
        largest: largest magnitude in float32; NaN where it is not finite.
        finite: whether it is finite in the graph as written.
        finite_in_float32: whether it is finite in float32.
    """

    place: int
    tensor: str
    node: str
    op: str
    near: str
    shape: tuple[int, ...]
    error: float
    largest: float
    finite: bool
    finite_in_float32: bool


def layerwise(
    graph: Path,
    inputs: Mapping[str, np.ndarray],
    *,
    budget: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[LayerParity]:
    """Compare all floating-point intermediate tensors of a graph, in execution order.

    The graph is run several times if its tensors do not fit into memory together.

    Args:
        graph: an ONNX file with its external weights in the same folder; nothing is written there.
        inputs: one row.
        budget: bytes that the outputs of a run may take; None takes a quarter of the free memory.
        progress: called with (tensors done, total tensors).

    Raises:
        InputError: if polygraphy or onnx is not installed.
        PnpError: if ONNX Runtime cannot run the graph.
    """
    ir = _onnx_ir()
    written, widened = ir.load(graph), ir.load(graph)
    # node indices are those of the original graph; the rewrites insert nodes and keep names
    floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    tensors = {}
    near = ""
    for place, node in enumerate(ir.load(graph).graph):
        read = [v.name for v in node.inputs if v is not None and v.is_initializer()]
        near = next((name for name in read if name.rpartition(".")[2] in ("weight", "bias", "transposed")), near)
        if node.op_type in ("Constant", "QuantizeLinear"):
            continue
        for out in node.outputs:
            if out.name and out.dtype in floats:
                tensors[out.name] = (place, node, near, _bytes(out))
    round_at_every_node(written)
    in_float32(widened)
    present = {v.name for node in widened.graph for v in node.outputs}
    tensors = {name: entry for name, entry in tensors.items() if name in present}
    budget = budget or max(64 << 20, int(memory.free() * _SHARE))
    layers: list[LayerParity] = []
    for names in _batches({n: size for n, (*_, size) in tensors.items()}, budget // 2):
        for name, (a, b) in zip(names, _run_both(written, widened, graph.parent, names, inputs), strict=True):
            place, node, near, _ = tensors[name]
            finite, reference_finite = bool(np.isfinite(a).all()), bool(np.isfinite(b).all())
            error = 0.0 if np.array_equal(a, b) else difference(a, b)
            largest = float(np.abs(b).max()) if reference_finite and b.size else float("nan")
            layers.append(
                LayerParity(
                    place, name, node.name or "", node.op_type, near, a.shape,
                    error if finite and reference_finite else float("nan"), largest, finite, reference_finite,
                )
            )  # fmt: skip
        if progress is not None:
            progress(len(layers), len(tensors))
    return layers


def graphs(bundle: Bundle, networks: list[str]) -> dict[str, tuple[Path, dict[str, np.ndarray]]]:
    """Graph and one row of golden inputs of each of a bundle's networks.

    Args:
        networks: names of the networks; empty for all.

    Raises:
        InputError: for a network that the bundle does not have, or a bundle without graphs.
    """
    records = bundle.manifest.networks
    if unknown := [n for n in networks if n not in records]:
        raise InputError(f"engine '{bundle.name}' has no network '{unknown[0]}'; it has: {', '.join(records)}")
    golden = read_golden(bundle.folder / GOLDEN, records)
    out = {}
    for name in networks or records:
        path = bundle.folder / records[name].graph
        if path.suffix != ".onnx":
            raise InputError(
                f"engine '{bundle.name}' of backend '{bundle.manifest.backend}' contains modules and no graphs; "
                "build it with another --backend to compare its layers"
            )
        check_graph(bundle.folder, bundle.manifest, name)
        out[name] = (path, {k: v[:1] for k, v in golden[name][0].items()})
    return out


def verdict(layers: list[LayerParity], limit: float) -> tuple[str, bool]:
    """Summarise a graph's comparison in one sentence, and return whether there is a problem.

    Only the output, which is the last tensor, must be within the limit: errors of intermediate tensors may be larger,
    and often are where terms cancel.
    """
    if (not_finite := first_not_finite(layers)) is not None:
        why = (
            "in float32 too: check the weights"
            if not not_finite.finite_in_float32
            else f"{not_finite.largest:.3g} in float32"
        )
        return f"the first tensor that is not finite is '{not_finite.tensor}' ({_where(not_finite)}); {why}", True
    last = layers[-1]
    if not last.error <= limit and (above := first_past(layers, limit)) is not None:
        return (
            f"the output has an error of {last.error:.1e} (limit {limit:.0e}), and the first tensor above the limit is "
            f"'{above.tensor}' ({_where(above)}) with {above.error:.1e}"
        ), True
    furthest = max(layers, key=lambda layer: layer.error)
    return (
        f"all {len(layers)} tensors are finite; the output's relative error against float32 is {last.error:.1e}, "
        f"the largest is {furthest.error:.1e}, of '{furthest.tensor}'"
    ), False


def _where(layer: LayerParity) -> str:
    return f"node {layer.place}, {layer.op}" + (f", near {layer.near}" if layer.near else "")


def first_not_finite(layers: list[LayerParity]) -> LayerParity | None:
    """The first tensor in execution order that contains an infinity or a NaN."""
    return next((layer for layer in layers if not layer.finite), None)


def first_past(layers: list[LayerParity], limit: float) -> LayerParity | None:
    """The first tensor whose error exceeds ``limit``, or that is not finite."""
    return next((layer for layer in layers if not layer.error <= limit), None)


def worst(layers: list[LayerParity], count: int) -> list[LayerParity]:
    """The ``count`` tensors with the largest errors, in execution order; tensors that are not finite rank highest."""
    ranked = sorted(layers, key=lambda layer: (layer.error == layer.error, -layer.error, layer.place))
    return sorted(ranked[:count], key=lambda layer: layer.place)


def in_float32(model: Any) -> None:
    """Widen every half-precision value of a graph and remove its quantisers; values keep their names.

    Weights are widened where they are read, so that no second copy of them is stored.

    Args:
        model: an ``onnx_ir.Model``, changed in place.
    """
    import onnx_ir as ir

    half = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    graph = model.graph
    widened: dict[Any, Any] = {}
    for node in list(graph):
        for name, attribute in list(node.attributes.items()):
            if name in ("to", "output_dtype") and attribute.as_int() in [int(d) for d in half]:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in half:
                wide = ir.tensor(attribute.as_tensor().numpy().astype(np.float32))
                node.attributes[name] = ir.AttrTensor(name, wide)
        for i, value in enumerate(node.inputs):
            if value is not None and value.is_initializer() and value.dtype in half:
                if value not in widened:
                    cast = ir.Node("", "Cast", [value], attributes=[ir.AttrInt64("to", int(ir.DataType.FLOAT))])
                    cast.outputs[0].name = f"{value.name}.wide"
                    graph.insert_before(node, cast)
                    widened[value] = cast.outputs[0]
                node.replace_input_with(i, widened[value])
        for out in node.outputs:
            if out.dtype in half:
                out.type = ir.TensorType(ir.DataType.FLOAT)
    for node in [n for n in graph if n.op_type == "DequantizeLinear"]:
        quantiser = node.inputs[0].producer() if node.inputs[0] is not None else None
        if quantiser is not None and quantiser.op_type == "QuantizeLinear":
            ir.convenience.replace_all_uses_with(node.outputs[0], quantiser.inputs[0])


def _run_both(
    written: Any, widened: Any, folder: Path, names: list[str], inputs: Mapping[str, np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each named tensor of both graphs, in float32."""
    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.comparator import Comparator
    from polygraphy.logger import G_LOGGER

    runners = [
        OnnxrtRunner(_session(model, folder, names), name) for model, name in ((written, "as"), (widened, "wide"))
    ]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        try:
            results = Comparator.run(runners, data_loader=[dict(inputs)], warm_up=0)
        except Exception as e:  # ONNX Runtime raises several exception types
            raise PnpError(f"ONNX Runtime cannot run a graph of {folder}: {str(e).splitlines()[0]}") from e
    (as_written,), (wide,) = (list(iterations) for _, iterations in results.items())
    for name in names:
        yield np.asarray(as_written[name + _SEEN]), np.asarray(wide[name + _SEEN])


def _session(model: Any, folder: Path, names: list[str]) -> Any:
    """A session whose outputs are the named tensors; external weights are read from ``folder``."""
    import onnx_ir as ir
    import onnxruntime as ort

    proto = ir.to_proto(model)
    del proto.graph.output[:]
    for name in names:
        # numpy has no bfloat16, so read all tensors as float32
        node = proto.graph.node.add(op_type="Cast", input=[name], output=[name + _SEEN])
        node.attribute.add(name="to", type=2, i=int(ir.DataType.FLOAT))
        proto.graph.output.add(name=name + _SEEN).type.tensor_type.elem_type = int(ir.DataType.FLOAT)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # the exception has the message; the log would repeat it on standard error
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    try:
        return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise PnpError(f"ONNX Runtime cannot load a graph of {folder}: {str(e).splitlines()[0]}") from e


def _bytes(value: Any) -> int:
    """Bytes of a value in float32 for one row; symbolic dimensions count as 1."""
    size = 4
    for d in value.shape or ():
        size *= d if isinstance(d, int) else 1
    return size


def _batches(sizes: Mapping[str, int], budget: int) -> Iterator[list[str]]:
    """Yield the names in order, in batches of at most ``budget`` bytes but at least one name."""
    batch: list[str] = []
    used = 0
    for name, size in sizes.items():
        if batch and used + size > budget:
            yield batch
            batch, used = [], 0
        batch.append(name)
        used += size
    if batch:
        yield batch


def _onnx_ir() -> Any:
    try:
        import onnx_ir
        import polygraphy  # noqa: F401  (checked here for a clear message)
    except ImportError as e:
        raise MissingDependency(
            f"comparing layers needs {e.name}; install with: pip install 'pnp-trt[build]'"
        ) from None
    return onnx_ir
