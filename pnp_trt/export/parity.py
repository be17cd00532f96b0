"""Golden inputs, and how far a graph's output is from PyTorch's on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def golden_inputs(
    sample: tuple[int, int, int], tokens: int, width: int, vocabulary: int, guided: bool
) -> dict[str, dict[str, Any]]:
    """Seeded torch inputs per network, batch 2, with different timesteps and scales in the batch."""
    import torch

    g = torch.Generator().manual_seed(20240)
    unet = {
        "sample": torch.randn(2, *sample, generator=g),
        "timestep": torch.tensor([801, 41]),
        "encoder_hidden_states": torch.randn(2, tokens, width, generator=g),
    }
    if guided:
        unet["guidance"] = torch.tensor([2.0, 7.5])
    return {
        "unet": unet,
        "text_encoder": {"input_ids": torch.randint(0, vocabulary, (2, tokens), generator=g)},
        "vae_decoder": {"latents": torch.randn(2, *sample, generator=g)},
    }


def relative_error(path: Path, inputs: dict[str, Any], reference: np.ndarray) -> float:
    """‖out − reference‖ / ‖reference‖ of ONNX Runtime (CPU) on ``path``; NaN when either is not finite."""
    from ..backends.onnxruntime import OrtNetwork

    out = OrtNetwork(path, "cpu")(**{k: v.numpy() for k, v in inputs.items()})
    if out.shape != reference.shape:
        return float("nan")
    return float(np.linalg.norm(out.astype(np.float64) - reference) / np.linalg.norm(reference.astype(np.float64)))
