"""A guide that computes one bias per channel of the mid block's output from the prompt and w."""

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from pnp_trt.models.guides.base import Guide
from pnp_trt.models.guides.parts import GuideInput, GuideOutput, signature, strength


class ChannelGuide(Guide):
    """A linear map of the prompt's mean text state, initialised to zero."""

    @register_to_config
    def __init__(
        self,
        skip_channels: tuple[int, ...],
        mid_channels: int,
        cross_attention_dim: int,
        in_channels: int = 4,
        sampling_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.bias = nn.Linear(cross_attention_dim, mid_channels)
        nn.init.zeros_(self.bias.weight)
        nn.init.zeros_(self.bias.bias)

    @classmethod
    def from_unet(cls, unet: Any, **options: Any) -> "ChannelGuide":
        return cls(**signature(unet), **options)

    def forward(self, inputs: GuideInput) -> GuideOutput:
        mid = inputs.features.mid_block_res_sample
        bias = self.bias(inputs.encoder_hidden_states.mean(1))[:, :, None, None]
        residual = strength(inputs.guidance, mid.dtype) * bias * torch.ones_like(mid)
        return GuideOutput((None,) * len(inputs.features.down_block_res_samples), residual)
