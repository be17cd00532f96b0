"""The table of coefficients that a sampling run is: one row a step, the same loop for every schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import InputError

#: of :meth:`Schedule.table`
COLUMNS = ("input_scale", "x_scale", "output_scale", "previous_scale", "data_x", "data_output", "older_scale")


@dataclass(frozen=True)
class Schedule:
    """Coefficients of a sampling run.  With network(x·input_scale, timestep) → output, a step is::

        data = data_x·x + data_output·output
        x ← x_scale·x + output_scale·output + previous_scale·previous + older_scale·older
        older, previous ← previous, data

    ``previous`` and ``older`` are the data predictions (of the clean latent) of the two steps before, and zero at
    first.  Schedules that look at one step alone have no need of them, and of no more buffers than x and output.

    A row is one evaluation of the network, and a step of most schedules.  Where a step is ``rows_per_step`` rows, the
    last one may have fewer, and ``[steps]`` below counts rows.

    Attributes:
        name: of the schedule, as ``--schedule`` spells it.
        timesteps: ``[steps]`` int64, never rising; the network's input.
        x_scale, output_scale, previous_scale, older_scale: ``[steps]`` float32, the update.
        data_x, data_output: ``[steps]`` float32, the data prediction.
        input_scale: ``[steps]`` float32, multiplies the latent that the network sees.
        image_scale, noise_scale: ``[steps]`` float32; their sum over a clean latent and unit noise is the latent that
            a run from that row starts with.
        init_scale: multiplies unit noise to give the first latent.
        rows_per_step: rows of a sampling step.
        part: the table from a row on, where that is not these rows with the first one's history left out.
    """

    name: str
    timesteps: np.ndarray
    x_scale: np.ndarray
    output_scale: np.ndarray
    previous_scale: np.ndarray
    data_x: np.ndarray
    data_output: np.ndarray
    input_scale: np.ndarray
    image_scale: np.ndarray
    noise_scale: np.ndarray
    older_scale: np.ndarray
    init_scale: float = 1.0
    rows_per_step: int = 1
    part: Callable[[int], Schedule] | None = None

    def __len__(self) -> int:
        """Rows, which are evaluations of the network."""
        return len(self.timesteps)

    @property
    def steps(self) -> int:
        """Sampling steps."""
        return -(-len(self) // self.rows_per_step)

    @property
    def history(self) -> int:
        """How many data predictions before its own a step uses, 0 to 2."""
        return 2 if self.older_scale.any() else 1 if self.previous_scale.any() else 0

    @property
    def multistep(self) -> bool:
        """Whether any step uses one before it."""
        return self.history > 0

    def table(self) -> np.ndarray:
        """All that changes from step to step but the timestep, ``[steps, 7]`` float32; columns as in ``COLUMNS``."""
        return np.stack([getattr(self, name) for name in COLUMNS], 1)

    @cached_property
    def rows(self) -> list[list[float]]:
        """The table as numbers of Python's own, which numpy multiplies by fastest."""
        rows: list[list[float]] = self.table().tolist()
        return rows

    def scaled(self, i: int, x: Any) -> Any:
        """The network's input at step ``i``."""
        scale = float(self.input_scale[i])
        return x if scale == 1.0 else scale * x

    def step(self, i: int, x: Any, output: Any, previous: Any = None) -> tuple[Any, Any]:
        """The latent after step ``i`` and what the next step needs; for arrays and tensors.

        That is the data prediction, or with a ``history`` of 2 a pair of it and the one before, or None.

        Args:
            x: the latent, not scaled, ``[N, C, H, W]``.
            output: the network's, of the same shape.
            previous: as the last step returned it; None at first.
        """
        after = float(self.x_scale[i]) * x + float(self.output_scale[i]) * output
        if not self.multistep:
            return after, None
        previous, older = previous if isinstance(previous, tuple) else (previous, None)
        if previous is not None:
            after = after + float(self.previous_scale[i]) * previous
        if older is not None:
            after = after + float(self.older_scale[i]) * older
        data = float(self.data_x[i]) * x + float(self.data_output[i]) * output
        return after, (data, previous) if self.history == 2 else data

    def start(self, strength: float) -> Schedule:
        """The last part of the run, for an image to begin with (image to image).

        Args:
            strength: share of the steps that are made, rounded down; 1 makes all of them.

        Raises:
            InputError: if it is not above 0 and at most 1, or leaves no step.
        """
        if not 0 < strength <= 1:  # also refuses NaN
            raise InputError(f"strength is {strength:g}; it must be above 0 and at most 1")
        steps = self.steps
        made = min(int(steps * strength), steps)
        if made == 0:
            raise InputError(
                f"strength {strength:g} of {steps} steps is less than one step; take at least "
                f"{1 / steps:.2g}, or more steps"
            )
        rows = slice((steps - made) * self.rows_per_step, None)
        if self.part is not None:
            return replace(self.part(rows.start), name=self.name)
        names = [n for n, v in vars(self).items() if isinstance(v, np.ndarray)]
        part: dict[str, Any] = {n: getattr(self, n)[rows].copy() for n in names}
        # a first step has none before it: with its own data prediction in that place, a multistep rule is first order
        for target, data in (("x_scale", "data_x"), ("output_scale", "data_output")):
            part[target][0] += part["previous_scale"][0] * part[data][0]
        part["previous_scale"][0] = 0
        return replace(self, **part)


def make_table(
    name: str, timesteps: np.ndarray, *, init_scale: float = 1.0, rows_per_step: int = 1, **columns: np.ndarray
) -> Schedule:
    """A schedule from its columns; those left out are neutral.

    Raises:
        InputError: if a coefficient is not finite, as where two steps have the same noise level.
    """
    n = len(timesteps)
    neutral = {"previous_scale": 0.0, "older_scale": 0.0, "data_x": 0.0, "data_output": 0.0, "input_scale": 1.0}
    held: dict[str, Any] = {k: np.full(n, v, np.float32) for k, v in neutral.items()}
    held |= {k: np.asarray(v, np.float32) for k, v in columns.items()}
    for key, values in held.items():
        if not np.isfinite(values).all():
            raise InputError(
                f"the {name} schedule of {n} steps has a {key} that is not finite at timestep "
                f"{timesteps[~np.isfinite(values)][0]}; take fewer steps, or another --schedule"
            )
    return Schedule(name, np.asarray(timesteps, np.int64), init_scale=init_scale, rows_per_step=rows_per_step, **held)
