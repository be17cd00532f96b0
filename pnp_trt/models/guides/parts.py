"""What all guides share: what they read, what they emit, how they see numbers, and what they have to fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...io.inputs import shortened


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
class GuideInput:
    """All that a guide may look at in one step; each guide takes what it reads.

    Attributes:
        sample: noisy latents ``[B, C, H, W]``.
        timestep: ``[B]``, 0 … 999.
        encoder_hidden_states: text states of the prompt, ``[B, tokens, D]``.
        guidance: the scale w ≥ 1, ``[B]``, one per sample.
        features: the frozen encoder's, for this sample, timestep and prompt.
        negative: text states of the negative (or empty) prompt, ``[B, tokens, D]``; only guides made with
            ``negative_prompts=True`` read it.
        condition: what the guide's ``condition()`` made of w, when it was computed once for all steps.
        added_cond_kwargs: SDXL's ``text_embeds`` and ``time_ids``.
    """

    sample: Tensor
    timestep: Tensor
    encoder_hidden_states: Tensor
    guidance: Tensor
    features: Features
    negative: Tensor | None = None
    condition: Tensor | None = None
    added_cond_kwargs: dict[str, Tensor] | None = None

    def needs_negative(self) -> Tensor:
        """The negative prompt's states, or ``InputError`` when they were not given."""
        if self.negative is None:
            raise InputError(
                "this guide was distilled with negative prompts and got none; pass the text states of the negative "
                "prompt, or of the empty prompt where there is none"
            )
        return self.negative


@dataclass
class GuideOutput:
    """Residuals in the form of diffusers' ControlNet.

    Attributes:
        down_block_res_samples: one per skip, same shapes as the skips; None where the guide adds nothing.
        mid_block_res_sample: same shape as the mid block's output.
    """

    down_block_res_samples: tuple[Tensor | None, ...]
    mid_block_res_sample: Tensor


def sinusoid(values: Tensor, width: int, max_period: float) -> Tensor:
    """Sine and cosine features ``[B, width]`` of ``values [B]``, periods from 2π to 2π·``max_period``."""
    half = width // 2
    rates = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values.float()[:, None] * rates[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


#: last timestep of training of all supported models
LAST_TIMESTEP = 999
#: most values of a gain's table
MAX_GAINS = 100


class GainTable(nn.Module):
    """A factor g(t) for a guide's residuals: ``values`` at equally spaced timesteps, linear in between.

    The first value is that of t = 0 and the last that of t = 999; a single one is a constant factor.  The table is a
    constant of exported graphs, and no weight.

    Args:
        values: 1 to 100 finite numbers above 0.

    Raises:
        InputError: if they are none.
    """

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__()
        known = isinstance(values, list | tuple) and 0 < len(values) <= MAX_GAINS
        if not known or not all(isinstance(v, int | float) and math.isfinite(v) and v > 0 for v in values):
            raise InputError(f"a guide's gain is 1 to {MAX_GAINS} numbers above 0, got {shortened(repr(values))}")
        # on the CPU even where modules are made without memory for their weights, as no file holds these values
        table = torch.tensor(values, dtype=torch.float32, device="cpu")
        self.register_buffer("first", table[:1], persistent=False)
        self.register_buffer("rises", table.diff(), persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        """g of ``timestep [B]``: ``[B]`` float32; constant outside 0 … 999."""
        first, rises = cast(Tensor, self.first).float(), cast(Tensor, self.rises).float()
        count = rises.shape[0]
        if count == 0:
            return first.expand(timestep.shape)
        place = timestep.float()[:, None] * (count / LAST_TIMESTEP) - torch.arange(count, device=timestep.device)
        return first + (place.clamp(0.0, 1.0) * rises).sum(1)


def strength(guidance: Tensor, dtype: torch.dtype, gain: Tensor | None = None) -> Tensor:
    """What every residual is multiplied by, ``[B, 1, 1, 1]``: (w − 1) / 4, times ``gain [B]`` where there is one.

    It is zero exactly at w = 1, where guidance is the plain conditional prediction, and near one for the usual
    w = 2 … 9.
    """
    factor = (guidance.float() - 1.0) * 0.25
    if gain is not None:
        factor = factor * gain
    return factor.to(dtype)[:, None, None, None]


def skip_channels(unet: Any) -> tuple[tuple[int, ...], int]:
    """Channels of a U-Net's decoder skips, shallow to deep, and of its mid block."""
    widths = list(unet.config.block_out_channels)
    skips = [widths[0]]
    for i, block in enumerate(unet.down_blocks):
        skips += [widths[i]] * (len(block.resnets) + (len(block.downsamplers) if block.downsamplers else 0))
    return tuple(skips), widths[-1]


def signature(unet: Any) -> dict[str, Any]:
    """The shapes that tie a guide to U-Nets of one architecture; every guide records them in its config."""
    skips, mid = skip_channels(unet)
    return {
        "skip_channels": skips,
        "mid_channels": mid,
        "cross_attention_dim": unet.config.cross_attention_dim,
        "in_channels": unet.config.in_channels,
    }


def check_fit(guide: Any, unet: Any) -> None:
    """Raise ``InputError`` that says which shape differs when ``guide`` was made for another U-Net."""
    for name, value in signature(unet).items():
        own = guide.config[name]
        if _plain(own) != _plain(value):
            raise InputError(
                f"the guide does not fit this U-Net: {name} is {_plain(own)} in the guide and {_plain(value)} in the "
                "U-Net; use a guide that was distilled for this base"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
