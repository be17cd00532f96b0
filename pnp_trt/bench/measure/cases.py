"""Timed cases: a method on a pipeline, its network calls, and the protocol that timed pipelines implement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...sampling.methods import CFG, METHODS, Method


class TimedPipeline(Protocol):
    """A text-to-image pipeline on one engine. Every call returns when its result is on the host.

    A pipeline may also have `base` (identifies the teacher's weights; pipelines with different bases are not compared),
    `baselines` (methods beyond `methods`), and, if it runs `cfg-interval`, `guided_interval()` and
    `schedule(steps, name)`, which returns an object with `timesteps`.
    """

    @property
    def name(self) -> str:
        """The engine's name, as in the report."""

    @property
    def methods(self) -> tuple[str, ...]:
        """Which of 'cfg', 'unguided' and 'guided' this engine can run; a peer has its own method."""

    def encode(self, prompts: list[str]) -> Any:
        """Encode N prompts; the result is the `context` of `denoise`."""

    def noise(self, seeds: list[int], size: tuple[int, int] | None = None) -> np.ndarray:
        """Return starting latents, [N, C, h, w] float32, one image per seed; `size` in pixels, None for the default."""

    def denoise(
        self,
        context: Any,
        noise: np.ndarray,
        *,
        steps: int,
        guidance: np.ndarray | float,
        method: str,
        schedule: str | None = None,
    ) -> np.ndarray:
        """Run the whole loop and return the final latents, [N, C, h, w]."""

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Return images, [N, H, W, 3] uint8."""


@dataclass(frozen=True)
class Case:
    """A method to time on a pipeline."""

    pipe: TimedPipeline
    method: str

    @property
    def label(self) -> str:
        return f"{self.pipe.name}/{self.method}"

    @property
    def kind(self) -> Method:
        """The method; a peer's own method is CFG in another toolkit."""
        return METHODS.get(self.method) if self.method in METHODS else CFG

    @property
    def _of_pipeline(self) -> str:
        """The pipeline's name for the method."""
        return self.kind.of_pipeline if self.method in METHODS else self.method

    @property
    def possible(self) -> bool:
        """Whether the pipeline can run the method."""
        return self._of_pipeline in (*self.pipe.methods, *getattr(self.pipe, "baselines", ()))

    def steps(self, steps: int) -> int:
        """Return the steps that run if `steps` are requested: for `cfg-fewer-steps` half of them, at least one."""
        return self.kind.steps(steps)

    @property
    def interval(self) -> tuple[int, int] | None:
        """Lowest and highest timestep with CFG; None for methods without an interval."""
        pipe: Any = self.pipe
        return pipe.guided_interval() if self.kind.has_interval else None

    def calls(self, steps: int, schedule: str | None = None) -> list[tuple[int, int]]:
        """Return the network calls of a loop of `steps`, as (calls, rows of the batch per image)."""
        steps_run, inside = self.steps(steps), None
        pipe: Any = self.pipe
        rows = pipe.evaluations(steps_run, schedule) if hasattr(pipe, "evaluations") else steps_run
        if self.interval is not None:
            low, high = self.interval
            inside = sum(low <= t <= high for t in pipe.schedule(steps_run, schedule).timesteps.tolist())
        return self.kind.calls(rows, inside)

    def evaluations(self, steps: int, schedule: str | None = None) -> int:
        """Return the U-Net evaluations per image if `steps` are requested."""
        return sum(count * rows for count, rows in self.calls(steps, schedule))

    def denoise(
        self, context: Any, noise: np.ndarray, *, steps: int, guidance: float, schedule: str | None
    ) -> np.ndarray:
        """Run the loop and return its latents, [N, C, h, w]; `steps` as requested."""
        options: dict[str, Any] = {} if schedule is None else {"schedule": schedule}
        return self.pipe.denoise(
            context, noise, steps=self.steps(steps), guidance=guidance, method=self._of_pipeline, **options
        )


def cases_of(pipes: Sequence[TimedPipeline]) -> list[Case]:
    """Return every method of every pipeline, including baselines, in the order of `METHODS`; peers' methods last."""
    cases = (Case(p, method) for p in pipes for method in (*METHODS, *(m for m in p.methods if m not in METHODS)))
    return [case for case in cases if case.possible]
