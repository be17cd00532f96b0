"""Write LoRA files in the formats of common trainers, and compute the expected weight changes in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

Shapes = Mapping[str, tuple[int, ...]]
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

#: layers of the micro teacher's U-Net → their names in original checkpoints, a handwritten table
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.resnets.0.time_emb_proj": "input_blocks.1.0.emb_layers.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.3.0.skip_connection",
    "down_blocks.1.attentions.0.proj_in": "input_blocks.3.1.proj_in",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.3.1.transformer_blocks.0.attn1.to_q",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": "middle_block.1.transformer_blocks.0.attn2.to_k",
    "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0":
        "output_blocks.1.1.transformer_blocks.0.attn2.to_out.0",
    "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj":
        "output_blocks.0.1.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "conv_out": "out.2",
}  # fmt: skip
TEXT = (
    "encoder.layers.0.self_attn.q_proj",
    "encoder.layers.0.self_attn.out_proj",
    "encoder.layers.0.mlp.fc1",
)
#: formats that name every layer
FORMATS = (
    "kohya", "kohya-te1", "kohya-original", "diffusers", "diffusers-0.21", "comfyui", "peft", "peft-adapter-name",
    "unet-and-peft", "no-prefix",
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Low-rank factors of one layer; no alpha is written if ``alpha`` is None."""

    layer: str
    rank: int
    alpha: float | None


def network_of(layer: str) -> str:
    """Return the network of a layer in the tables above."""
    return "text_encoder" if layer in TEXT else "unet"


def stem(layer: str, form: str) -> str:
    """Return the key prefix of a layer in a format."""
    if layer in TEXT:
        return {
            "kohya": f"lora_te_text_model_{layer}".replace(".", "_"),
            "kohya-te1": f"lora_te1_text_model_{layer}".replace(".", "_"),
            "kohya-original": f"lora_te_text_model_{layer}".replace(".", "_"),
            "comfyui": f"text_encoders.clip_l.transformer.text_model.{layer}",
            "peft": f"base_model.model.text_model.{layer}",
            "unet-and-peft": f"text_encoder.base_model.model.text_model.{layer}",
            "peft-adapter-name": f"base_model.model.text_model.{layer}",
            "no-prefix": f"text_model.{layer}",
        }.get(form, f"text_encoder.text_model.{layer}")
    return {
        "kohya": f"lora_unet_{layer}".replace(".", "_"),
        "kohya-te1": f"lora_unet_{layer}".replace(".", "_"),
        "kohya-original": f"lora_unet_{UNET[layer]}".replace(".", "_"),
        "comfyui": f"diffusion_model.{UNET[layer]}",
        "peft": f"base_model.model.{layer}",
        "unet-and-peft": f"unet.base_model.model.{layer}",
        "peft-adapter-name": f"base_model.model.{layer}",
        "no-prefix": layer,
    }.get(form, f"unet.{layer}")


def ends(layer: str, form: str) -> tuple[str, str]:
    """Return the key suffixes of A and B in a format."""
    if form == "diffusers-0.21":
        middle = "lora_linear_layer" if layer in TEXT else "lora"
        return f"{middle}.down.weight", f"{middle}.up.weight"
    if form == "peft-adapter-name":
        return "lora_A.default.weight", "lora_B.default.weight"
    if form in ("diffusers", "peft", "unet-and-peft", "no-prefix"):
        return "lora_A.weight", "lora_B.weight"
    return "lora_down.weight", "lora_up.weight"


def write(
    path: Path, form: str, pairs: list[Pair], shapes: Shapes, *, dtype: str = "float32", seed: int = 0,
    as_matrices: bool = False, metadata: dict[str, object] | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Write a file of one of ``FORMATS``.

    Args:
        shapes: shapes of the layers' weights.
        dtype: type of the factors.
        as_matrices: flatten the factors of convolutions to matrices.
        metadata: peft's configuration.

    Returns:
        The change alpha/rank · B·A of each layer, in the weight's shape, computed from the stored factors.
    """
    rng = np.random.default_rng(seed)
    tensors, out = {}, {}
    for pair in pairs:
        outputs, *inputs = shapes[pair.layer]
        kernel = [1] * len(inputs[1:])
        down, up = (
            torch.from_numpy(rng.normal(0, 0.2, shape)).to(TYPES[dtype])
            for shape in ((pair.rank, *inputs), (outputs, pair.rank, *kernel))
        )
        product = np.einsum("or,ri->oi", numbers(up).reshape(outputs, -1), numbers(down).reshape(pair.rank, -1))
        alpha = pair.rank if pair.alpha is None else float(np.float32(pair.alpha))
        out[pair.layer] = alpha / pair.rank * product.reshape(shapes[pair.layer])
        if as_matrices:
            down, up = down.flatten(1), up.flatten(1)
        name, (a, b) = stem(pair.layer, form), ends(pair.layer, form)
        tensors |= {f"{name}.{a}": down.contiguous(), f"{name}.{b}": up.contiguous()}
        if pair.alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(pair.alpha)
    save_file(tensors, path, None if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)})
    return out


def numbers(tensor: torch.Tensor) -> np.ndarray:
    """Convert a tensor of any floating type to float64."""
    return tensor.to(torch.float64).numpy()
