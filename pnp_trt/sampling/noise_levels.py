"""How much noise there is at a training timestep, from a diffusers scheduler config.

Betas and their products are rounded to float32 where diffusers rounds them, so that both samplers' coefficients agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import InputError

Config = Mapping[str, Any]
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
FINAL_SIGMAS = ("zero", "sigma_min")
#: ᾱ of the last timestep where there would be no signal left, so that its sigma is finite (diffusers' choice)
_LEAST_ALPHA = 2.0**-24


def choice(config: Config, key: str, default: str, known: tuple[str, ...]) -> str:
    """A config's word for ``key``.

    Raises:
        InputError: for one that is not known; the message lists those that are.
    """
    value = default if config.get(key) is None else config[key]
    if value not in known:
        raise InputError(f"the scheduler config's {key} is '{value}'; known: {', '.join(known)}")
    return str(value)


def refuse(config: Config, why: Mapping[str, str]) -> None:
    """Raise ``InputError`` for the first option of ``why`` that is on in the config."""
    for key, reason in why.items():
        if config.get(key):
            raise InputError(
                f"the scheduler config's {key} is {config[key]!r}, {reason}; "
                "take another --schedule, or a teacher without it"
            )


def training_steps(config: Config) -> int:
    """``num_train_timesteps``."""
    value = config.get("num_train_timesteps")
    return 1000 if value is None else int(value)


def check_steps(config: Config, steps: int) -> None:
    """Raise ``InputError`` unless ``steps`` is 1 … num_train_timesteps."""
    if not 1 <= steps <= training_steps(config):
        raise InputError(f"steps is {steps}; it must be between 1 and {training_steps(config)}")


def betas(config: Config) -> np.ndarray:
    """β_t, ``[num_train_timesteps]`` float32.

    Raises:
        InputError: for a beta schedule that is not known, or trained betas of another number.
    """
    n = training_steps(config)
    ends = (config.get("beta_start"), config.get("beta_end"))
    start, end = (default if v is None else v for v, default in zip(ends, (0.0001, 0.02), strict=True))
    if (trained := config.get("trained_betas")) is not None:
        found = np.asarray(trained, np.float32)
        if found.shape != (n,):
            raise InputError(f"the scheduler config has {found.size} trained_betas and {n} training timesteps")
    elif (kind := choice(config, "beta_schedule", "linear", BETA_SCHEDULES)) == "linear":
        found = _linspace(start, end, n)
    elif kind == "scaled_linear":
        found = np.square(_linspace(start**0.5, end**0.5, n))
    else:  # Nichol & Dhariwal 2021, eq. 17
        curve = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
        found = np.array([min(1 - after / now, 0.999) for now, after in pairwise(curve)])
    found = found.astype(np.float32)
    return _zero_snr(found) if config.get("rescale_betas_zero_snr") else found


def _linspace(start: float, end: float, n: int) -> np.ndarray:
    """``torch.linspace`` in float32, bit by bit: it counts from both ends and rounds its step first."""
    low, high = np.float32(start), np.float32(end)
    step = float((high - low) / np.float32(max(n - 1, 1)))
    i = np.arange(n)
    return np.where(i < n // 2, float(low) + step * i, float(high) - step * (n - 1 - i)).astype(np.float32)


def _zero_snr(rising: np.ndarray) -> np.ndarray:
    """Betas whose last timestep is pure noise (Lin et al. 2023, algorithm 1), in float32 as diffusers does it."""
    root = np.sqrt(_products(rising))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    squares = np.square(root)
    return np.float32(1) - np.concatenate([squares[:1], squares[1:] / squares[:-1]])


def _products(rising: np.ndarray) -> np.ndarray:
    # torch multiplies float32 up in float64 and rounds each product
    return np.cumprod((np.float32(1) - rising).astype(np.float64)).astype(np.float32)


def alphas_cumprod(config: Config) -> np.ndarray:
    """ᾱ_t, ``[num_train_timesteps]``: float32 values held in float64.

    Raises:
        InputError: as :func:`betas`.
    """
    return _products(betas(config)).astype(np.float64)


def training_sigmas(config: Config) -> np.ndarray:
    """σ_t = √((1 − ᾱ_t)/ᾱ_t), ``[num_train_timesteps]`` float32, rising.

    Raises:
        InputError: as :func:`betas`.
    """
    abar = _products(betas(config))
    if config.get("rescale_betas_zero_snr"):
        abar[-1] = _LEAST_ALPHA
    return np.sqrt((np.float32(1) - abar) / abar)


def final_sigma(config: Config, sigmas: np.ndarray) -> float:
    """The noise level that sampling ends at: none, or that of the first training timestep."""
    return 0.0 if choice(config, "final_sigmas_type", "zero", FINAL_SIGMAS) == "zero" else float(sigmas[0])


def karras(highest: float, lowest: float, steps: int) -> np.ndarray:
    """``[steps]`` falling noise levels (Karras et al. 2022, eq. 5, ρ = 7)."""
    ramp = np.linspace(0, 1, steps)
    return (highest ** (1 / 7) + ramp * (lowest ** (1 / 7) - highest ** (1 / 7))) ** 7


def exponential(highest: float, lowest: float, steps: int) -> np.ndarray:
    """``[steps]`` falling noise levels, even in their logarithm."""
    return np.exp(np.linspace(math.log(highest), math.log(lowest), steps))


def respaced(config: Config, highest: float, lowest: float, steps: int) -> np.ndarray | None:
    """The noise levels that the config spaces by themselves and not by timesteps, ``[steps]``; None where it has none.

    Raises:
        InputError: for a config that needs two ways at once.
    """
    ways = {"use_karras_sigmas": karras, "use_exponential_sigmas": exponential}
    wanted = [key for key in ways if config.get(key)]
    if len(wanted) > 1:
        raise InputError(f"the scheduler config has both {' and '.join(wanted)}; leave one of them")
    return ways[wanted[0]](highest, lowest, steps) if wanted else None


def timesteps_of(sigmas: np.ndarray, training: np.ndarray) -> np.ndarray:
    """The training timesteps, with fractions, at which noise levels lie: linear in log σ between whole ones.

    Args:
        sigmas: ``[N]``.
        training: :func:`training_sigmas`.
    """
    logs = np.log(training)
    wanted = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(logs, wanted, side="right") - 1, 0, len(logs) - 2)
    share = (logs[low] - wanted) / (logs[low] - logs[low + 1])
    return np.asarray(low + np.clip(share, 0, 1))
