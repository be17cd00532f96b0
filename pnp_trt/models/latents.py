"""Latents as the U-Net takes them, and as the autoencoder does: its config's factor, shift, mean and deviation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_vae(latents: Tensor, vae: Any) -> Tensor:
    """The U-Net's latents ``[B, C, H, W]`` as ``vae.decode`` takes them."""
    factor, shift, deviation = _scaling(vae.config, latents)
    return latents * deviation / factor + shift if deviation is not None else latents / factor + shift


def from_vae(latents: Tensor, vae: Any) -> Tensor:
    """What ``vae.encode`` gives, ``[B, C, H, W]``, as the U-Net takes it."""
    factor, shift, deviation = _scaling(vae.config, latents)
    return (latents - shift) * factor / deviation if deviation is not None else (latents - shift) * factor


def _scaling(config: Any, like: Tensor) -> tuple[float, float | Tensor, Tensor | None]:
    """Factor, shift and deviation; the last two by channel where the config has ``latents_mean`` and ``latents_std``,
    as diffusers' StableDiffusionXLPipeline reads them.
    """
    mean, deviation = (getattr(config, key, None) for key in ("latents_mean", "latents_std"))
    if mean is None or deviation is None:
        return config.scaling_factor, getattr(config, "shift_factor", None) or 0.0, None
    by_channel = [torch.tensor(x, dtype=like.dtype, device=like.device).view(1, -1, 1, 1) for x in (mean, deviation)]
    return config.scaling_factor, *by_channel
