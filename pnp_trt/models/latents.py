"""Conversion between the U-Net's and the autoencoder's latents, by the latter's factor, shift, mean and deviation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_vae(latents: Tensor, vae: Any) -> Tensor:
    """Convert the U-Net's latents ``[B, C, H, W]`` to those of ``vae.decode``."""
    factor, shift, deviation = _scaling(vae.config, latents)
    return latents * deviation / factor + shift if deviation is not None else latents / factor + shift


def from_vae(latents: Tensor, vae: Any) -> Tensor:
    """Convert the latents ``[B, C, H, W]`` of ``vae.encode`` to the U-Net's."""
    factor, shift, deviation = _scaling(vae.config, latents)
    return (latents - shift) * factor / deviation if deviation is not None else (latents - shift) * factor


def _scaling(config: Any, like: Tensor) -> tuple[float, float | Tensor, Tensor | None]:
    """Factor, shift and deviation; the last two per channel if the config has ``latents_mean`` and ``latents_std``,
    as in diffusers' StableDiffusionXLPipeline.
    """
    mean, deviation = (getattr(config, key, None) for key in ("latents_mean", "latents_std"))
    if mean is None or deviation is None:
        return config.scaling_factor, getattr(config, "shift_factor", None) or 0.0, None
    by_channel = [torch.tensor(x, dtype=like.dtype, device=like.device).view(1, -1, 1, 1) for x in (mean, deviation)]
    return config.scaling_factor, *by_channel
