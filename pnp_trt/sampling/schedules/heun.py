"""Heun's method over noise levels as a table (Karras et al. 2022, algorithm 1 without churn): two rows a step."""

from __future__ import annotations

import numpy as np

from ..noise_levels import PREDICTIONS, Config, check_steps, choice, refuse
from ..table import Schedule, make_table
from .base import schedule
from .euler import first_deviation, levels
from .spacing import ALL_SPACINGS

#: options of diffusers' Euler class that its Heun class does not have
_OF_EULER = ("interpolation_type", "final_sigmas_type", "sigma_min", "sigma_max")


def evaluations(steps: int) -> int:
    """Model evaluations of ``steps`` steps: two per step, but one in the last, which ends at zero noise."""
    return 2 * steps - 1


@schedule(
    "heun", "Karras et al. 2022, algorithm 1 without churn; two evaluations per step, one in the last",
    "HeunDiscreteScheduler", aliases=("Heun", "k_heun"), spacings=ALL_SPACINGS, evaluations=evaluations,
)  # fmt: skip
def heun(config: Config, steps: int) -> Schedule:
    """Heun's method for a teacher's scheduler config, equivalent to diffusers' ``HeunDiscreteScheduler``.

    The latent is in σ's space, and timesteps are rounded, as for Euler.  A step from σ to σ′ is Euler's step to x̂,
    whose slope is (x − D)/σ = (x̂ − D)/σ′ with the data prediction D, and a second evaluation at x̂ and σ′ with D′::

        x′ = x̂ + (σ′ − σ)/2·((x̂ − D′)/σ′ − (x̂ − D)/σ′) = x̂ + (σ′ − σ)/(2σ′)·(D − D′)

    so that the second row needs only x̂ and D from the first one.  There are two deliberate differences from diffusers'
    class: timesteps are whole, and ``rescale_betas_zero_snr`` is applied, which that class ignores.

    Raises:
        InputError: if ``steps`` is outside 1 … num_train_timesteps, or an option is unknown or not linear.
    """
    check_steps(config, steps)
    refuse(config, {"use_beta_sigmas": "which is not supported"})
    prediction = choice(config, "prediction_type", "epsilon", PREDICTIONS)
    timesteps, sigmas = levels({k: v for k, v in config.items() if k not in _OF_EULER}, steps)
    step = np.arange(evaluations(steps)) // 2
    second = np.arange(evaluations(steps)) % 2 == 1
    index = step + second
    sigma = sigmas[index].astype(np.float64)
    change = np.diff(sigmas).astype(np.float64)[step]
    root = np.sqrt(sigma**2 + 1)
    if prediction == "epsilon":
        data_x, data_output = np.ones(len(sigma)), -sigma
    else:
        data_x, data_output = 1 / root**2, -sigma / root
    # x changes by pull·(x − D) in the first row of a step, and by pull·(D₋ − D) in the second
    pull = change / np.where(second, 2, 1) / sigma
    x_scale = np.where(second, 1 - pull * data_x, 1 + pull * (1 - data_x))
    return make_table(
        heun.name, np.rint(timesteps[index]).astype(np.int64), init_scale=first_deviation(config, sigmas),
        x_scale=x_scale, output_scale=-pull * data_output, previous_scale=np.where(second, pull, 0),
        data_x=data_x, data_output=data_output, input_scale=1 / root,
        image_scale=np.ones(len(sigma)), noise_scale=sigma, rows_per_step=2,
    )  # fmt: skip
