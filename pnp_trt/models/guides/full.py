"""The full guide: the paper's architecture, a ControlNet (Zhang et al. 2023) initialised from the teacher's encoder."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import ControlNetModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...errors import InputError
from .base import Guide
from .parts import GainTable, GuideInput, GuideOutput, signature, sinusoid

#: channels of Stable Diffusion's ControlNet hint encoder, whose U-Net is 320 wide
HINT_CHANNELS = (16, 32, 96, 256)
W_FEATURES = 64


class FullGuide(Guide):
    """The full guide: a trainable copy of the teacher's encoder and mid block with zero convolutions.

    In the paper, w is the ControlNet's "control image", and the hint encoder that reads it is counted (361.28 M
    parameters on SD 1.5).  We keep that architecture, but its input is three learned features of w's sinusoids
    instead of the raw number, with one w per sample.  The hint depends only on w: :meth:`condition` computes it
    once per image, and a step then costs 109.06 instead of 116.42 GMACs on SD 1.5.

    Residuals are multiplied by (w − 1): they are exactly zero at w = 1, and for all w before training.

    Args:
        skip_channels, mid_channels, cross_attention_dim, in_channels: shapes of the U-Net, to check the fit.
        controlnet: config of the diffusers ``ControlNetModel``.
        negative_prompts: whether it also attends to a negative prompt's text states, marked by a learned vector, so
            that it supports negative prompts.
        sampling_steps: the only number of sampling steps that it was distilled for (stage 2); None for any.
        gain: factors of the residuals at equally spaced timesteps (``parts.GainTable``); None for no factor.
    """

    _supports_gradient_checkpointing = True
    #: parts that ``condition`` uses; in a bundle they are a separate network, which runs once per image
    constant_parts: tuple[str, ...] = ("w_features", "hint")
    #: all: a full guide is a third of the arithmetic; a tiny guide is only a fiftieth and is not quantised
    quantised_layers: ClassVar[tuple[str, ...]] = ("*",)

    @register_to_config
    def __init__(
        self,
        skip_channels: tuple[int, ...],
        mid_channels: int,
        cross_attention_dim: int,
        in_channels: int,
        controlnet: dict[str, Any],
        negative_prompts: bool = False,
        sampling_steps: int | None = None,
        gain: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.net = ControlNetModel.from_config(controlnet)
        # separate, so that it can run once per image
        self.hint = self.net.controlnet_cond_embedding
        self.net.controlnet_cond_embedding = nn.Identity()
        self.w_features = nn.Linear(W_FEATURES, 3)
        self.negative_mark = nn.Parameter(torch.zeros(cross_attention_dim)) if negative_prompts else None
        if gain is not None:
            self.gain_table = GainTable(gain)

    @classmethod
    def from_unet(cls, unet: Any, *, negative_prompts: bool = False) -> FullGuide:  # type: ignore[override]
        """Create a guide for ``unet`` from its encoder's weights; its residuals are zero until it is trained.

        The hint encoder has Stable Diffusion's channels, scaled with the U-Net's width.
        """
        hint = tuple(max(8, c * unet.config.block_out_channels[0] // 320) for c in HINT_CHANNELS)
        copy = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=hint)
        config = {k: v for k, v in copy.config.items() if not k.startswith("_")}
        guide = cls(**signature(unet), controlnet=config, negative_prompts=negative_prompts)
        # ControlNetModel.from_unet copied the teacher's weights; the hint encoder is new in both
        own = copy.state_dict()
        guide.net.load_state_dict({k: v for k, v in own.items() if not k.startswith("controlnet_cond_embedding")})
        return guide.requires_grad_(True)

    @property
    def negative_prompts(self) -> bool:
        """Whether ``GuideInput.negative`` is read."""
        return self.negative_mark is not None

    def checkpoint_gradients(self) -> None:
        """Recompute the ControlNet's activations in the backward pass."""
        self.net.enable_gradient_checkpointing()

    def condition(self, guidance: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """Compute the hint ``[B, C_0, H, W]`` of scales ``guidance [B]`` for latents of size (H, W)."""
        w = self.w_features(sinusoid(guidance.float() * 4, W_FEATURES, 100.0).to(self.w_features.weight.dtype))
        height, width = latent_size
        return self.hint(w[:, :, None, None].expand(-1, -1, 8 * height, 8 * width))

    def forward(self, inputs: GuideInput) -> GuideOutput:
        """Residuals for one step; see :class:`GuideInput`."""
        height, width = inputs.sample.shape[-2:]
        hint = inputs.condition
        if hint is None and self.hint is None:
            raise InputError("this guide computes its condition separately and was given none; pass condition")
        hint = self.condition(inputs.guidance, (height, width)) if hint is None else hint
        text = inputs.encoder_hidden_states
        if self.negative_mark is not None:
            text = torch.cat([text, inputs.needs_negative() + self.negative_mark], dim=1)
        skips, mid = self.net(
            inputs.sample, inputs.timestep, text, controlnet_cond=hint,
            added_cond_kwargs=inputs.added_cond_kwargs, return_dict=False,
        )  # fmt: skip
        gate = self.gate(inputs, mid.dtype)
        return GuideOutput(tuple(s * gate for s in skips), mid * gate)
