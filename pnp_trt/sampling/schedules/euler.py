"""Euler's method over noise levels as a table (Karras et al. 2022, algorithm 1 without churn)."""

from __future__ import annotations

import numpy as np

from ...errors import InputError
from ..noise_levels import (
    PREDICTIONS,
    SPACINGS,
    Config,
    check_steps,
    choice,
    final_sigma,
    refuse,
    respaced,
    timesteps_of,
    training_sigmas,
    training_steps,
)
from ..table import Schedule, make_table
from .base import schedule
from .ddim import within_training
from .spacing import ALL_SPACINGS

INTERPOLATIONS = ("linear", "log_linear")
TIMESTEP_TYPES = ("discrete", "continuous")


@schedule(
    "euler", "Karras et al. 2022, algorithm 1 without churn", "EulerDiscreteScheduler",
    aliases=("Euler", "k_euler"), spacings=ALL_SPACINGS,
)  # fmt: skip
def euler(config: Config, steps: int) -> Schedule:
    """Euler's method for a teacher's scheduler config, equivalent to diffusers' ``EulerDiscreteScheduler``.

    The latent is in σ's space: it starts with a deviation of σ_max and is divided by √(σ² + 1) for the network.  Noise
    levels are diffusers' own.  Fractional timesteps (linspace, Karras) are rounded for the network, which was trained
    on whole ones and is exported for them; diffusers would pass the fraction.  On the bundled model the images agree to
    50 to 75 dB (PSNR).

    Raises:
        InputError: if ``steps`` is outside 1 … num_train_timesteps, or an option is unknown or needs inputs that are
            not training timesteps.
    """
    check_steps(config, steps)
    refuse(config, {"use_beta_sigmas": "which is not supported"})
    prediction = choice(config, "prediction_type", "epsilon", PREDICTIONS)
    if choice(config, "timestep_type", "discrete", TIMESTEP_TYPES) == "continuous" and prediction == "v_prediction":
        raise InputError(
            "the scheduler config's timestep_type is 'continuous' with v_prediction, where the network takes a "
            "logarithm of the noise, but engines take a timestep; known: discrete"
        )
    timesteps, sigmas = levels(config, steps)
    sigma, dt = sigmas[:-1].astype(np.float64), np.diff(sigmas).astype(np.float64)
    root = np.sqrt(sigma**2 + 1)
    if prediction == "epsilon":
        x_scale, output_scale = np.ones(len(sigma)), dt
        data_x, data_output = np.ones(len(sigma)), -sigma
    else:
        x_scale, output_scale = 1 + dt * sigma / root**2, dt / root
        data_x, data_output = 1 / root**2, -sigma / root
    return make_table(
        euler.name, np.rint(timesteps).astype(np.int64), init_scale=first_deviation(config, sigmas),
        x_scale=x_scale, output_scale=output_scale, data_x=data_x, data_output=data_output, input_scale=1 / root,
        image_scale=np.ones(len(sigma)), noise_scale=sigma,
    )  # fmt: skip


def first_deviation(config: Config, sigmas: np.ndarray) -> float:
    """Standard deviation of the initial latent in σ's space, as in diffusers: √(σ² + 1) with leading timesteps."""
    top = float(sigmas.max())
    return (top**2 + 1) ** 0.5 if choice(config, "timestep_spacing", "linspace", SPACINGS) == "leading" else top


def levels(config: Config, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Fractional timesteps ``[steps]`` and falling noise levels ``[steps + 1]`` float32, including the final level.

    Raises:
        InputError: if an option of the config is unknown, or a timestep is past the last one of training.
    """
    training = training_sigmas(config)
    n = training_steps(config)
    spacing = choice(config, "timestep_spacing", "linspace", SPACINGS)
    if spacing == "linspace":
        t = np.linspace(0, n - 1, steps, dtype=np.float32)[::-1]
    elif spacing == "leading":
        t = (np.arange(steps) * (n // steps))[::-1].astype(np.float32) + config.get("steps_offset", 0)
    else:
        t = np.arange(n, 0, -n / steps).round()[:steps].astype(np.float32) - 1
    t = within_training(config, t, steps)
    if choice(config, "interpolation_type", "linear", INTERPOLATIONS) == "linear":
        sigmas = np.interp(t, np.arange(n), training)
    else:  # steps + 1 levels, as in diffusers: the last step ends at the lowest level
        sigmas = np.exp(np.linspace(np.log(training[-1]), np.log(training[0]), steps + 1))
    highest, lowest = config.get("sigma_max"), config.get("sigma_min")
    highest = float(sigmas[0]) if highest is None else float(highest)
    lowest = float(sigmas[-1]) if lowest is None else float(lowest)
    if (spaced := respaced(config, highest, lowest, steps)) is not None:
        sigmas, t = spaced, timesteps_of(spaced, training)
    with_end = np.append(sigmas, final_sigma(config, training)).astype(np.float32)
    return t, with_end[: steps + 1]
