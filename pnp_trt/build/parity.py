"""Golden inputs, and how far a graph's output is from PyTorch's on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.golden_file import difference

#: above this many weights one golden row is compared instead of two: attention on the CPU needs memory by the row
LARGE = 200_000_000


def golden_inputs(
    sample: tuple[int, int, int],
    tokens: int,
    width: int,
    vocabulary: int,
    guided: bool,
    negative: bool = False,
    pixels: tuple[int, int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Seeded torch inputs per network, batch 2, with different timesteps and scales in the batch.

    Args:
        pixels: height and width of the images that a VAE encoder takes; None where there is none.
    """
    import torch

    g = torch.Generator().manual_seed(20240)
    unet = {
        "sample": torch.randn(2, *sample, generator=g),
        "timestep": torch.tensor([801, 41]),
        "encoder_hidden_states": torch.randn(2, tokens, width, generator=g),
    }
    if guided:
        unet["guidance"] = torch.tensor([2.0, 7.5])
    found = {
        "unet": unet,
        "text_encoder": {"input_ids": torch.randint(0, vocabulary, (2, tokens), generator=g)},
        "vae_decoder": {"latents": torch.randn(2, *sample, generator=g)},
    }
    if guided:
        found["condition"] = {"guidance": unet["guidance"]}
    if negative:
        unet["negative"] = torch.randn(2, tokens, width, generator=g)
    if pixels is not None:
        found["vae_encoder"] = {"pixels": torch.rand(2, 3, *pixels, generator=g) * 2 - 1}
    return found


def relative_error(path: Path, inputs: dict[str, Any], reference: np.ndarray) -> float:
    """‖out − reference‖ / ‖reference‖ of ONNX Runtime (CPU) on ``path``; NaN when either is not finite.

    A graph in half precision is run with every result rounded to its type.  Left alone, ONNX Runtime's CPU provider
    computes it in float32 from end to end and shows none of the error; it has no bfloat16 kernels at all.
    """
    arrays = {k: v.numpy() for k, v in inputs.items()}
    stepwise = rounded_at_every_node(path)
    try:
        if stepwise is None:
            from ..backends.onnxruntime.backend import OrtNetwork

            out = OrtNetwork(path, "cpu")(**arrays)
        else:
            out = run_as_written(stepwise, arrays)
    finally:
        if stepwise is not None:
            stepwise.unlink()
    return difference(out, reference)


def run_as_written(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # the exception says it, without colours on standard error
    # no folding: it would widen all weights at once and keep them
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    out: np.ndarray = session.run(None, inputs)[0]
    return out


def rounded_at_every_node(path: Path) -> Path | None:
    """A graph beside ``path``, rewritten by ``round_at_every_node``; None where it has no half precision."""
    import onnx_ir as ir

    model = ir.load(path)
    if not round_at_every_node(model):
        return None
    target = path.with_name(f"{path.stem}.stepwise.onnx")
    ir.save(model, target)
    return target


def round_at_every_node(model: Any) -> bool:
    """Let a graph compute in float32 and cast every half-precision result there and back; values keep their names.

    False where it has no half precision.  ONNX Runtime keeps casts that are written in a graph; it drops only
    those that it inserted itself.

    Args:
        model: ``onnx_ir``'s, changed in place.
    """
    import onnx_ir as ir

    half = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    graph = model.graph
    widened: dict[Any, Any] = {}

    def cast(value: Any, to: Any, name: str) -> Any:
        node = ir.Node("", "Cast", [value], attributes=[ir.AttrInt64("to", int(to))])
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, value.shape, ir.TensorType(to)
        return node

    found = False
    for node in list(graph):
        if node.op_type in ("Cast", "Constant"):
            continue
        inputs = list(node.inputs)
        for i, value in enumerate(inputs):
            if value is not None and value.dtype in half:
                if value not in widened:
                    made = cast(value, ir.DataType.FLOAT, f"{value.name}.wide")
                    graph.insert_before(node, made)
                    widened[value] = made.outputs[0]
                inputs[i] = widened[value]
        rounded = [o for o in node.outputs if o.dtype in half]
        if not rounded and inputs == list(node.inputs):
            continue
        found = True
        wide = ir.Node(
            node.domain, node.op_type, inputs, attributes=node.attributes.values(), num_outputs=len(node.outputs)
        )
        for old, new in zip(node.outputs, wide.outputs, strict=True):
            new.name, new.shape = f"{old.name}.exact", old.shape
            new.type = ir.TensorType(ir.DataType.FLOAT) if old in rounded else old.type
        graph.insert_before(node, wide)
        for old, new in zip(node.outputs, wide.outputs, strict=True):
            name = old.name
            if old in rounded:
                made = cast(new, old.dtype, name)
                graph.insert_before(node, made)
                new = made.outputs[0]
            old.name = f"{name}.replaced"
            new.name = name
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    return found
