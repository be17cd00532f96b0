"""The relative error of a graph's output against PyTorch's on golden inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.golden_file import Outputs, difference

#: above this many weights one golden row is compared instead of two: attention on the CPU needs memory by the row
LARGE = 200_000_000
#: above this many image pixels likewise, for an autoencoder: a row of 512 x 512 takes a CPU a quarter of a minute
LARGE_IMAGE = 256 * 256


def golden_rows(network: str, weights: int, size: tuple[int, int]) -> int:
    """How many golden rows of a network are compared with PyTorch.

    Args:
        weights: of the network.
        size: height and width of the image in pixels.
    """
    large_image = network.startswith("vae_") and size[0] * size[1] > LARGE_IMAGE
    return 1 if weights > LARGE or large_image else 2


def sharpener_inputs(unet: Mapping[str, Any]) -> dict[str, Any]:
    """Seeded torch inputs of a guide's sharpener, batch 2, beside the golden ones of its U-Net."""
    import torch

    g = torch.Generator().manual_seed(20241)
    text = unet["encoder_hidden_states"]
    others = {name: torch.randn(text.shape, generator=g) for name in ("negative", "empty")}
    return {"encoder_hidden_states": text, **others, "guidance": unet["guidance"]}


#: side in latents of the images that are encoded; larger latents are tiled with them
_TILE = 16


def latents_of_images(vae: Any, like: Any, factor: int) -> Any:
    """What an autoencoder's own encoder makes of images, in the shape of the latents ``like [B, C, H, W]``.

    Noise of unit variance has no large areas of one colour, in which a decoder's activations are largest.  The images
    are a gradient between saturated colours and a black and white chequerboard, in turn; a single row has both side by
    side.

    Args:
        factor: image pixels to a latent's.
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
    """Inputs of a decoder that are latents of images, with PyTorch's output; for half precision, which may overflow.

    Args:
        decoder: the module that is exported.
        inputs: its golden ones, for the shapes.
        factor: image pixels to a latent's.
    """
    from ..precision.recipes import as_arrays, reference

    made = {**inputs, "latents": latents_of_images(decoder.vae, inputs["latents"], factor)}
    return made, as_arrays(reference(decoder, made))


def with_latents_of_images(decoder: Any, inputs: Mapping[str, Any], factor: int) -> dict[str, Any]:
    """A decoder's inputs whose right half is latents of images, so that one run checks them and noise.

    Args:
        decoder: the module that is exported.
        inputs: its golden ones, of noise.
        factor: image pixels to a latent's.
    """
    import torch

    noise = inputs["latents"]
    half = noise.shape[-1] // 2
    images = latents_of_images(decoder.vae, noise[..., half:], factor)
    return {**inputs, "latents": torch.cat([noise[..., :half], images], dim=-1)}


def relative_error(path: Path, inputs: dict[str, Any], reference: Outputs) -> float:
    """‖out − reference‖ / ‖reference‖ of ONNX Runtime (CPU) on ``path``; NaN when either is not finite.

    The largest of them where the network has several outputs.

    A graph in half precision is run with every result rounded to its type.  Left alone, ONNX Runtime's CPU provider
    computes it in float32 from end to end and shows none of the error; it has no bfloat16 kernels at all.
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
    """A graph's outputs, its nodes run one by one as they are."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # the exception says it, without colours on standard error
    # no folding: it would widen all weights at once and keep them
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return tuple(session.run(None, inputs))


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
