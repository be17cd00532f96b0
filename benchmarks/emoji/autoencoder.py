"""The autoencoder: an ``AutoencoderTiny`` whose encoder is a principal-component transform.

With no blocks between its convolutions diffusers' tiny encoder is linear, so the best linear code of
4 × 4 pixel patches (PCA, half-whitened: the spread of each channel is the square root of the natural
one, which keeps coarse structure strong and fine structure above the noise) can be written into its
weights in closed form.  The U-Net can then be trained immediately; the decoder is trained separately,
on the same latents, and removes the linear code's artefacts.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderTiny

PATCH = 4


def principal_code(pixels: np.ndarray, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``[channels, 3, 4, 4]`` and bias ``[channels]`` of the patch code, for pixels in [0, 1]."""
    n, h, w, _ = pixels.shape
    x = pixels.astype(np.float64) / 255.0
    p = x.reshape(n, h // PATCH, PATCH, w // PATCH, PATCH, 3).transpose(0, 1, 3, 5, 2, 4).reshape(-1, 3 * PATCH**2)
    mean = p.mean(0)
    spread, axes = np.linalg.eigh(np.cov((p - mean).T))
    top = np.argsort(spread)[::-1][:channels]
    code = axes[:, top] / spread[top] ** 0.25
    scale = 1.0 / np.sqrt((((p - mean) @ code) ** 2).mean())
    weight = torch.from_numpy((code * scale).T.reshape(channels, 3, PATCH, PATCH)).float()
    bias = torch.from_numpy(-(mean @ code) * scale).float()
    return weight, bias


def build(
    weight: torch.Tensor, bias: torch.Tensor, width: int = 48, blocks: tuple[int, ...] = (3, 2, 1)
) -> AutoencoderTiny:
    """An ``AutoencoderTiny`` with the patch code in its encoder and an untrained decoder."""
    channels = weight.shape[0]
    carry = 3 * PATCH**2
    vae = AutoencoderTiny(
        latent_channels=channels, encoder_block_out_channels=(carry,) * 3, num_encoder_blocks=(0, 0, 0),
        decoder_block_out_channels=(width,) * 3, num_decoder_blocks=blocks, scaling_factor=1.0,
    )  # fmt: skip
    spread, fold, gather, project = (m for m in vae.encoder.layers if isinstance(m, torch.nn.Conv2d))
    with torch.no_grad():
        for conv in (spread, fold, gather, project):
            conv.weight.zero_()
            if conv.bias is not None:
                conv.bias.zero_()
        # Two strided convolutions move each 2 × 2 neighbourhood into channels: taps (1, 1)..(2, 2) of a
        # 3 × 3 kernel with padding 1 are the pixels (0, 0)..(1, 1) of the block.
        for c in range(3):
            spread.weight[c, c, 1, 1] = 1.0
        for dy in range(2):
            for dx in range(2):
                for c in range(3):
                    fold.weight[c * 4 + dy * 2 + dx, c, 1 + dy, 1 + dx] = 1.0
                for c in range(12):
                    gather.weight[c * 4 + dy * 2 + dx, c, 1 + dy, 1 + dx] = 1.0
        for c in range(3):
            for y in range(PATCH):
                for x in range(PATCH):
                    # the first fold keeps (y % 2, x % 2), the second (y // 2, x // 2)
                    slot = (c * 4 + (y % 2) * 2 + x % 2) * 4 + (y // 2) * 2 + x // 2
                    project.weight[:, slot, 1, 1] = weight[:, c, y, x]
        project.bias.copy_(bias)
    vae.encoder.requires_grad_(False)
    return vae


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 ``[N, H, W, 3]`` → float ``[N, 3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)


@torch.no_grad()
def encode(vae: AutoencoderTiny, pixels: np.ndarray, batch: int = 256) -> torch.Tensor:
    """Latents ``[N, C, H/4, W/4]``."""
    return torch.cat([vae.encode(to_tensor(pixels[i : i + batch])).latents for i in range(0, len(pixels), batch)])
