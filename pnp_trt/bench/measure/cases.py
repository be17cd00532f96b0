"""What is timed: a method on a pipeline, how often it calls the network, and what a pipeline must offer for that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...sampling.methods import CFG, METHODS, Method


class TimedPipeline(Protocol):
    """What is timed: a text-to-image pipeline on one engine. Every call returns when its result is on the host.

    A pipeline may further have `base` (what identifies the teacher's weights; pipelines of different bases are not
    compared), `baselines` (methods beyond `methods`), and, where it runs `cfg-interval`, `schedule(steps, name)` with
    `timesteps` and `guided_interval()`.
    """

    @property
    def name(self) -> str:
        """The engine's name, as in the report."""

    @property
    def methods(self) -> tuple[str, ...]:
        """Which of 'cfg', 'unguided' and 'guided' this engine can run; a peer's own method for a peer."""

    def encode(self, prompts: list[str]) -> Any:
        """Text encodings of N prompts, as `denoise` takes them."""

    def noise(self, seeds: list[int], size: tuple[int, int] | None = None) -> np.ndarray:
        """Starting latents, [N, C, h, w] float32, one image a seed; of `size` in pixels, None for the default."""

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
        """Final latents after the whole loop, [N, C, h, w]."""

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images, [N, H, W, 3] uint8."""


@dataclass(frozen=True)
class Case:
    """One thing to time: a method on a pipeline."""

    pipe: TimedPipeline
    method: str

    @property
    def label(self) -> str:
        return f"{self.pipe.name}/{self.method}"

    @property
    def kind(self) -> Method:
        """The method; a peer's own is CFG in another toolkit."""
        return METHODS.get(self.method) if self.method in METHODS else CFG

    @property
    def _of_pipeline(self) -> str:
        """The method as the pipeline knows it."""
        return self.kind.of_pipeline if self.method in METHODS else self.method

    @property
    def possible(self) -> bool:
        """Whether the pipeline can run it."""
        return self._of_pipeline in (*self.pipe.methods, *getattr(self.pipe, "baselines", ()))

    def steps(self, steps: int) -> int:
        """The steps that it makes where `steps` are requested: half, at least one, for CFG at a guide's compute."""
        return self.kind.steps(steps)

    @property
    def interval(self) -> tuple[int, int] | None:
        """Lowest and highest timestep with CFG; None for methods without an interval."""
        pipe: Any = self.pipe
        return pipe.guided_interval() if self.kind.has_interval else None

    def calls(self, steps: int, schedule: str | None = None) -> list[tuple[int, int]]:
        """How a loop of `steps` calls the network, as (calls, rows of the batch an image)."""
        made, inside = self.steps(steps), None
        pipe: Any = self.pipe
        rows = pipe.evaluations(made, schedule) if hasattr(pipe, "evaluations") else made
        if self.interval is not None:
            low, high = self.interval
            inside = sum(low <= t <= high for t in pipe.schedule(made, schedule).timesteps.tolist())
        return self.kind.calls(rows, inside)

    def evaluations(self, steps: int, schedule: str | None = None) -> int:
        """U-Net evaluations per image where `steps` are requested."""
        return sum(count * rows for count, rows in self.calls(steps, schedule))

    def denoise(
        self, context: Any, noise: np.ndarray, *, steps: int, guidance: float, schedule: str | None
    ) -> np.ndarray:
        """The loop of this case, [N, C, h, w]; `steps` as requested."""
        more: dict[str, Any] = {} if schedule is None else {"schedule": schedule}
        return self.pipe.denoise(
            context, noise, steps=self.steps(steps), guidance=guidance, method=self._of_pipeline, **more
        )


def cases_of(pipes: Sequence[TimedPipeline]) -> list[Case]:
    """Every method of every pipeline, baselines too, in the order of `METHODS`; a peer's own method last."""
    cases = (Case(p, method) for p in pipes for method in (*METHODS, *(m for m in p.methods if m not in METHODS)))
    return [case for case in cases if case.possible]
