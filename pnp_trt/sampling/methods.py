"""Sampling methods: how many U-Net evaluations a step takes, and on what inputs.

``cfg``, ``unguided`` and ``guided`` are for users.  The others are baselines for a guide: CFG in two evaluations, CFG
on a part of the timesteps, CFG in half the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..registry import Registry
from .loop import Callback, HostLoop, classifier_free
from .network import Bound, Network
from .noise_levels import Config, alphas_cumprod, training_steps
from .table import Schedule

#: lowest and highest training timestep, both included, at which CFG is applied
Interval = tuple[int, int]


@dataclass(frozen=True)
class HostRun:
    """A batch of N latents to sample on the host, step by step.

    Attributes:
        unet: the network.
        table: the schedule.
        start: initial latents, ``[N, C, H, W]`` float32.
        w: guidance scales, ``[N]`` float32.
        inputs: the U-Net's other inputs by name, such as text states, of N rows, or of 2N, unconditional first, if the
            method reads both texts.
        interval: timesteps with guidance, for methods with an interval.
    """

    unet: Network
    table: Schedule
    start: np.ndarray
    w: np.ndarray
    inputs: Mapping[str, np.ndarray]
    interval: Interval

    def half(self, unconditional: bool) -> dict[str, np.ndarray]:
        """The inputs of one of the two texts, N rows."""
        n = len(self.start)
        return {name: rows[:n] if unconditional else rows[n:] for name, rows in self.inputs.items()}


@dataclass(frozen=True)
class Method:
    """A sampling method.

    Attributes:
        name: used by ``--method``, the parameters of images and the results.
        label: label in tables.
        description: one clause for legends.
        colour: CSS colours on a light and on a dark page.
        marker: matplotlib marker, so that colour is never the only difference.
        batches: the U-Net evaluations of one step, each as rows of its batch per image: ``(2,)`` is one batch of two,
            ``(1, 1)`` two batches of one.
        batches_outside: the same for a step outside the interval; None for methods without an interval.
        step_divisor: the number of requested steps is divided by this, to at least one.
        guided: whether bundles with a guide run it; else bundles without one.
        uses_guidance: whether w and, on bundles without a guide, a negative prompt change the result.
        runs_as: the pipeline's method that runs it, if it differs in the number of steps only.
        images_of: the method that gives the same images, if any.
        baseline: whether it exists for comparison only and is not offered by default.
        sample: returns the last latents ``[N, C, H, W]`` of a run on the host; None for the plain loop, which devices
            run as well.
    """

    name: str
    label: str
    description: str
    colour: tuple[str, str]
    marker: str = "P"
    batches: tuple[int, ...] = (1,)
    batches_outside: tuple[int, ...] | None = None
    step_divisor: int = 1
    guided: bool = False
    uses_guidance: bool = True
    runs_as: str | None = None
    images_of: str | None = None
    baseline: bool = False
    sample: Callable[[HostRun, Callback | None], np.ndarray] | None = None

    @property
    def has_interval(self) -> bool:
        """Whether guidance is applied at a part of the timesteps only."""
        return self.batches_outside is not None

    @property
    def reads_both_texts(self) -> bool:
        """Whether it reads the unconditional text states as well as the conditional ones."""
        return sum(self.batches) > 1

    @property
    def of_pipeline(self) -> str:
        """Name of the pipeline's method that runs it."""
        return self.runs_as or self.name

    def steps(self, steps: int) -> int:
        """Number of steps that are run if ``steps`` are requested."""
        return max(1, steps // self.step_divisor)

    def calls(self, steps: int, inside: int | None = None) -> list[tuple[int, int]]:
        """The U-Net's calls in ``steps`` actual steps, as (calls, rows of the batch per image).

        Args:
            inside: number of steps inside the interval, for methods with one; None for all.
        """
        if self.batches_outside is None or inside is None:
            inside = steps
        parts = ((inside, self.batches), (steps - inside, self.batches_outside or ()))
        counts: dict[tuple[int, int], int] = {}
        for part, (number, batches) in enumerate(parts):
            for rows in batches:
                counts[part, rows] = counts.get((part, rows), 0) + number
        return [(count, rows) for (_, rows), count in counts.items()]

    def evaluations(self, steps: int, inside: int | None = None) -> int:
        """U-Net evaluations of one image in ``steps`` actual steps; arguments as for :meth:`calls`."""
        return sum(count * rows for count, rows in self.calls(steps, inside))


#: methods by name, in the order of reports
METHODS: Registry[Method] = Registry("methods", "method")


#: noise levels, above the first and up to the second, at which guidance helps (Kynkäänniemi et al. 2024, for SDXL)
GUIDED_SIGMAS = (0.28, 5.42)


def default_interval(scheduler: Config) -> Interval:
    """The training timesteps whose noise level is within ``GUIDED_SIGMAS``.

    Raises:
        InputError: if the scheduler's betas reach none of these levels, or are of an unknown kind.
    """
    alphas = alphas_cumprod(scheduler)
    sigmas = np.sqrt((1 - alphas) / np.maximum(alphas, 1e-12))
    timesteps = np.flatnonzero((sigmas > GUIDED_SIGMAS[0]) & (sigmas <= GUIDED_SIGMAS[1]))
    if not len(timesteps):
        raise InputError(
            f"no timestep of the teacher has a noise level from {GUIDED_SIGMAS[0]} to {GUIDED_SIGMAS[1]}; "
            "give guided_interval in timesteps"
        )
    return int(timesteps[0]), int(timesteps[-1])


def check_interval(interval: Interval, scheduler: Config) -> None:
    """Raise ``InputError`` unless ``interval`` is two training timesteps in order."""
    low, high = interval
    if not 0 <= low <= high < training_steps(scheduler):
        raise InputError(
            f"guided_interval is {low} to {high}; give the lowest and the highest timestep, "
            f"from 0 to {training_steps(scheduler) - 1}"
        )


def guided_steps(table: Schedule, interval: Interval) -> np.ndarray:
    """Whether each step applies CFG, ``[steps]`` bool."""
    return np.asarray((table.timesteps >= interval[0]) & (table.timesteps <= interval[1]))


def _sequential_cfg(run: HostRun, callback: Callback | None) -> np.ndarray:
    n, size = len(run.start), (run.start.shape[-2], run.start.shape[-1])
    with run.unet.bind(n, size) as single:
        return _SequentialCFG(single, run).run(run.start, callback)


def _on_interval(run: HostRun, callback: Callback | None) -> np.ndarray:
    n, size = len(run.start), (run.start.shape[-2], run.start.shape[-1])
    with run.unet.bind(n, size) as single, run.unet.bind(2 * n, size) as double:
        single.write(**run.half(unconditional=False))
        double.write(**run.inputs)
        both = HostLoop(double, run.table, run.start.shape, run.w)
        guided = guided_steps(run.table, run.interval)
        return _OnInterval(single, run.table, run.start.shape, both, guided).run(run.start, callback)


class _SequentialCFG(HostLoop):
    """CFG with one evaluation of batch N for each text, instead of one of batch 2N."""

    def __init__(self, unet: Bound, run: HostRun) -> None:
        shape = run.start.shape
        super().__init__(unet, run.table, shape)
        self._scale = np.asarray(run.w, np.float32)[:, None, None, None]
        self._texts = run.half(unconditional=True), run.half(unconditional=False)
        self._unconditional, self._combined = (np.empty(shape, np.float32) for _ in range(2))

    def _predict(self, i: int) -> np.ndarray:
        unconditional, conditional = self._texts
        self._unet.write(**unconditional)
        np.copyto(self._unconditional, super()._predict(i))  # the second evaluation may overwrite it
        self._unet.write(**conditional)
        return classifier_free(self._unconditional, super()._predict(i), self._scale, self._combined)


class _OnInterval(HostLoop):
    """CFG by ``both`` in the steps where ``guided`` is set, one conditional evaluation in the others."""

    def __init__(
        self, unet: Bound, table: Schedule, shape: tuple[int, ...], both: HostLoop, guided: np.ndarray
    ) -> None:
        super().__init__(unet, table, shape)
        self._both = both
        self._where = guided.tolist()

    def _predict(self, i: int) -> np.ndarray:
        return self._both.predict(i, self._x) if self._where[i] else super()._predict(i)


def _add(method: Method) -> Method:
    """Register a method under its own name."""
    return METHODS.register(method.name, method)


_CFG_COLOUR = ("#c2570c", "#f0954a")
CFG = _add(
    Method(
        "cfg", "teacher, CFG", "the teacher's classifier-free guidance, one batch of two per step",
        _CFG_COLOUR, "o", batches=(2,),
    )
)  # fmt: skip
SEQUENTIAL_CFG = _add(
    Method(
        "cfg-two-passes", "teacher, sequential CFG", "the same as two evaluations, one after the other",
        _CFG_COLOUR, batches=(1, 1), images_of="cfg", baseline=True, sample=_sequential_cfg,
    )
)  # fmt: skip
INTERVAL = _add(
    Method(
        "cfg-interval", "teacher, CFG on an interval", "CFG in a part of the timesteps, one evaluation in the others",
        ("#0d7d6c", "#41c2ab"), "D", batches=(2,), batches_outside=(1,), baseline=True, sample=_on_interval,
    )
)  # fmt: skip
FEWER_STEPS = _add(
    Method(
        "cfg-fewer-steps", "teacher, CFG, half the steps",
        "CFG in half the steps: as many model evaluations as the guide",
        ("#9a7b00", "#d6b53c"), "v", batches=(2,), step_divisor=2, runs_as="cfg", baseline=True,
    )
)  # fmt: skip
GUIDED = _add(
    Method(
        "guided", "teacher + guide", "teacher and guide, one evaluation per step",
        ("#0f6fb8", "#58aef0"), "s", guided=True,
    )
)  # fmt: skip
UNGUIDED = _add(
    Method(
        "unguided", "teacher, no guidance", "the teacher's plain prediction, one evaluation per step",
        ("#8a8d96", "#8f939e"), "^", uses_guidance=False,
    )
)  # fmt: skip


def methods_of(guided: bool, on_host: bool = True) -> tuple[str, ...]:
    """Methods of bundles with a guide, or without, by name; the first is the default.

    Args:
        on_host: whether the host runs the loop, which methods with their own loop need.
    """
    methods = [m for m in METHODS.values() if m.guided == guided and not m.baseline and m.runs_as is None]
    return tuple(m.name for m in methods if on_host or m.sample is None)


def baselines_of(guided: bool) -> tuple[str, ...]:
    """Names of the baselines that the host's loop runs on bundles with a guide, or without."""
    return tuple(m.name for m in METHODS.values() if m.guided == guided and m.baseline and m.runs_as is None)


def step_methods_of(guided: bool) -> tuple[str, ...]:
    """Methods that a step-level loop runs on bundles with a guide, or without, by name; the first is the default.

    A guide adds nothing at w = 1, so a bundle with a guide gives plain predictions as well.
    """
    plain = [m for m in METHODS.values() if not m.guided and not m.baseline and m.runs_as is None and m.sample is None]
    return methods_of(guided, on_host=False) + (tuple(m.name for m in plain) if guided else ())


def uses_guidance(method: str) -> bool:
    """Whether w changes a method's result; unregistered methods, such as other toolkits', count as using it."""
    return METHODS.get(method).uses_guidance if method in METHODS else True
