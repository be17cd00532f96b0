"""Modules for export, which take and return plain tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .latents import from_vae, to_vae


class TextEncoder(nn.Module):
    """``input_ids [B, tokens]`` → last hidden state ``[B, tokens, D]``."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.text_encoder = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.text_encoder(input_ids=input_ids).last_hidden_state


class HiddenStates(nn.Module):
    """``input_ids [B, tokens]`` → states before the last layer ``[B, tokens, D]``, for SDXL's first encoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.text_encoder = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.text_encoder(input_ids=input_ids, output_hidden_states=True).hidden_states[-2]


class ProjectedStates(nn.Module):
    """``input_ids [B, tokens]`` → states before the last layer ``[B, tokens, D]`` and projected text ``[B, D2]``.

    For SDXL's second encoder; the projection is of the last layer's state at the end of the prompt.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.text_encoder_2 = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self.text_encoder_2(input_ids=input_ids, output_hidden_states=True)
        return out.hidden_states[-2], out.text_embeds


class VaeDecoder(nn.Module):
    """The U-Net's latents ``[B, C, H, W]`` → pixels ``[B, 3, H·f, W·f]`` in [-1, 1]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(to_vae(latents, self.vae), return_dict=False)[0]


class VaeEncoder(nn.Module):
    """Pixels ``[B, 3, H·f, W·f]`` in [-1, 1] → the U-Net's latents ``[B, C, H, W]``.

    For a variational encoder, the mean of its distribution, so that the result is deterministic.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor) -> Tensor:
        encoded = self.vae.encode(pixels)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
        return from_vae(latents, self.vae)
