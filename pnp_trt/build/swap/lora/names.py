"""The layers of a network, and their names in each LoRA format.

A layer's names are derived from the network itself, so a file's key identifies exactly one layer or none::

    down_blocks.0.attentions.0.proj_in              diffusers, peft
    down_blocks_0_attentions_0_proj_in              kohya
    input_blocks.1.1.proj_in, input_blocks_1_1_…    original checkpoints (CompVis' latent diffusion)
    ….attn1.processor.to_q_lora, ….to_out_lora      diffusers before 0.20
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....models.specs import TextEncoderSpec

if TYPE_CHECKING:
    from torch import nn

#: names inside a residual block: diffusers → original checkpoints
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
#: projections of an attention layer → their names in diffusers before 0.20
_OLD_PROJECTIONS = {
    "to_q": "to_q_lora",
    "to_k": "to_k_lora",
    "to_v": "to_v_lora",
    "to_out.0": "to_out_lora",
    "q_proj": "to_q_lora",
    "k_proj": "to_k_lora",
    "v_proj": "to_v_lora",
    "out_proj": "to_out_lora",
}
_TEXT_MODEL = "text_model."


@dataclass(frozen=True)
class LoraTarget:
    """A layer that a LoRA can change.

    Attributes:
        network: ``unet`` or a text encoder's name.
        name: path of the module in its network.
        shape: shape of its weight.
        bias: shape of its bias; None if it has none.
        embedding: whether it is an embedding table, whose weight is ``[entries, width]``.
    """

    network: str
    name: str
    shape: tuple[int, ...]
    bias: tuple[int, ...] | None
    embedding: bool

    def __str__(self) -> str:
        return f"{self.network}.{self.name}"


class LayerNames:
    """Look up the layers of networks by their names in any LoRA format."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        """Args: ``modules``: modules by network; tensors may be on the meta device."""
        self.networks = tuple(modules)
        self._by_name: dict[str, dict[str, set[LoraTarget]]] = {}
        for network, module in modules.items():
            table: dict[str, set[LoraTarget]] = defaultdict(set)
            layers = list(_layers(network, module))
            original = _original_names([layer.name for layer in layers])
            for layer in layers:
                for name in _names(layer.name, original.get(layer.name)):
                    table[name].add(layer)
            self._by_name[network] = table

    def find(self, name: str, network: str | None) -> LoraTarget | None:
        """Return the layer of that name; None if there is none, or more than one.

        Args:
            network: the network to search; None for all.
        """
        networks = self.networks if network is None else (network,)
        layers = {layer for n in networks for layer in self._by_name.get(n, {}).get(name, ())}
        return next(iter(layers)) if len(layers) == 1 else None


def architecture(
    configs: Mapping[str, Any], text_encoders: Iterable[TextEncoderSpec] = (TextEncoderSpec(),)
) -> LayerNames:
    """Layer names of a bundle's networks, derived from its configs without weights."""
    import torch
    import transformers
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        modules: dict[str, nn.Module] = {"unet": UNet2DConditionModel.from_config(dict(configs["unet"]))}
        for spec in text_encoders:
            if spec.name in configs:
                config = transformers.CLIPTextConfig(**configs[spec.name])
                modules[spec.name] = getattr(transformers, spec.kind)(config)
    return LayerNames(modules)


def _layers(network: str, module: nn.Module) -> Iterator[LoraTarget]:
    from torch import nn

    for name, part in module.named_modules():
        weight = part._parameters.get("weight")
        if weight is not None:
            bias = part._parameters.get("bias")
            shapes = tuple(weight.shape), None if bias is None else tuple(bias.shape)
            yield LoraTarget(network, name, *shapes, isinstance(part, nn.Embedding))


def _names(name: str, original: str | None) -> Iterator[str]:
    """Yield every name of a layer, without prefixes for the network."""
    names = {name} | ({original} if original else set())
    if name.startswith((_TEXT_MODEL, "encoder.layers.", "embeddings.", "final_layer_norm")):
        # only some versions of transformers have this level
        bare = name.removeprefix(_TEXT_MODEL)
        names = {bare, _TEXT_MODEL + bare}
    for variant in names:
        yield variant
        yield variant.replace(".", "_")
        yield from _old_names(variant)


def _old_names(name: str) -> Iterator[str]:
    for projection, old in _OLD_PROJECTIONS.items():
        head, dot, _ = name.rpartition(f".{projection}")
        if dot and name == f"{head}.{projection}" and head.endswith(("attn1", "attn2", "self_attn")):
            yield f"{head}.{old}"
            yield f"{head}.processor.{old}"


def _original_names(names: list[str]) -> dict[str, str]:
    """diffusers' name of a U-Net's layer → its name in original checkpoints; empty for other networks."""
    out = {name: _OUTER[name] for name in names if name in _OUTER}
    for block, original in _original_blocks(names).items():
        for name in names:
            if name == block:  # resampling convolutions have no inner level
                out[name] = original
            elif name.startswith(f"{block}."):
                inner = name.removeprefix(f"{block}.")
                out[name] = f"{original}.{_RESNET.get(inner, inner)}"
    return out


def _original_blocks(names: list[str]) -> dict[str, str]:
    """Original name of each part of each block by diffusers' name: ``down_blocks.0.resnets.1`` → ``input_blocks.2.0``.

    Original checkpoints number residual blocks and downsamplers in one sequence, from 1 on the way down (0 is
    ``conv_in``) and from 0 on the way up, where an upsampler belongs to its level's last residual block.
    """
    out = {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    out["mid_block.resnets.1"] = "middle_block.2"
    parts = sorted({tuple(m.groups()) for n in names if (m := _BLOCK.match(n))}, key=lambda p: (p[0], int(p[1])))
    for side, original, position in (("down_blocks", "input_blocks", 1), ("up_blocks", "output_blocks", 0)):
        for level in sorted({int(p[1]) for p in parts if p[0] == side}):
            block = f"{side}.{level}"
            count = len({p[3] for p in parts if p[:3] == (side, str(level), "resnets")})
            attention = any(p[:3] == (side, str(level), "attentions") for p in parts)
            for i in range(count):
                out[f"{block}.resnets.{i}"] = f"{original}.{position + i}.0"
                out[f"{block}.attentions.{i}"] = f"{original}.{position + i}.1"
            position += count
            if any(p[:3] == (side, str(level), "downsamplers") for p in parts):
                out[f"{block}.downsamplers.0.conv"] = f"{original}.{position}.0.op"
                position += 1
            out[f"{block}.upsamplers.0.conv"] = f"{original}.{position - 1}.{1 + attention}.conv"
    return out


_BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.")
