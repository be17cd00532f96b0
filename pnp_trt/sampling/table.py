"""The table of coefficients of a sampling run: one row per step, and the same loop for every schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import InputError

#: columns of :meth:`Schedule.table`
COLUMNS = ("input_scale", "x_scale", "output_scale", "previous_scale", "data_x", "data_output", "older_scale")


@dataclass(frozen=True)
class Schedule:
    """Coefficients of a sampling run.  With network(x·input_scale, timestep) → output, a step is::

        data = data_x·x + data_output·output
        x ← x_scale·x + output_scale·output + previous_scale·previous + older_scale·older
        older, previous ← previous, data

    ``previous`` and ``older`` are the data predictions (of the clean latent) of the two previous steps, initially zero.
    Single-step schedules do not use them and need no buffers besides x and output.

    A row is one evaluation of the network, and one step of most schedules.  If a step has ``rows_per_step`` rows, the
    last step may have fewer, and ``[steps]`` below counts rows.

    Attributes:
        name: name of the schedule, as in ``--schedule``.
        timesteps: ``[steps]`` int64, never rising; the network's input.
        x_scale, output_scale, previous_scale, older_scale: ``[steps]`` float32, the update.
        data_x, data_output: ``[steps]`` float32, the data prediction.
        input_scale: ``[steps]`` float32, multiplies the latent for the network's input.
        image_scale, noise_scale: ``[steps]`` float32; a run that starts at a row starts from
            image_scale·(clean latent) + noise_scale·(unit noise).
        init_scale: multiplies unit noise to give the initial latent.
        rows_per_step: rows of a sampling step.
        part: returns the table from a row on; None if that is these rows without the first one's history.
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
        """Number of rows, which is the number of model evaluations."""
        return len(self.timesteps)

    @property
    def steps(self) -> int:
        """Number of sampling steps."""
        return -(-len(self) // self.rows_per_step)

    @property
    def history(self) -> int:
        """Number of earlier data predictions that a step uses, 0 to 2."""
        return 2 if self.older_scale.any() else 1 if self.previous_scale.any() else 0

    @property
    def multistep(self) -> bool:
        """Whether any step uses an earlier data prediction."""
        return self.history > 0

    def table(self) -> np.ndarray:
        """All coefficients of the steps, ``[steps, 7]`` float32, without the timesteps; columns as in ``COLUMNS``."""
        return np.stack([getattr(self, name) for name in COLUMNS], 1)

    @cached_property
    def rows(self) -> list[list[float]]:
        """The table as Python numbers, which are the fastest operands for numpy."""
        rows: list[list[float]] = self.table().tolist()
        return rows

    def scaled(self, i: int, x: Any) -> Any:
        """The network's input at step ``i``."""
        scale = float(self.input_scale[i])
        return x if scale == 1.0 else scale * x

    def step(self, i: int, x: Any, output: Any, previous: Any = None) -> tuple[Any, Any]:
        """The latent after step ``i``, and the history for the next step; for arrays and tensors.

        The history is None, the data prediction, or with a ``history`` of 2 a pair of it and the one before.

        Args:
            x: the unscaled latent, ``[N, C, H, W]``.
            output: the network's output, of the same shape.
            previous: the history from the last step; None at first.
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
        """The last part of the run, for image to image.

        Args:
            strength: share of the steps that are run, rounded down; 1 runs all of them.

        Raises:
            InputError: if it is not above 0 and at most 1, or leaves no step.
        """
        if not 0 < strength <= 1:  # also refuses NaN
            raise InputError(f"strength is {strength:g}; it must be above 0 and at most 1")
        steps = self.steps
        run_steps = min(int(steps * strength), steps)
        if run_steps == 0:
            raise InputError(
                f"strength {strength:g} of {steps} steps is less than one step; take at least "
                f"{1 / steps:.2g}, or more steps"
            )
        rows = slice((steps - run_steps) * self.rows_per_step, None)
        if self.part is not None:
            return replace(self.part(rows.start), name=self.name)
        names = [n for n, v in vars(self).items() if isinstance(v, np.ndarray)]
        part: dict[str, Any] = {n: getattr(self, n)[rows].copy() for n in names}
        # the first step has no predecessor: with its own data prediction instead, a multistep rule becomes first order
        for target, data in (("x_scale", "data_x"), ("output_scale", "data_output")):
            part[target][0] += part["previous_scale"][0] * part[data][0]
        part["previous_scale"][0] = 0
        return replace(self, **part)


def make_table(
    name: str, timesteps: np.ndarray, *, init_scale: float = 1.0, rows_per_step: int = 1, **columns: np.ndarray
) -> Schedule:
    """A schedule from its columns; omitted columns are neutral.

    Raises:
        InputError: if a coefficient is not finite, for example because two steps have the same noise level.
    """
    n = len(timesteps)
    neutral = {"previous_scale": 0.0, "older_scale": 0.0, "data_x": 0.0, "data_output": 0.0, "input_scale": 1.0}
    filled: dict[str, Any] = {k: np.full(n, v, np.float32) for k, v in neutral.items()}
    filled |= {k: np.asarray(v, np.float32) for k, v in columns.items()}
    for key, values in filled.items():
        if not np.isfinite(values).all():
            raise InputError(
                f"the {name} schedule of {n} steps has a {key} that is not finite at timestep "
                f"{timesteps[~np.isfinite(values)][0]}; take fewer steps, or another --schedule"
            )
    return Schedule(name, np.asarray(timesteps, np.int64), init_scale=init_scale, rows_per_step=rows_per_step, **filled)
