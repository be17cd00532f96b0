"""Sampling schedules as tables of coefficients: one row a step, x ← x_scale·x + output_scale·output.

With ε- or v-prediction a DDIM step (Song et al. 2021, eq. 12, η = 0) is linear in the latent and the
network's output, so the sampler is the same loop for every schedule and the schedule is data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError


@dataclass(frozen=True)
class Schedule:
    """Coefficients of a sampling run.

    Attributes:
        timesteps: ``[steps]`` int64, descending; what the network is told.
        x_scale: ``[steps]`` float32, multiplies the latent.
        output_scale: ``[steps]`` float32, multiplies the network's output.
        init_scale: multiplies unit noise to give the first latent.
    """

    timesteps: np.ndarray
    x_scale: np.ndarray
    output_scale: np.ndarray
    init_scale: float = 1.0

    def __len__(self) -> int:
        return len(self.timesteps)


def alphas_cumprod(config: dict[str, Any]) -> np.ndarray:
    """ᾱ_t, ``[num_train_timesteps]`` float64, of a diffusers scheduler config.

    Raises:
        InputError: for a beta schedule that is not known.
    """
    n = config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    kind = config.get("beta_schedule", "linear")
    # diffusers makes its betas in float32; the same rounding here keeps both samplers equal to 1e-6
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float32)
    elif kind == "linear":
        betas = np.linspace(start, end, n, dtype=np.float32)
    elif kind == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, n, dtype=np.float32) ** 2
    else:
        raise InputError(f"the teacher's beta_schedule is '{kind}'; known: linear, scaled_linear, trained_betas")
    return np.cumprod(1.0 - betas.astype(np.float32)).astype(np.float64)


def spaced_timesteps(config: dict[str, Any], steps: int) -> np.ndarray:
    """``[steps]`` int64, descending, by the config's ``timestep_spacing``."""
    n = config.get("num_train_timesteps", 1000)
    spacing = config.get("timestep_spacing", "leading")
    if spacing == "leading":
        return (np.arange(steps) * (n // steps)).round()[::-1].astype(np.int64) + config.get("steps_offset", 0)
    if spacing == "trailing":
        return np.round(np.arange(n, 0, -n / steps)).astype(np.int64) - 1
    if spacing == "linspace":
        return np.linspace(0, n - 1, steps).round()[::-1].astype(np.int64)
    raise InputError(f"timestep_spacing is '{spacing}'; known: leading, trailing, linspace")


def ddim(config: dict[str, Any], steps: int) -> Schedule:
    """Deterministic DDIM for a teacher's scheduler config.

    Raises:
        InputError: if ``steps`` is outside 1 … num_train_timesteps or the prediction type is unknown.
    """
    n = config.get("num_train_timesteps", 1000)
    if not 1 <= steps <= n:
        raise InputError(f"steps is {steps}; it must be between 1 and {n}")
    t = spaced_timesteps(config, steps)
    x_scale, output_scale = ddim_coefficients(config, t, t - n // steps)
    return Schedule(t, x_scale.astype(np.float32), output_scale.astype(np.float32))


def ddim_coefficients(
    config: dict[str, Any], timesteps: np.ndarray, after: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """``(x_scale, output_scale)`` of DDIM steps from ``timesteps`` to ``after``, int64 ``[N]``; below 0 is the end.

    Raises:
        InputError: if the prediction type is unknown.
    """
    abar = alphas_cumprod(config)
    final = 1.0 if config.get("set_alpha_to_one", True) else abar[0]
    a = abar[timesteps]
    p = np.where(after >= 0, abar[np.maximum(after, 0)], final)
    kind = config.get("prediction_type", "epsilon")
    if kind == "epsilon":
        return np.sqrt(p / a), np.sqrt(1 - p) - np.sqrt(p / a) * np.sqrt(1 - a)
    if kind == "v_prediction":
        return np.sqrt(p * a) + np.sqrt((1 - p) * (1 - a)), np.sqrt((1 - p) * a) - np.sqrt(p * (1 - a))
    raise InputError(f"prediction_type is '{kind}'; known: epsilon, v_prediction")


def ddim_step(config: dict[str, Any], timestep: int, after: int) -> tuple[float, float]:
    """The coefficients of a single DDIM step; see :func:`ddim_coefficients`."""
    x_scale, output_scale = ddim_coefficients(config, np.array([timestep]), np.array([after]))
    return float(x_scale[0]), float(output_scale[0])
