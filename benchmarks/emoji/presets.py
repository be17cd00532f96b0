"""Sizes of the recipe.  ``cpu`` trained the bundled model; ``gpu`` is the same recipe scaled up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """One size of the whole recipe; every random choice follows from ``seed``."""

    name: str
    block_out_channels: tuple[int, ...] = (96, 128)
    layers_per_block: int = 2
    latent_channels: int = 8
    text_width: int = 128
    text_layers: int = 3
    #: renderings per image: one centred, the others scaled and shifted
    variants: int = 5
    #: share of the base's steps with all renderings; the rest uses only the centred ones, with which a short run gives
    #: recognisable images much sooner
    jittered: float = 0.39
    steps: int = 3200
    batch: int = 64
    lr: float = 1e-3
    fine_tune_steps: int = 180
    fine_tune_lr: float = 5e-4
    decoder_steps: int = 1300
    decoder_batch: int = 16
    warmup: int = 200
    ema: float = 0.999
    caption_drop: float = 0.1
    checkpoint_every: int = 250
    seed: int = 0
    #: options of ``pnp-trt distill guidance``
    guide_options: tuple[str, ...] = (
        "--num-states", "51200", "--steps", "4000", "--batch", "32", "--lr", "3e-3", "--mixed-precision", "auto",
        "--checkpoint-every", "1000",
    )  # fmt: skip
    #: options of ``pnp-trt distill steps``
    steps_options: tuple[str, ...] = (
        "--to", "4", "--from", "32", "--trajectories", "320", "--steps", "400", "--batch", "32", "--lr", "1e-3",
        "--mixed-precision", "auto",
    )  # fmt: skip


PRESETS = {
    "smoke": Preset(
        "smoke",
        (32, 32),
        1,
        steps=6,
        batch=4,
        fine_tune_steps=3,
        decoder_steps=3,
        variants=1,
        checkpoint_every=2,
        guide_options=("--num-states", "40", "--steps", "4", "--batch", "4"),
        steps_options=("--to", "4", "--from", "8", "--trajectories", "4", "--steps", "4", "--batch", "4"),
    ),
    "cpu": Preset("cpu"),
    "gpu": Preset(
        "gpu",
        (192, 384),
        steps=40_000,
        batch=256,
        fine_tune_steps=4000,
        decoder_steps=20_000,
        decoder_batch=64,
        ema=0.9995,
    ),
}
