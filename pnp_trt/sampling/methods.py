"""Baselines besides CFG itself: sequential CFG, and CFG on a part of the timesteps.

They exist to be measured, and run on the host's loop alone; to sample with there are ``cfg``, ``unguided``, ``guided``.
"""

from __future__ import annotations

import numpy as np

from ..errors import InputError
from .loop import Callback, HostLoop
from .network import Bound, Network
from .noise_levels import Config, alphas_cumprod, training_steps
from .table import Schedule

TWO_PASSES, INTERVAL = "cfg-two-passes", "cfg-interval"
BASELINES = (TWO_PASSES, INTERVAL)
#: lowest and highest training timestep, both included, at which CFG is applied
Interval = tuple[int, int]
#: noise levels, above the first and up to the second, at which guidance helps (Kynkäänniemi et al. 2024, for SDXL)
GUIDED_SIGMAS = (0.28, 5.42)


def default_interval(scheduler: Config) -> Interval:
    """The training timesteps whose noise level is within ``GUIDED_SIGMAS``.

    Raises:
        InputError: if the scheduler's betas reach none of these levels, or are of an unknown kind.
    """
    alphas = alphas_cumprod(scheduler)
    sigmas = np.sqrt((1 - alphas) / np.maximum(alphas, 1e-12))
    found = np.flatnonzero((sigmas > GUIDED_SIGMAS[0]) & (sigmas <= GUIDED_SIGMAS[1]))
    if not len(found):
        raise InputError(
            f"no timestep of the teacher has a noise level from {GUIDED_SIGMAS[0]} to {GUIDED_SIGMAS[1]}; "
            "give guided_interval in timesteps"
        )
    return int(found[0]), int(found[-1])


def check_interval(interval: Interval, scheduler: Config) -> None:
    """Raise ``InputError`` unless ``interval`` is two training timesteps in order."""
    low, high = interval
    if not 0 <= low <= high < training_steps(scheduler):
        raise InputError(
            f"guided_interval is {low} to {high}; give the lowest and the highest timestep, "
            f"from 0 to {training_steps(scheduler) - 1}"
        )


def guided_steps(table: Schedule, interval: Interval) -> np.ndarray:
    """Which steps apply CFG, ``[steps]`` bool."""
    return np.asarray((table.timesteps >= interval[0]) & (table.timesteps <= interval[1]))


def run(
    method: str,
    unet: Network,
    table: Schedule,
    start: np.ndarray,
    w: np.ndarray,
    texts: np.ndarray,
    interval: Interval,
    callback: Callback | None = None,
) -> np.ndarray:
    """The last latents ``[N, C, H, W]`` of a baseline.

    Args:
        method: one of ``BASELINES``.
        start: the first latents, ``[N, C, H, W]``.
        w: ``[N]``.
        texts: text states ``[2N, tokens, D]``, unconditional first.
        interval: for ``cfg-interval``.

    Raises:
        InputError: for a batch that the engine was not built for.
        Cancelled: if the callback returned False.
    """
    n, size = len(start), (start.shape[-2], start.shape[-1])
    with unet.bind(n, size) as single:
        if method == TWO_PASSES:
            return _TwoPasses(single, table, start.shape, w, texts).run(start, callback)
        with unet.bind(2 * n, size) as double:
            single.write(encoder_hidden_states=texts[n:])
            double.write(encoder_hidden_states=texts)
            both = HostLoop(double, table, start.shape, w)
            return _OnInterval(single, table, start.shape, both, guided_steps(table, interval)).run(start, callback)


class _TwoPasses(HostLoop):
    """CFG with one evaluation for each text, of batch N, in place of one of batch 2N."""

    def __init__(self, unet: Bound, table: Schedule, shape: tuple[int, ...], w: np.ndarray, texts: np.ndarray) -> None:
        super().__init__(unet, table, shape)
        self._scale = np.asarray(w, np.float32)[:, None, None, None]
        self._texts = texts[: shape[0]], texts[shape[0] :]
        self._unconditional, self._combined = (np.empty(shape, np.float32) for _ in range(2))

    def _predict(self, i: int) -> np.ndarray:
        unconditional, conditional = self._texts
        self._unet.write(encoder_hidden_states=unconditional)
        np.copyto(self._unconditional, super()._predict(i))  # the second evaluation may write over it
        self._unet.write(encoder_hidden_states=conditional)
        np.subtract(super()._predict(i), self._unconditional, out=self._combined)
        np.multiply(self._scale, self._combined, out=self._combined)
        return np.add(self._unconditional, self._combined, out=self._combined)


class _OnInterval(HostLoop):
    """CFG by ``both`` in the steps that are ``guided``, one conditional evaluation in the others."""

    def __init__(
        self, unet: Bound, table: Schedule, shape: tuple[int, ...], both: HostLoop, guided: np.ndarray
    ) -> None:
        super().__init__(unet, table, shape)
        self._both = both
        self._where = guided.tolist()

    def _predict(self, i: int) -> np.ndarray:
        return self._both.predict(i, self._x) if self._where[i] else super()._predict(i)
