"""Relative error of a graph's output against PyTorch's on golden inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.golden_file import Outputs, difference

#: number of weights above which one golden row is compared instead of two: attention on the CPU needs memory per row
LARGE = 200_000_000
#: the same limit in image pixels for an autoencoder: a row of 512 x 512 takes a CPU a quarter of a minute
LARGE_IMAGE = 256 * 256


def golden_rows(network: str, weights: int, size: tuple[int, int]) -> int:
    """Number of golden rows of a network to compare with PyTorch.

    Args:
        weights: number of weights of the network.
        size: height and width of the image in pixels.
    """
    large_image = network.startswith("vae_") and size[0] * size[1] > LARGE_IMAGE
    return 1 if weights > LARGE or large_image else 2


def sharpener_inputs(unet: Mapping[str, Any]) -> dict[str, Any]:
    """Seeded torch inputs of a guide's sharpener, batch 2, to go with the golden inputs of its U-Net, ``unet``."""
    import torch

    g = torch.Generator().manual_seed(20241)
    text = unet["encoder_hidden_states"]
    others = {name: torch.randn(text.shape, generator=g) for name in ("negative", "empty")}
    return {"encoder_hidden_states": text, **others, "guidance": unet["guidance"]}


#: side, in latents, of the encoded images; larger latents are tiled with them
_TILE = 16


def latents_of_images(vae: Any, like: Any, factor: int) -> Any:
    """Images encoded with an autoencoder's own encoder, in the shape of the latents ``like [B, C, H, W]``.

    A decoder's activations are largest in large areas of one colour, which noise of unit variance does not have.  The
    rows alternate between a gradient of saturated colours and a black and white chequerboard; a single row has both
    side by side.

    Args:
        factor: image pixels per latent pixel, along each side.
    """
    import torch

    from ..models.wrappers import VaeEncoder
    from ..precision.recipes import reference

    side = _TILE * factor
    ramp = torch.linspace(-1, 1, side)
    gradient = torch.stack([ramp.expand(side, side), ramp.flip(0).expand(side, side).T, -torch.ones(side, side)])
    half = torch.arange(side) // max(1, side // 2) % 2
    board = (2.0 * (half[:, None] ^ half[None]) - 1).expand(3, side, side)
    encoded = torch.cat([reference(VaeEncoder(vae), {"pixels": one[None]}) for one in (gradient, board)])
    height, width = like.shape[-2:]
    if len(like) == 1 and width >= 2 * _TILE:
        encoded = torch.cat([encoded[:1], encoded[1:]], dim=-1)
    across = encoded.shape[-1]
    tiled = encoded.repeat(1, 1, -(-height // _TILE), -(-width // across))[..., :height, :width]
    return tiled[torch.arange(len(like)) % 2]


def realistic_case(decoder: Any, inputs: Mapping[str, Any], factor: int) -> tuple[dict[str, Any], Outputs]:
    """Decoder inputs with latents of images, and PyTorch's output; a test for half precision, which may overflow.

    Args:
        decoder: the exported module.
        inputs: its golden inputs, for the shapes.
        factor: image pixels per latent pixel, along each side.
    """
    from ..precision.recipes import as_arrays, reference

    case = {**inputs, "latents": latents_of_images(decoder.vae, inputs["latents"], factor)}
    return case, as_arrays(reference(decoder, case))


def with_latents_of_images(decoder: Any, inputs: Mapping[str, Any], factor: int) -> dict[str, Any]:
    """Decoder inputs with latents of images in the right half, so that one run checks both these and noise.

    Args:
        decoder: the exported module.
        inputs: its golden inputs, of noise.
        factor: image pixels per latent pixel, along each side.
    """
    import torch

    noise = inputs["latents"]
    half = noise.shape[-1] // 2
    images = latents_of_images(decoder.vae, noise[..., half:], factor)
    return {**inputs, "latents": torch.cat([noise[..., :half], images], dim=-1)}


def relative_error(path: Path, inputs: dict[str, Any], reference: Outputs) -> float:
    """‖out − reference‖ / ‖reference‖ of ONNX Runtime (CPU) on ``path``; NaN when either is not finite.

    For a network with several outputs, the largest of their errors.

    A graph in half precision is run with every result rounded to its type.  Otherwise, ONNX Runtime's CPU provider
    would compute all of it in float32 and hide the error; it has no bfloat16 kernels at all.
    """
    arrays = {k: v.numpy() for k, v in inputs.items()}
    stepwise = rounded_at_every_node(path)
    try:
        if stepwise is None:
            from ..backends.onnxruntime.backend import OrtNetwork

            out = OrtNetwork(path, "cpu", open_tokens=True).outputs(**arrays)
        else:
            out = run_as_written(stepwise, arrays)
    finally:
        if stepwise is not None:
            stepwise.unlink()
    return difference(out, reference)


def run_as_written(path: Path, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Outputs of a graph that is run without graph optimisations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # the exception has the message; the log would repeat it on standard error
    # constant folding would widen all weights at once and keep them in memory
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return tuple(session.run(None, inputs))


def rounded_at_every_node(path: Path) -> Path | None:
    """Write the graph, rewritten by ``round_at_every_node``, beside ``path``; None if it has no half precision."""
    import onnx_ir as ir

    model = ir.load(path)
    if not round_at_every_node(model):
        return None
    target = path.with_name(f"{path.stem}.stepwise.onnx")
    ir.save(model, target)
    return target


def round_at_every_node(model: Any) -> bool:
    """Make a graph compute in float32 and round every half-precision result with casts; values keep their names.

    Return False if it has no half precision.  ONNX Runtime keeps a graph's own casts; it removes only those that it
    inserted itself.

    Args:
        model: an ``onnx_ir.Model``, changed in place.
    """
    import onnx_ir as ir

    half = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    graph = model.graph
    widened: dict[Any, Any] = {}

    def cast(value: Any, to: Any, name: str) -> Any:
        node = ir.Node("", "Cast", [value], attributes=[ir.AttrInt64("to", int(to))])
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, value.shape, ir.TensorType(to)
        return node

    changed = False
    for node in list(graph):
        if node.op_type in ("Cast", "Constant"):
            continue
        inputs = list(node.inputs)
        for i, value in enumerate(inputs):
            if value is not None and value.dtype in half:
                if value not in widened:
                    cast_node = cast(value, ir.DataType.FLOAT, f"{value.name}.wide")
                    graph.insert_before(node, cast_node)
                    widened[value] = cast_node.outputs[0]
                inputs[i] = widened[value]
        rounded = [o for o in node.outputs if o.dtype in half]
        if not rounded and inputs == list(node.inputs):
            continue
        changed = True
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
                cast_node = cast(new, old.dtype, name)
                graph.insert_before(node, cast_node)
                new = cast_node.outputs[0]
            old.name = f"{name}.replaced"
            new.name = name
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    return changed
