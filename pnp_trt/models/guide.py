"""Guides: small networks that add guidance to a frozen U-Net's skips and mid block.

The idea is *Plug-and-Play Diffusion Distillation* (Hsiao et al., CVPR 2024, §3): a guide reads the
noisy latent, the timestep, the text and the guidance scale w, and emits residuals for the U-Net's
decoder skips and mid block, so that one pass predicts what classifier-free guidance needs two for.
The paper does not publish its tiny guide; the one here is our own design.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..errors import InputError


@dataclass
class Features:
    """What the frozen U-Net's encoder and mid block computed for this step.

    Attributes:
        down_block_res_samples: the skips, shallow to deep, each ``[B, C_i, H_i, W_i]``.
        mid_block_res_sample: the mid block's output, ``[B, C_mid, H_mid, W_mid]``.
    """

    down_block_res_samples: tuple[Tensor, ...]
    mid_block_res_sample: Tensor


@dataclass
class GuideOutput:
    """Residuals in the form of diffusers' ControlNet.

    Attributes:
        down_block_res_samples: one per skip, same shapes as the skips.
        mid_block_res_sample: same shape as the mid block's output.
    """

    down_block_res_samples: tuple[Tensor, ...]
    mid_block_res_sample: Tensor


def sinusoid(values: Tensor, width: int, max_period: float) -> Tensor:
    """Sine and cosine features ``[B, width]`` of ``values [B]``, periods from 2π to 2π·``max_period``."""
    half = width // 2
    rates = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values.float()[:, None] * rates[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class SkipAdapter(nn.Module):
    """A low-rank, spatially aware residual for one feature map; starts at zero.

    ``C → rank`` (1×1), plus the shared context, modulated by (t, w), a depthwise 3×3, ``rank → C`` (1×1, no
    bias, zero-initialised).  The gate multiplies before the last projection: it has fewer channels there.
    """

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, rank, 1)
        self.mix = nn.Conv2d(rank, rank, 3, padding=1, groups=rank)
        self.expand = nn.Conv2d(rank, channels, 1, bias=False)
        nn.init.zeros_(self.expand.weight)

    def forward(self, x: Tensor, context: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> Tensor:
        h = F.silu((self.reduce(x) + context) * scale + shift)
        return self.expand(F.silu(self.mix(h)) * gate)


class TrunkBlock(nn.Module):
    """A residual pair of 3×3 convolutions at the mid block's resolution, modulated by (t, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x * scale + shift))))


class TinyGuide(ModelMixin, ConfigMixin):
    """The tiny guide: one low-rank adapter per skip, which sees the teacher's own encoder features.

    It looks at the frozen encoder's skips and mid-block output rather than at the raw latent.  They already
    hold what the teacher made of the latent and the text, and a fine-tuned teacher's features carry its
    domain with them.  A trunk of a few convolutions reads the deepest features, the ones that have seen all of
    the text, at their low resolution, where arithmetic is cheap; all adapters share what it makes of them.  The
    residuals are multiplied by (w − 1) and therefore vanish exactly at w = 1, where guidance is the plain
    conditional prediction.

    Args:
        skip_channels: channels of each skip, shallow to deep.
        mid_channels: channels of the mid block's output.
        cross_attention_dim: width of the text states (recorded to check the fit; the text reaches the guide
            through the mid block).
        rank: inner channels of trunk and adapters.
        embed_dim: width of the (t, w) embedding.
        trunk_blocks: residual blocks of the trunk.
    """

    @register_to_config
    def __init__(
        self,
        skip_channels: tuple[int, ...],
        mid_channels: int,
        cross_attention_dim: int,
        rank: int = 48,
        embed_dim: int = 64,
        trunk_blocks: int = 3,
    ) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(2 * embed_dim, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))
        self.pool = nn.Linear(mid_channels, embed_dim)
        self.context = nn.Conv2d(skip_channels[-1] + mid_channels, rank, 1)
        self.trunk = nn.ModuleList(TrunkBlock(rank) for _ in range(trunk_blocks))
        self.adapters = nn.ModuleList(SkipAdapter(c, rank) for c in (*skip_channels, mid_channels))
        self.film = nn.Linear(embed_dim, 2 * rank * (len(self.trunk) + len(self.adapters)))
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, *, rank: int = 48, embed_dim: int = 64) -> TinyGuide:
        """A new guide that fits ``unet``; its residuals are zero until it is trained."""
        skips, mid = skip_channels(unet)
        return cls(skips, mid, unet.config.cross_attention_dim, rank=rank, embed_dim=embed_dim)

    def forward(self, timestep: Tensor, guidance: Tensor, features: Features) -> GuideOutput:
        """Residuals for one step.

        Args:
            timestep: ``[B]``, 0 … 999.
            guidance: ``[B]``, the scale w ≥ 1, one per sample.
            features: the frozen encoder's.
        """
        mid = features.mid_block_res_sample
        dtype = mid.dtype
        width = self.config.embed_dim
        conditions = [sinusoid(timestep, width, 10_000.0), sinusoid(guidance.float() * 4, width, 100.0)]
        emb = self.embed(torch.cat(conditions, -1).to(dtype)) + self.pool(mid.mean((2, 3)))
        film = self.film(F.silu(emb))[:, :, None, None].chunk(2 * (len(self.trunk) + len(self.adapters)), dim=1)
        # scaled so that the usual w = 2 … 9 gives gates near one
        gate = ((guidance.float() - 1.0) * 0.25).to(dtype)[:, None, None, None]
        context = self.context(torch.cat([features.down_block_res_samples[-1], mid], 1))
        for i, block in enumerate(self.trunk):
            context = block(context, 1 + film[2 * i], film[2 * i + 1])
        film = film[2 * len(self.trunk) :]
        residuals = []
        shared = {tuple(mid.shape[-2:]): context}
        for i, x in enumerate((*features.down_block_res_samples, mid)):
            size = tuple(x.shape[-2:])
            if size not in shared:
                shared[size] = F.interpolate(context, size=x.shape[-2:], mode="nearest")
            residuals.append(self.adapters[i](x, shared[size], 1 + film[2 * i], film[2 * i + 1], gate))
        return GuideOutput(tuple(residuals[:-1]), residuals[-1])


GUIDES: dict[str, type[TinyGuide]] = {"tiny": TinyGuide}


def skip_channels(unet: UNet2DConditionModel) -> tuple[tuple[int, ...], int]:
    """Channels of a U-Net's decoder skips, shallow to deep, and of its mid block."""
    widths = list(unet.config.block_out_channels)
    skips = [widths[0]]
    for i, block in enumerate(unet.down_blocks):
        skips += [widths[i]] * (len(block.resnets) + (len(block.downsamplers) if block.downsamplers else 0))
    return tuple(skips), widths[-1]


def check_fit(guide: TinyGuide, unet: UNet2DConditionModel) -> None:
    """Raise ``InputError`` that says which shape differs when ``guide`` was made for another U-Net."""
    skips, mid = skip_channels(unet)
    wanted = {"skip_channels": list(skips), "mid_channels": mid, "cross_attention_dim": unet.config.cross_attention_dim}
    for name, value in wanted.items():
        own = guide.config[name]
        own = list(own) if isinstance(own, tuple | list) else own
        if own != value:
            raise InputError(
                f"the guide does not fit this U-Net: {name} is {own} in the guide and {value} in the U-Net; "
                "use a guide that was distilled for this base"
            )
