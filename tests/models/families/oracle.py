"""Images of a bundle and of diffusers' ``StableDiffusionXLPipeline`` from the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.sampling.schedules import SCHEDULES

PROMPTS = ["a red apple", "a cat on a mat", "the blue sky", "two dogs and a very long street"]
NEGATIVE = ["ugly", "", "a car", "dark"]
#: in levels of 255: 0.5 for rounding to whole levels, and 0.05 for float32 arithmetic
TOLERANCE = 0.5 + 0.05


def theirs(folder: Path) -> Any:
    """Load a folder as diffusers' pipeline."""
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_schedule(pipe: Any, schedule: str) -> Any:
    """Set diffusers' scheduler for ``schedule`` in the pipeline."""
    pipe.scheduler = getattr(diffusers, SCHEDULES.get(schedule).diffusers_class).from_config(pipe.scheduler.config)
    return pipe


def ours(pipe: Pipeline, size: tuple[int, int], **options: Any) -> tuple[np.ndarray, torch.Tensor]:
    """Return images and the noise that they were generated from."""
    count = len(options.get("prompts", PROMPTS))
    noise = pipe.noise(range(count), size)
    negative = options.pop("negative", None)
    latents = pipe.denoise(
        pipe.encode(options.pop("prompts", PROMPTS)), noise, steps=3,
        negative=None if negative is None else pipe.encode(negative), **options,
    )  # fmt: skip
    return pipe.decode(latents), torch.from_numpy(noise)


def assert_same(images: np.ndarray, reference: np.ndarray) -> None:
    assert images.shape == reference.shape and images.std() > 5
    assert np.abs(images - 255 * reference).max() <= TOLERANCE
