"""The sampling loop on the host: buffers made once a run, every step written in place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import Cancelled
from .network import Bound
from .table import Schedule

#: called with (steps done, steps in all); False stops the work
Callback = Callable[[int, int], object]


class Trajectory:
    """Latents from their first value to their last, by a schedule's rows: every step is written in place.

    The updates are those of :meth:`Schedule.step`, product by product and sum by sum, so that both give the same bits;
    but nothing is allocated in a step.

    Args:
        table: the schedule.
        shape: of the latents, ``[…]``.
        x: memory to hold the latents in, float32 of ``shape``; None takes new memory.
    """

    def __init__(self, table: Schedule, shape: tuple[int, ...], x: np.ndarray | None = None) -> None:
        self.table = table
        self.x = np.empty(shape, np.float32) if x is None else x
        self._scratch = np.empty(shape, np.float32)
        # this step's data prediction and those before; they change places
        history = table.history
        self._data, self._previous = (np.empty(shape, np.float32) if history else None for _ in range(2))
        self._older = np.empty(shape, np.float32) if history == 2 else None
        # between two runs of a network everything is out of the caches, so that each Python object touched costs
        self._rows = table.rows

    @property
    def data(self) -> np.ndarray | None:
        """The clean latents that the last step predicted; None where no step needs those of the one before."""
        return self._previous

    def show(self, i: int, out: np.ndarray) -> None:
        """Write the network's input of step ``i``."""
        np.multiply(self.x, self._rows[i][0], out=out)

    def update(self, i: int, output: np.ndarray) -> None:
        """The update of step ``i``, in place; ``output`` is left as it is."""
        _, x_scale, output_scale, previous_scale, data_x, data_output, older_scale = self._rows[i]
        x, scratch = self.x, self._scratch
        if self._data is not None:
            np.multiply(x, data_x, out=self._data)
            np.multiply(output, data_output, out=scratch)
            np.add(self._data, scratch, out=self._data)
        np.multiply(x, x_scale, out=x)
        np.multiply(output, output_scale, out=scratch)
        np.add(x, scratch, out=x)
        if self._data is not None and self._previous is not None:
            if i > 0:
                np.multiply(self._previous, previous_scale, out=scratch)
                np.add(x, scratch, out=x)
            if self._older is None:
                self._data, self._previous = self._previous, self._data
                return
            if i > 1:
                np.multiply(self._older, older_scale, out=scratch)
                np.add(x, scratch, out=x)
            self._data, self._previous, self._older = self._older, self._data, self._previous


def classifier_free(
    unconditional: np.ndarray, conditional: np.ndarray, w: np.ndarray | float, out: np.ndarray
) -> np.ndarray:
    """CFG's prediction, u + w·(c − u), written to ``out``; the inputs are left as they are."""
    np.subtract(conditional, unconditional, out=out)
    np.multiply(w, out, out=out)
    return np.add(unconditional, out, out=out)


class HostLoop:
    """All steps of a run on a network whose other inputs are written already.

    Nothing is allocated in a step, and where the network reads the host's memory, its input is written in place.

    Args:
        unet: bound to the batch, or to twice the batch for CFG.
        table: the schedule.
        shape: of the latents, ``[N, C, H, W]``.
        w: ``[N]`` for CFG, whose network sees every latent twice, unconditional first (Ho & Salimans 2022, one batch
            of two); None where one evaluation is made.
    """

    def __init__(self, unet: Bound, table: Schedule, shape: tuple[int, ...], w: np.ndarray | None = None) -> None:
        self.table = table
        self._unet = unet
        self._w: np.ndarray | float = 1.0 if w is None else np.asarray(w, np.float32)[:, None, None, None]
        evaluations = 1 if w is None else 2
        self._guided = None if w is None else np.empty(shape, np.float32)
        self._shown = _buffer(unet, "sample", (evaluations * shape[0], *shape[1:]), np.float32)
        # what is shown unscaled and once is the latent itself, in the network's own memory
        self._same = evaluations == 1 and bool((table.input_scale == 1).all())
        self._trajectory = Trajectory(table, shape, self._shown if self._same else None)
        self._x = self._trajectory.x
        self._halves = [self._shown[: shape[0]], self._shown[shape[0] :]][:evaluations]
        self._timestep = _buffer(unet, "timestep", (evaluations * shape[0],), np.int64)
        # what the network does not read where it is written
        wanted = {"sample": self._shown, "timestep": self._timestep}
        self._copied = {name: held for name, held in wanted.items() if unet.host_input(name) is not held}

    def run(self, start: np.ndarray, callback: Callback | None = None) -> np.ndarray:
        """The last latents ``[N, C, H, W]`` float32; a new array.

        Args:
            start: the first latents; they are not written to.
            callback: called after each step.

        Raises:
            Cancelled: if the callback returned False.
        """
        np.copyto(self._x, start)
        steps = len(self.table)
        for i in range(steps):
            self._trajectory.update(i, self._predict(i))
            if callback is not None and callback(i + 1, steps) is False:
                raise Cancelled(f"sampling was cancelled after {i + 1} of {steps} steps")
        return self._x.copy()

    def predict(self, i: int, x: np.ndarray) -> np.ndarray:
        """The network's output for other latents at step ``i``; it may change with the next run."""
        np.copyto(self._x, x)
        return self._predict(i)

    def _predict(self, i: int) -> np.ndarray:
        """The network's output for the latents at step ``i``."""
        if not self._same:
            for half in self._halves:
                self._trajectory.show(i, half)
        self._timestep.fill(self.table.timesteps[i])
        if self._copied:
            self._unet.write(**self._copied)
        self._unet.run()
        output = self._unet.output()
        if self._guided is None:
            return output
        unconditional, conditional = np.split(output, 2)
        return classifier_free(unconditional, conditional, self._w, self._guided)


def _buffer(unet: Bound, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """The network's own memory for an input where the host may write it, else memory to copy from."""
    held = unet.host_input(name)
    return held if held is not None and held.shape == shape and held.dtype == dtype else np.empty(shape, dtype)
