"""The student: the frozen teacher U-Net and the guide in one forward pass.

``UNet2DConditionModel.forward`` is split between encoder and decoder, because the guide reads the encoder's features
and adds to the decoder's skips.  Everything else is the U-Net's own code.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from .guides import Features, Guide, GuideInput, check_fit
from .guides.condition import without_constant_parts


def encode(
    unet: UNet2DConditionModel,
    sample: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Features]:
    """Compute the time embedding ``[B, E]`` and the features of encoder and mid block.

    Args:
        sample: noisy latents ``[B, C, H, W]``.
        timestep: ``[B]``.
        encoder_hidden_states: text states ``[B, tokens, D]``.
        added_cond_kwargs: SDXL's ``text_embeds`` and ``time_ids``.
    """
    emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), None)
    aug = unet.get_aug_embed(emb=emb, encoder_hidden_states=encoder_hidden_states, added_cond_kwargs=added_cond_kwargs)
    emb = emb if aug is None else emb + aug
    x = unet.conv_in(sample)
    skips: tuple[Tensor, ...] = (x,)
    for block in unet.down_blocks:
        if getattr(block, "has_cross_attention", False):
            x, outputs = block(hidden_states=x, temb=emb, encoder_hidden_states=encoder_hidden_states)
        else:
            x, outputs = block(hidden_states=x, temb=emb)
        skips += outputs
    if getattr(unet.mid_block, "has_cross_attention", False):
        x = unet.mid_block(x, emb, encoder_hidden_states=encoder_hidden_states)
    else:
        x = unet.mid_block(x, emb)
    return emb, Features(skips, x)


def decode(unet: UNet2DConditionModel, emb: Tensor, features: Features, encoder_hidden_states: Tensor) -> Tensor:
    """Compute the prediction ``[B, C, H, W]`` from (guided) features."""
    x, skips = features.mid_block_res_sample, features.down_block_res_samples
    # restore sizes that the encoder rounded up exactly, as UNet2DConditionModel.forward does
    odd = any(size % 2**unet.num_upsamplers for size in skips[0].shape[-2:])
    for i, block in enumerate(unet.up_blocks):
        count = len(block.resnets)
        used, skips = skips[-count:], skips[:-count]
        final = i == len(unet.up_blocks) - 1
        arguments: dict[str, Any] = dict(hidden_states=x, temb=emb, res_hidden_states_tuple=used)
        arguments["upsample_size"] = skips[-1].shape[2:] if odd and not final else None
        if getattr(block, "has_cross_attention", False):
            arguments["encoder_hidden_states"] = encoder_hidden_states
        x = block(**arguments)
    if unet.conv_norm_out is not None:
        x = unet.conv_act(unet.conv_norm_out(x))
    return unet.conv_out(x)


class Student(nn.Module):
    """Teacher U-Net with a guide plugged in: one evaluation predicts eps_w (or v_w).

    Args:
        unet: the frozen teacher, or a fine-tune of it.
        guide: a guide distilled for the teacher's base.
        conditioned: whether ``condition`` is always passed; the guide's parts that compute it are then removed.

    Raises:
        InputError: if the guide was trained for a U-Net of another shape.
    """

    def __init__(self, unet: UNet2DConditionModel, guide: Guide, conditioned: bool = False) -> None:
        super().__init__()
        check_fit(guide, unet)
        self.unet = unet
        self.guide = without_constant_parts(guide) if conditioned else guide
        self.conditioned = conditioned

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        guidance: Tensor,
        negative: Tensor | None = None,
        condition: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        empty: Tensor | None = None,
    ) -> Tensor:
        """The guided prediction, ``[B, C, H, W]``; arguments as in :class:`~pnp_trt.models.guides.GuideInput`.

        ``text_embeds`` and ``time_ids`` are the members of ``added_cond_kwargs`` as separate inputs, which graphs need.
        If ``negative`` is not the empty prompt, a guide with a sharpener also needs ``empty [B, tokens, D]``, the
        states of the empty prompt; without either, the text states are used unchanged.
        """
        if self.guide.sharpener is not None and negative is not None and empty is not None:
            encoder_hidden_states = self.guide.sharpener(encoder_hidden_states, negative, empty, guidance)
        added_cond_kwargs = _added(added_cond_kwargs, text_embeds, time_ids)
        emb, features = encode(self.unet, sample, timestep, encoder_hidden_states, added_cond_kwargs)
        guide_input = GuideInput(
            sample, timestep, encoder_hidden_states, guidance, features, negative, condition, added_cond_kwargs
        )
        residuals = self.guide(guide_input)
        skips = tuple(
            s if r is None else s + r
            for s, r in zip(features.down_block_res_samples, residuals.down_block_res_samples, strict=True)
        )
        guided = Features(skips, features.mid_block_res_sample + residuals.mid_block_res_sample)
        return decode(self.unet, emb, guided, encoder_hidden_states)


class Teacher(nn.Module):
    """The U-Net without a guide, with the student's calling convention, for export and comparison."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """Unguided prediction ``[B, C, H, W]``; ``text_embeds [B, D2]`` and ``time_ids [B, 6]`` are for SDXL."""
        added = _added(None, text_embeds, time_ids)
        emb, features = encode(self.unet, sample, timestep, encoder_hidden_states, added)
        return decode(self.unet, emb, features, encoder_hidden_states)


def _added(
    added_cond_kwargs: dict[str, Tensor] | None, text_embeds: Tensor | None, time_ids: Tensor | None
) -> dict[str, Tensor] | None:
    """SDXL's additional conditions in diffusers' form; None if there are none."""
    if text_embeds is None or time_ids is None:
        return added_cond_kwargs
    # concatenated with sinusoids of the sizes, which are float32 in every precision: ONNX needs tensors of one type
    return {"text_embeds": text_embeds.float(), "time_ids": time_ids}


def cfg(
    unet: UNet2DConditionModel,
    sample: Tensor,
    timestep: Tensor,
    text: Tensor,
    empty: Tensor,
    w: Tensor,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """Classifier-free guidance, eps_w = eps(∅) + w·(eps(c) − eps(∅)) (Ho & Salimans 2022), as one batch of two.

    Args:
        text, empty: text states of the prompt and of the empty (or negative) prompt, ``[B, tokens, D]`` each.
        w: ``[B]``.
        added_cond_kwargs: SDXL's additional conditions for both evaluations, ``[2B, …]``, those of ``empty`` first.
    """
    unconditional, conditional = both_predictions(unet, sample, timestep, text, empty, added_cond_kwargs)
    return unconditional + w[:, None, None, None] * (conditional - unconditional)


def both_predictions(
    unet: UNet2DConditionModel,
    sample: Tensor,
    timestep: Tensor,
    text: Tensor,
    empty: Tensor,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The unconditional and the conditional prediction, ``[B, C, H, W]`` each; arguments as in :func:`cfg`."""
    both = unet(
        torch.cat([sample, sample]), torch.cat([timestep, timestep]), torch.cat([empty, text]),
        added_cond_kwargs=added_cond_kwargs,
    ).sample  # fmt: skip
    unconditional, conditional = both.chunk(2)
    return unconditional, conditional
