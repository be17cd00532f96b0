"""DDIM as a table (Song et al. 2021, eq. 12, η = 0): with ε- or v-prediction a step is linear in latent and output."""

from __future__ import annotations

import numpy as np

from ...errors import InputError
from ..noise_levels import PREDICTIONS, SPACINGS, Config, alphas_cumprod, check_steps, choice, refuse, training_steps
from ..table import Schedule, make_table
from .base import schedule
from .spacing import BY_TIMESTEP


def spaced_timesteps(config: Config, steps: int) -> np.ndarray:
    """``[steps]`` int64, descending, by the config's ``timestep_spacing``.

    Raises:
        InputError: for an unknown spacing, or a first timestep past the last one of training.
    """
    n = training_steps(config)
    spacing = choice(config, "timestep_spacing", "leading", SPACINGS)
    if spacing == "leading":
        t = (np.arange(steps) * (n // steps))[::-1].astype(np.int64) + int(config.get("steps_offset", 0))
    elif spacing == "trailing":
        # a step such as 1000/61 is inexact in floating point, which may give one timestep too many at the end
        t = np.round(np.arange(n, 0, -n / steps)).astype(np.int64)[:steps] - 1
    else:
        t = np.linspace(0, n - 1, steps).round()[::-1].astype(np.int64)
    return within_training(config, t, steps)


def within_training(config: Config, timesteps: np.ndarray, steps: int) -> np.ndarray:
    """Return ``timesteps``, or raise ``InputError`` if one is past the last timestep of training."""
    if timesteps.max() >= training_steps(config):
        raise InputError(
            f"steps is {steps}; with timestep_spacing leading and steps_offset {config.get('steps_offset', 0)} the "
            f"first timestep would be {timesteps.max():g}, past {training_steps(config) - 1}; take fewer steps"
        )
    return timesteps


@schedule(
    "ddim", "Song et al. 2021, η = 0; used in the paper and for distillation", "DDIMScheduler",
    aliases=("DDIM",), spacings=BY_TIMESTEP,
)  # fmt: skip
def ddim(config: Config, steps: int) -> Schedule:
    """Deterministic DDIM for a teacher's scheduler config, equivalent to diffusers' ``DDIMScheduler``.

    ``clip_sample`` is ignored: it is for pixels, and diffusers' own latent pipelines switch it off.

    Raises:
        InputError: if ``steps`` is outside 1 … num_train_timesteps, or an option is unknown or not linear.
    """
    check_steps(config, steps)
    refuse(config, {"thresholding": "which is not linear"})
    t = spaced_timesteps(config, steps)
    x_scale, output_scale = ddim_coefficients(config, t, t - training_steps(config) // steps)
    a = alphas_cumprod(config)[t]
    return make_table(
        ddim.name, t, x_scale=x_scale, output_scale=output_scale, image_scale=np.sqrt(a), noise_scale=np.sqrt(1 - a)
    )


def ddim_coefficients(config: Config, timesteps: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(x_scale, output_scale)`` of DDIM steps from ``timesteps`` to ``after``, int64 ``[N]``; below 0 is the end.

    Raises:
        InputError: if the prediction type is unknown, or it is ε and a timestep has no signal.
    """
    abar = alphas_cumprod(config)
    final = 1.0 if config.get("set_alpha_to_one", True) else abar[0]
    a = abar[timesteps]
    p = np.where(after >= 0, abar[np.maximum(after, 0)], final)
    if choice(config, "prediction_type", "epsilon", PREDICTIONS) == "epsilon":
        if (a == 0).any():
            raise InputError(
                "rescale_betas_zero_snr leaves no signal at the last timestep, where a predicted noise is useless; "
                "use a v_prediction teacher, or --schedule euler"
            )
        return np.sqrt(p / a), np.sqrt(1 - p) - np.sqrt(p / a) * np.sqrt(1 - a)
    return np.sqrt(p * a) + np.sqrt((1 - p) * (1 - a)), np.sqrt((1 - p) * a) - np.sqrt(p * (1 - a))


def ddim_step(config: Config, timestep: int, after: int) -> tuple[float, float]:
    """The coefficients of a single DDIM step; see :func:`ddim_coefficients`."""
    x_scale, output_scale = ddim_coefficients(config, np.array([timestep]), np.array([after]))
    return float(x_scale[0]), float(output_scale[0])
