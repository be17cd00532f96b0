"""Golden inputs, and how far a graph's output is from PyTorch's on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle.golden_file import Outputs, difference

if TYPE_CHECKING:
    from ..models.teacher import BaseModel

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


def golden_inputs(
    base: BaseModel,
    sample: tuple[int, int, int],
    size: tuple[int, int],
    tokens: int,
    *,
    guided: bool,
    negative: bool = False,
    image_to_image: bool = False,
) -> dict[str, dict[str, Any]]:
    """Seeded torch inputs per network, batch 2, with different timesteps and scales in the batch.

    Args:
        base: whose networks they are for.
        sample: shape of a latent, ``(C, H, W)``.
        size: height and width of the image in pixels.
        tokens: of a prompt.
        guided: whether a guide is fused, which reads w.
        negative: whether the guide reads negative prompts.
        image_to_image: whether there is a VAE encoder.
    """
    import torch

    g = torch.Generator().manual_seed(20240)
    width = base.sizes().text_width
    first, *others = base.text_specs
    unet = {
        "sample": torch.randn(2, *sample, generator=g),
        "timestep": torch.tensor([801, 41]),
        "encoder_hidden_states": torch.randn(2, tokens, width, generator=g),
    }
    if guided:
        unet["guidance"] = torch.tensor([2.0, 7.5])
    found = {
        "unet": unet,
        first.name: {"input_ids": torch.randint(0, base.sizes().vocabulary, (2, tokens), generator=g)},
        "vae_decoder": {"latents": torch.randn(2, *sample, generator=g)},
    }
    if guided:
        found["condition"] = {"guidance": unet["guidance"]}
    if negative:
        unet["negative"] = torch.randn(2, tokens, width, generator=g)
    if image_to_image:
        found["vae_encoder"] = {"pixels": torch.rand(2, 3, *size, generator=g) * 2 - 1}
    for spec in others:
        config = base.config(spec.name)
        ids = torch.randint(0, int(config["vocab_size"]), (2, tokens), generator=g)
        ids[:, tokens // 2] = _end_of_text(config)  # where the projected text is read
        found[spec.name] = {"input_ids": ids}
    unet |= base.golden_added(g, 2, size)
    return found


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


def _end_of_text(config: Mapping[str, Any]) -> int:
    """The token at which a text encoder reads a whole prompt: the largest one where the config says 2."""
    end = int(config.get("eos_token_id", 2))
    return int(config["vocab_size"]) - 1 if end == 2 else end  # transformers takes 2 for the largest token


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
