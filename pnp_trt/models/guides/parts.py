"""Common parts of guides: inputs, outputs, features of numbers, gain tables, and the shapes of the U-Net."""

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
    """Output of the frozen U-Net's encoder and mid block in one step.

    Attributes:
        down_block_res_samples: the skips, shallow to deep, each ``[B, C_i, H_i, W_i]``.
        mid_block_res_sample: the mid block's output, ``[B, C_mid, H_mid, W_mid]``.
    """

    down_block_res_samples: tuple[Tensor, ...]
    mid_block_res_sample: Tensor


@dataclass
class GuideInput:
    """All inputs that a guide can use in one step.

    Attributes:
        sample: noisy latents ``[B, C, H, W]``.
        timestep: ``[B]``, 0 … 999.
        encoder_hidden_states: text states of the prompt, ``[B, tokens, D]``.
        guidance: the scale w ≥ 1, ``[B]``, one per sample.
        features: the frozen encoder's features for this sample, timestep and prompt.
        negative: text states of the negative (or empty) prompt, ``[B, tokens, D]``; used only by guides created with
            ``negative_prompts=True``.
        condition: result of the guide's ``condition()`` if it was computed once for all steps, else None.
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
        """Return the negative prompt's states; raise ``InputError`` if there are none."""
        if self.negative is None:
            raise InputError(
                "this guide was distilled with negative prompts, but got none; pass the text states of the negative "
                "prompt, or of the empty prompt if there is none"
            )
        return self.negative


@dataclass
class GuideOutput:
    """Residuals in the form of diffusers' ControlNet.

    Attributes:
        down_block_res_samples: one per skip, of the same shape; None for skips without a residual.
        mid_block_res_sample: of the same shape as the mid block's output.
    """

    down_block_res_samples: tuple[Tensor | None, ...]
    mid_block_res_sample: Tensor


def sinusoid(values: Tensor, width: int, max_period: float) -> Tensor:
    """Sine and cosine features ``[B, width]`` of ``values [B]`` with periods from 2π to 2π·``max_period``."""
    half = width // 2
    rates = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values.float()[:, None] * rates[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


#: last training timestep of all supported models
LAST_TIMESTEP = 999
#: maximum number of values of a gain table
MAX_GAINS = 100


class GainTable(nn.Module):
    """A factor g(t) of a guide's residuals: ``values`` at equally spaced timesteps, linearly interpolated.

    The first value is that of t = 0 and the last that of t = 999; a single value is a constant factor.  In exported
    graphs the table is a constant, not a weight.

    Args:
        values: 1 to 100 finite numbers above 0.

    Raises:
        InputError: if they are not.
    """

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__()
        valid_length = isinstance(values, list | tuple) and 0 < len(values) <= MAX_GAINS
        if not valid_length or not all(isinstance(v, int | float) and math.isfinite(v) and v > 0 for v in values):
            raise InputError(f"a guide's gain is 1 to {MAX_GAINS} numbers above 0, got {shortened(repr(values))}")
        # on the CPU even if modules are created on the meta device, because no weights file contains these values
        table = torch.tensor(values, dtype=torch.float32, device="cpu")
        self.register_buffer("first", table[:1], persistent=False)
        self.register_buffer("rises", table.diff(), persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        """g(t) of ``timestep [B]``: ``[B]`` float32; constant outside 0 … 999."""
        first, rises = cast(Tensor, self.first).float(), cast(Tensor, self.rises).float()
        count = rises.shape[0]
        if count == 0:
            return first.expand(timestep.shape)
        position = timestep.float()[:, None] * (count / LAST_TIMESTEP) - torch.arange(count, device=timestep.device)
        return first + (position.clamp(0.0, 1.0) * rises).sum(1)


def strength(guidance: Tensor, dtype: torch.dtype, gain: Tensor | None = None) -> Tensor:
    """Factor of all residuals, ``[B, 1, 1, 1]``: (w − 1) / 4, times ``gain [B]`` if it is passed.

    It is exactly zero at w = 1, where guidance is the conditional prediction itself, and close to one for the usual
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
    """The shapes of a U-Net that a guide for it must have; every guide records them in its config."""
    skips, mid = skip_channels(unet)
    return {
        "skip_channels": skips,
        "mid_channels": mid,
        "cross_attention_dim": unet.config.cross_attention_dim,
        "in_channels": unet.config.in_channels,
    }


def check_fit(guide: Any, unet: Any) -> None:
    """Raise ``InputError`` with the first shape that differs if ``guide`` was created for another kind of U-Net."""
    for name, value in signature(unet).items():
        own = guide.config[name]
        if _plain(own) != _plain(value):
            raise InputError(
                f"the guide does not fit this U-Net: {name} is {_plain(own)} in the guide and {_plain(value)} in the "
                "U-Net; use a guide that was distilled for this base"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
