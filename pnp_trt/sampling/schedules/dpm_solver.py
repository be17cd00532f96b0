"""DPM-Solver++(2M) as a table (Lu et al. 2022, arXiv:2211.01095, algorithm 2)."""

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

#: diffusers' synonyms: it treats the solver types of UniPC and DEIS as midpoint, and deis as dpm++
SOLVER_TYPES = {"midpoint": "midpoint", "heun": "heun", "bh1": "midpoint", "bh2": "midpoint", "logrho": "midpoint"}
ALGORITHMS = ("dpmsolver++", "deis")
_NOT_LINEAR = {
    "thresholding": "which is not linear",
    "use_flow_sigmas": "which is for flow matching",
    "use_beta_sigmas": "which is not supported",
    "use_lu_lambdas": "which is not supported",
    "variance_type": "which is for networks that predict a variance",
}
#: ``lower_order_final`` applies to fewer steps than this
_FEW = 15


@schedule(
    "dpm++", "DPM-Solver++(2M), Lu et al. 2022; order 1 if the config requires it", "DPMSolverMultistepScheduler",
    aliases=("DPM++ 2M", "dpmpp_2m", "k_dpmpp_2m"), spacings=ALL_SPACINGS,
)  # fmt: skip
def dpm_solver(config: Config, steps: int) -> Schedule:
    """DPM-Solver++ of order 1 or 2 for a teacher's scheduler config, as in diffusers' ``DPMSolverMultistepScheduler``.

    Raises:
        InputError: if ``steps`` is outside 1 … num_train_timesteps, or an option is unknown, stochastic or not linear.
    """
    check_steps(config, steps)
    refuse(config, _NOT_LINEAR)
    if str(kind := config.get("algorithm_type")).startswith("sde-"):
        raise InputError(
            f"the scheduler config's algorithm_type is '{kind}', which adds noise at every step; "
            "take --schedule ddim or euler"
        )
    choice(config, "algorithm_type", "dpmsolver++", ALGORITHMS)
    if (order := config.get("solver_order", 2)) not in (1, 2):
        raise InputError(f"the scheduler config's solver_order is {order}; known: 1, 2")
    solver = SOLVER_TYPES[choice(config, "solver_type", "midpoint", tuple(SOLVER_TYPES))]
    rounded = bool(config.get("use_karras_sigmas")) and config.get("beta_schedule") != "squaredcos_cap_v2"
    timesteps, sigmas = levels(config, steps, "DPM-Solver++", rounded=rounded, clipped=_clipped(config))
    # round as diffusers does: λ is several units large, and the coefficients are computed from its small differences
    alpha = np.float32(1) / np.sqrt(np.square(sigmas) + np.float32(1))
    sigma = sigmas * alpha
    with np.errstate(divide="ignore"):  # λ at zero noise is infinite, and e^−∞ = 0 is the correct value
        lam = np.log(alpha) - np.log(sigma)
    before, after = slice(None, -1), slice(1, None)
    if choice(config, "prediction_type", "epsilon", PREDICTIONS) == "epsilon":
        data_x, data_output = 1 / alpha[before].astype(float), -sigma[before].astype(float) / alpha[before]
    else:
        data_x, data_output = alpha[before].astype(float), -sigma[before].astype(float)
    first = _first_order(config, len(timesteps), order)
    x_factor, data, previous = sigma[after] / sigma[before], np.zeros(len(timesteps)), np.zeros(len(timesteps))
    for i in range(len(timesteps)):
        h = lam[i + 1] - lam[i]
        if h == 0:  # with Karras' levels and final ``sigma_min``, the last step changes nothing
            continue
        data[i] = -(alpha[i + 1] * (np.exp(-h) - np.float32(1)))
        if not first[i]:
            with np.errstate(divide="ignore", invalid="ignore"):  # equal noise levels, which make_table reports
                ratio = (lam[i] - lam[i - 1]) / h
                slope = data[i] / 2 if solver == "midpoint" else alpha[i + 1] * ((np.exp(-h) - np.float32(1)) / h + 1)
                previous[i] = -slope / ratio
            data[i] -= previous[i]
    return make_table(
        dpm_solver.name, timesteps,
        x_scale=x_factor + data * data_x, output_scale=data * data_output, previous_scale=previous,
        data_x=data_x, data_output=data_output, image_scale=alpha[before], noise_scale=sigma[before],
    )  # fmt: skip


def _first_order(config: Config, steps: int, order: int) -> np.ndarray:
    """Whether each step uses its own prediction alone, ``[steps]`` bool."""
    first = np.full(steps, order == 1)
    first[0] = True
    few = bool(config.get("lower_order_final", True)) and steps < _FEW
    if config.get("euler_at_final") or few or config.get("final_sigmas_type", "zero") == "zero":
        first[-1] = True
    return first


def levels(
    config: Config,
    steps: int,
    name: str,
    *,
    rounded: bool,
    clipped: int = 0,
    ends: tuple[float | None, ...] = (None, None),
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps ``[steps]`` int64 and noise levels ``[steps + 1]`` float32 (with the final level) of multistep methods.

    Args:
        name: name of the method, for messages.
        rounded: whether fractional timesteps are rounded; else they are truncated.
        clipped: number of training timesteps at the end that are not used.
        ends: highest and lowest noise level if the levels are spaced directly; None takes those of training.

    Raises:
        InputError: if an option of the config is unknown, or a timestep is past the last one of training.
    """
    training = training_sigmas(config)
    n = training_steps(config)
    last = n - clipped
    spacing = choice(config, "timestep_spacing", "linspace", SPACINGS)
    if spacing == "linspace":
        t = np.linspace(0, last - 1, steps + 1).round()[::-1][:-1]
    elif spacing == "leading":
        if steps >= last:
            raise InputError(f"steps is {steps}; {name} with leading timesteps takes at most {last - 1}")
        t = (np.arange(steps + 1) * (last // (steps + 1)))[::-1][:-1] + config.get("steps_offset", 0)
    else:
        t = np.arange(last, 0, -n / steps).round()[:steps] - 1
    highest, lowest = (
        float(default if end is None else end) for default, end in zip(training[[-1, 0]], ends, strict=True)
    )
    sigmas = respaced(config, highest, lowest, steps)
    if sigmas is None:
        t = within_training(config, t, steps)
        sigmas = np.interp(t, np.arange(n), training)
    else:
        t = timesteps_of(sigmas, training)
        if rounded:
            t = t.round()
    return t.astype(np.int64), np.append(sigmas, final_sigma(config, training)).astype(np.float32)


def _clipped(config: Config) -> int:
    """Number of training timesteps, at the end, with a λ below ``lambda_min_clipped``."""
    lowest = float(config.get("lambda_min_clipped", -np.inf))
    return int(np.searchsorted(-np.log(training_sigmas(config))[::-1], lowest))
