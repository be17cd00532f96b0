"""Noise levels of the training timesteps, from a diffusers scheduler config.

Betas and their products are rounded to float32 where diffusers rounds them, so that the coefficients agree with
    diffusers'.
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
#: ᾱ of the last timestep if it would be zero, so that its sigma is finite (diffusers' choice)
_LEAST_ALPHA = 2.0**-24


def choice(config: Config, key: str, default: str, known: tuple[str, ...]) -> str:
    """The value of ``key`` in a config.

    Raises:
        InputError: for an unknown value; the message lists the known ones.
    """
    value = default if config.get(key) is None else config[key]
    if value not in known:
        raise InputError(f"the scheduler config's {key} is '{value}'; known: {', '.join(known)}")
    return str(value)


def refuse(config: Config, why: Mapping[str, str]) -> None:
    """Raise ``InputError`` for the first option of ``why`` that is set in the config."""
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
        InputError: for an unknown beta schedule, or a wrong number of trained betas.
    """
    n = training_steps(config)
    ends = (config.get("beta_start"), config.get("beta_end"))
    start, end = (default if v is None else v for v, default in zip(ends, (0.0001, 0.02), strict=True))
    if (trained := config.get("trained_betas")) is not None:
        values = np.asarray(trained, np.float32)
        if values.shape != (n,):
            raise InputError(f"the scheduler config has {values.size} trained_betas and {n} training timesteps")
    elif (kind := choice(config, "beta_schedule", "linear", BETA_SCHEDULES)) == "linear":
        values = _linspace(start, end, n)
    elif kind == "scaled_linear":
        values = np.square(_linspace(start**0.5, end**0.5, n))
    else:  # Nichol & Dhariwal 2021, eq. 17
        curve = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
        values = np.array([min(1 - following / current, 0.999) for current, following in pairwise(curve)])
    values = values.astype(np.float32)
    return _zero_snr(values) if config.get("rescale_betas_zero_snr") else values


def _linspace(start: float, end: float, n: int) -> np.ndarray:
    """``torch.linspace`` in float32, bit by bit: it counts from both ends and rounds its step first."""
    low, high = np.float32(start), np.float32(end)
    step = float((high - low) / np.float32(max(n - 1, 1)))
    i = np.arange(n)
    return np.where(i < n // 2, float(low) + step * i, float(high) - step * (n - 1 - i)).astype(np.float32)


def _zero_snr(original: np.ndarray) -> np.ndarray:
    """Betas whose last timestep is pure noise (Lin et al. 2023, algorithm 1), in float32 as in diffusers."""
    root = np.sqrt(_products(original))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    squares = np.square(root)
    return np.float32(1) - np.concatenate([squares[:1], squares[1:] / squares[:-1]])


def _products(beta: np.ndarray) -> np.ndarray:
    # torch accumulates the product of float32 values in float64 and rounds each result
    return np.cumprod((np.float32(1) - beta).astype(np.float64)).astype(np.float32)


def alphas_cumprod(config: Config) -> np.ndarray:
    """ᾱ_t, ``[num_train_timesteps]``: float32 values stored as float64.

    Raises:
        InputError: as for :func:`betas`.
    """
    return _products(betas(config)).astype(np.float64)


def training_sigmas(config: Config) -> np.ndarray:
    """σ_t = √((1 − ᾱ_t)/ᾱ_t), ``[num_train_timesteps]`` float32, rising.

    Raises:
        InputError: as for :func:`betas`.
    """
    abar = _products(betas(config))
    if config.get("rescale_betas_zero_snr"):
        abar[-1] = _LEAST_ALPHA
    return np.sqrt((np.float32(1) - abar) / abar)


def final_sigma(config: Config, sigmas: np.ndarray) -> float:
    """The noise level at the end of sampling: zero, or that of the first training timestep."""
    return 0.0 if choice(config, "final_sigmas_type", "zero", FINAL_SIGMAS) == "zero" else float(sigmas[0])


def karras(highest: float, lowest: float, steps: int) -> np.ndarray:
    """``[steps]`` falling noise levels (Karras et al. 2022, eq. 5, ρ = 7)."""
    ramp = np.linspace(0, 1, steps)
    return (highest ** (1 / 7) + ramp * (lowest ** (1 / 7) - highest ** (1 / 7))) ** 7


def exponential(highest: float, lowest: float, steps: int) -> np.ndarray:
    """``[steps]`` falling noise levels, evenly spaced in their logarithm."""
    return np.exp(np.linspace(math.log(highest), math.log(lowest), steps))


def respaced(config: Config, highest: float, lowest: float, steps: int) -> np.ndarray | None:
    """Noise levels ``[steps]`` if the config spaces them directly and not by timesteps, else None.

    Raises:
        InputError: for a config with two such spacings.
    """
    spacings = {"use_karras_sigmas": karras, "use_exponential_sigmas": exponential}
    enabled = [key for key in spacings if config.get(key)]
    if len(enabled) > 1:
        raise InputError(f"the scheduler config has both {' and '.join(enabled)}; keep only one of them")
    return spacings[enabled[0]](highest, lowest, steps) if enabled else None


def timesteps_of(sigmas: np.ndarray, training: np.ndarray) -> np.ndarray:
    """The fractional training timesteps of noise levels, interpolated linearly in log σ.

    Args:
        sigmas: ``[N]``.
        training: from :func:`training_sigmas`.
    """
    logs = np.log(training)
    targets = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(logs, targets, side="right") - 1, 0, len(logs) - 2)
    share = (logs[low] - targets) / (logs[low] - logs[low + 1])
    return np.asarray(low + np.clip(share, 0, 1))
