"""Estimate of a run's duration: from a short trial of every method at first, then from the measured pace."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...io.progress import Progress
from .cases import Case

#: batch size of the trial's larger batch, and its number of timed steps
_TRIAL_BATCH, _TRIAL_STEPS = 4, 2
#: weight of the estimate in the measured pace, as a share of the estimated total
_TRUST = 0.05


@dataclass(frozen=True)
class Pace:
    """Time of one step of a method: ``fixed + each · images`` seconds."""

    fixed: float
    each: float

    def seconds(self, images: int, steps: int) -> float:
        """Estimate the time of a loop over ``steps`` for a batch of ``images``."""
        return steps * (self.fixed + self.each * images)


def trial(
    case: Case, prompts: Sequence[str], guidance: float, largest: int, clock: Callable[[], float] = time.perf_counter
) -> Pace:
    """Measure the pace of a case from two steps at batch 1 and at batch 4 (or ``largest``), each after a warm-up."""
    step_s: dict[int, float] = {}
    for batch in (1, min(_TRIAL_BATCH, largest)):
        texts = [prompts[i % len(prompts)] for i in range(batch)]
        context, noise = case.pipe.encode(texts), case.pipe.noise(list(range(batch)))

        def loop(steps: int, context: Any = context, noise: np.ndarray = noise) -> float:
            start = clock()
            case.denoise(context, noise, steps=steps, guidance=guidance, schedule=None)
            return clock() - start

        loop(1)
        step_s[batch] = loop(_TRIAL_STEPS) / _TRIAL_STEPS
    if len(step_s) == 1:
        return Pace(0.0, step_s[1])
    (small, low), (large, high) = step_s.items()
    each = max((high - low) / (large - small), 0.0)
    return Pace(max(low - small * each, 0.0), each)


class ProgressMeter:
    """Progress of a run in seconds of its estimate; the time left follows the measured pace.

    Args:
        jobs: estimated seconds by name of the job, in order.
        report: called when a job begins, progresses or ends.
    """

    def __init__(
        self, jobs: dict[str, float], report: Progress | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._jobs, self._report, self._clock = jobs, report or (lambda text, done, total: None), clock
        self._done, self._start = 0.0, clock()
        self._skipped = 0.0
        self._job, self._text = "", ""

    @property
    def total(self) -> float:
        """Estimated seconds of all jobs."""
        return sum(self._jobs.values())

    @property
    def left(self) -> float:
        """Estimated seconds of the remaining jobs at the pace so far."""
        rest, worked = self.total - self._done, self._done - self._skipped
        elapsed = self._clock() - self._start
        # the first jobs are short and not representative: count as if part of the run had matched the estimate
        trust = _TRUST * self.total
        return rest * (elapsed + trust) / (worked + trust) if rest else 0.0

    def begin(self, job: str, text: str) -> None:
        """Report that a job begins."""
        self._job, self._text = job, f"{text} ({about(self.left)} left)"
        self._report(self._text, round(self._done), round(self.total))

    def within(self, done: int, total: int) -> None:
        """Report progress within the current job."""
        part = self._jobs[self._job] * done / max(total, 1)
        self._report(self._text, round(self._done + part), round(self.total))

    def end(self, job: str, *, resumed: bool = False) -> None:
        """Report that a job is finished; ``resumed`` jobs, done by an earlier process, do not affect the pace."""
        self._done += self._jobs[job]
        self._skipped += self._jobs[job] if resumed else 0.0
        self._report(self._text, round(self._done), round(self.total))


def about(seconds: float) -> str:
    """Format a duration: ``about 40 s``, ``about 12 min``, ``about 3.5 h``."""
    if seconds < 90:
        return f"about {max(round(seconds), 1)} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
