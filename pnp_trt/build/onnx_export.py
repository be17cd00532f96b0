"""Export PyTorch modules as ONNX graphs (opset 23, native Attention and GroupNormalization, external weights)."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PnpError
from ..graph.weights import WeightMap, hide, restore, save_with_weights
from ..io.process import collector_paused
from ..io.text import printable
from .sizes import OpenAxis

OPSET = 23


def export(
    module: nn.Module,
    inputs: dict[str, Tensor],
    outputs: str | Sequence[str],
    path: Path,
    open_axes: Sequence[OpenAxis] = (),
    output_names: str = "image_{}",
) -> WeightMap:
    """Write ``path`` and ``path.data``; the first dimension of every input becomes the dynamic ``batch``.

    The files are reproducible: equal modules give equal files.

    Args:
        inputs: example tensors by argument name of ``module.forward``; batch at least 2.
        outputs: names of the outputs, or the name of the only one.
        open_axes: further dynamic dimensions, each in every input of its rank; the example's sizes must be legal and
            more than one step.
        output_names: format of the names of an output's open sizes that differ from the inputs'.

    Returns:
        The origin of each initialiser; the first part of a module's weight names is the source.

    Raises:
        PnpError: if PyTorch cannot trace the module or has no ONNX operator for a part of it.
    """
    try:
        # repeated garbage collection of a trace's many objects takes an eighth of an export's time
        with _quiet(), collector_paused(), torch.no_grad():
            model, hidden = trace(module, inputs, [outputs] if isinstance(outputs, str) else list(outputs), open_axes)
    except torch.onnx.OnnxExporterError as e:
        cause = e.__cause__ or e
        raise PnpError(
            f"PyTorch {torch.__version__} cannot export the {path.stem} to ONNX "
            f"({type(cause).__name__}: {printable(str(cause), limit=200)}); nothing was written; report it"
        ) from e
    weights = restore(model.graph, module, hidden)
    for axis in open_axes:
        _name_open(model, axis, output_names)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_with_weights(model, path, list(weights.weights))
    return weights


def trace(
    module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], open_axes: Sequence[OpenAxis] = ()
) -> tuple[Any, list[str]]:
    """Trace ``module``; return its optimised ``onnx_ir.Model`` and the names of the weights that are its inputs."""
    # 63, since diffusers' upsampling takes another code path from batch 64, and the tracer would start again
    batch = torch.export.Dim("batch", min=1, max=63)
    # multiples of a step, so that the tracer can prove that the sizes the U-Net halves are even
    units = {a: torch.export.Dim(f"{a.name}_steps" if a.step > 1 else a.name, min=a.low, max=a.high) for a in open_axes}
    sized = {(a.rank, a.axis): a.step * unit if a.step > 1 else unit for a, unit in units.items()}
    shapes = {
        name: {0: batch} | {axis: size for (rank, axis), size in sized.items() if rank == x.ndim}
        for name, x in inputs.items()
    }
    with _upsampling_of_any_size():
        program = torch.onnx.export(
            module.eval(), kwargs=inputs, dynamo=True, opset_version=OPSET, dynamic_shapes=shapes,
            input_names=list(inputs), output_names=outputs, verbose=False, optimize=False,
        )  # fmt: skip
    assert program is not None
    hidden = hide(program.model.graph, {name for name, _ in module.named_parameters()})
    _optimize(program.model)
    _strip_source_locations(program.model)
    return program.model, hidden


def _optimize(model: Any) -> None:
    """Do what ``program.optimize()`` does, except merging equal initialisers."""
    import onnx_ir as ir
    import onnxscript.optimizer
    import onnxscript.rewriter
    from onnx_ir.passes import common
    from onnxscript.rewriter import onnx_fusions

    onnxscript.optimizer.inline(model)
    for _ in range(2):  # folding and rewriting enable each other
        onnxscript.optimizer.fold_constants_ir(model, onnx_shape_inference=True)
        onnxscript.rewriter.rewrite(model)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
    onnx_fusions.fuse(model)


def _name_open(model: Any, axis: OpenAxis, output_names: str) -> None:
    """Replace the tracer's product (steps times units) for an open dimension by its plain name, in outputs too.

    A runtime with a ``free dimension override`` for ``height`` can then derive every size that depends on it.
    """
    import onnx_ir as ir

    def named(size: Any) -> Any:
        return axis.name if isinstance(size, ir.SymbolicDim) and str(size.value) in written else size

    inputs = [v for v in model.graph.inputs if len(v.shape) == axis.rank]
    written = {str(v.shape[axis.axis].value) for v in inputs}
    for value in (*model.graph.inputs, *(o for node in model.graph.all_nodes() for o in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([named(d) for d in value.shape])
    for value in model.graph.outputs:
        d = value.shape[axis.axis] if len(value.shape) == axis.rank else axis.name
        if isinstance(d, ir.SymbolicDim) and d.value != axis.name:
            other = output_names.format(axis.name)
            value.shape = ir.Shape([other if i == axis.axis else d for i, d in enumerate(value.shape)])


def _strip_source_locations(model: Any) -> None:
    # the exporter records stack traces of the machine, which make equal graphs differ
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()


@contextlib.contextmanager
def _upsampling_of_any_size() -> Iterator[None]:
    """Remove the element limit above which diffusers' upsampling copies its input.

    It compares the number of elements with ``pow(2, 31)``.  The tracer turns that into a limit of the batch size, and
    fails where the limit is not a whole number (28.4 for a decoder of 768 x 768 images).  The copy serves a PyTorch
    kernel that the graph does not contain.
    """
    from diffusers.models import upsampling

    upsampling.pow = lambda *_: math.inf  # shadows the builtin
    try:
        yield
    finally:
        del upsampling.pow


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's progress lines and deprecation notices, which are irrelevant to users."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
