"""Original (CompVis) and OpenCLIP names of diffusers' and transformers' weights, as the oracle for the converters."""

from __future__ import annotations

import torch
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTER = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",  # SDXL
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
OPEN_CLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def original_key(key: str, layers: int = 1) -> str:
    """Return the key of a diffusers U-Net in CompVis' latent diffusion; ``layers`` is ``layers_per_block``."""
    for new, old in OUTER.items():
        if key.startswith(f"{new}."):
            return key.replace(new, old, 1)
    words = key.split(".")
    if words[0] == "mid_block":
        place = f"middle_block.{1 if words[1] == 'attentions' else 2 * int(words[2])}"
        kind, rest = words[1], words[3:]
    else:
        block, kind, number, rest = int(words[1]), words[2], int(words[3]), words[4:]
        if words[0] == "down_blocks":
            first = 1 + block * (layers + 1)
            if kind == "downsamplers":
                return ".".join([f"input_blocks.{first + layers}.0.op", *rest[1:]])
            place = f"input_blocks.{first + number}.{1 if kind == 'attentions' else 0}"
        else:
            first = block * (layers + 1)
            if kind == "upsamplers":
                return ".".join([f"output_blocks.{first + layers}.{2 if block == 0 else 1}", *rest])
            place = f"output_blocks.{first + number}.{1 if kind == 'attentions' else 0}"
    rest = [RESNET[rest[0]], *rest[1:]] if kind == "resnets" else rest
    return ".".join([place, *rest])


def open_clip(weights: dict[str, Tensor], layers: int, top: bool = True) -> dict[str, Tensor]:
    """Return a ``CLIPTextModel``'s weights under OpenCLIP's names; ``top`` adds the last layer of SD 2's files."""
    weights = {k.removeprefix("text_model."): v for k, v in weights.items()}
    out = {
        "token_embedding.weight": weights["embeddings.token_embedding.weight"],
        "positional_embedding": weights["embeddings.position_embedding.weight"],
        "ln_final.weight": weights["final_layer_norm.weight"],
        "ln_final.bias": weights["final_layer_norm.bias"],
        "text_projection": weights.get("text_projection.weight", torch.eye(len(weights["final_layer_norm.bias"]))).T,
        "logit_scale": torch.tensor(4.6),
    }
    for i in range(layers):
        old, new = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            out |= {f"{new}{b}.{kind}": weights[f"{old}{a}.{kind}"] for a, b in OPEN_CLIP.items()}
            out[f"{new}attn.in_proj_{kind}"] = torch.cat([weights[f"{old}self_attn.{p}_proj.{kind}"] for p in "qkv"])
    if not top:
        return out
    # the last layer, which Stable Diffusion 2 does not use
    more = {k: v + 1 for k, v in out.items() if k.startswith(f"transformer.resblocks.{layers - 1}.")}
    return out | {k.replace(f"resblocks.{layers - 1}.", f"resblocks.{layers}."): v for k, v in more.items()}


def original_vae(weights: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Return an ``AutoencoderKL``'s weights under the original names, with attention matrices as 1×1 convolutions."""
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    out = {}
    for key, value in weights.items():
        new = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        new = new.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        if "mid_block.attentions.0." in new:
            head, _, rest = new.partition("mid_block.attentions.0.")
            name, _, kind = rest.rpartition(".")
            new = f"{head}mid.attn_1.{attention[name]}.{kind}"
            value = value[:, :, None, None] if value.ndim == 2 else value
        for i in range(levels):
            new = new.replace(f"down_blocks.{i}.resnets", f"down.{i}.block")
            new = new.replace(f"down_blocks.{i}.downsamplers.0", f"down.{i}.downsample")
            new = new.replace(f"up_blocks.{i}.resnets", f"up.{levels - 1 - i}.block")
            new = new.replace(f"up_blocks.{i}.upsamplers.0", f"up.{levels - 1 - i}.upsample")
        out[new] = value
    return out
