"""The sampling loop on the host: buffers are allocated once per run, and every step is computed in place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import Cancelled
from .network import Bound
from .table import Schedule

#: called with (steps done, steps); returning False cancels the run
Callback = Callable[[int, int], object]


class Trajectory:
    """Latents and their update by a schedule's rows, in place and without allocation.

    The updates are those of :meth:`Schedule.step`, operation by operation, so that both give the same bits.

    Args:
        table: the schedule.
        shape: shape of the latents, ``[…]``.
        x: memory for the latents, float32 of ``shape``; None allocates it.
    """

    def __init__(self, table: Schedule, shape: tuple[int, ...], x: np.ndarray | None = None) -> None:
        self.table = table
        self.x = np.empty(shape, np.float32) if x is None else x
        self._scratch = np.empty(shape, np.float32)
        # data predictions of this step and of those before, which are swapped after each step
        history = table.history
        self._data, self._previous = (np.empty(shape, np.float32) if history else None for _ in range(2))
        self._older = np.empty(shape, np.float32) if history == 2 else None
        # cached as an attribute: after a network's run, every access to a Python object misses the CPU's caches
        self._rows = table.rows

    @property
    def data(self) -> np.ndarray | None:
        """The last step's prediction of the clean latents; None if no step uses an earlier prediction."""
        return self._previous

    def show(self, i: int, out: np.ndarray) -> None:
        """Write the network's input for step ``i``."""
        np.multiply(self.x, self._rows[i][0], out=out)

    def update(self, i: int, output: np.ndarray) -> None:
        """Update the latents by step ``i`` in place; ``output`` is not changed."""
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
    """CFG's prediction, u + w·(c − u), written to ``out``; the inputs are not changed."""
    np.subtract(conditional, unconditional, out=out)
    np.multiply(w, out, out=out)
    return np.add(unconditional, out, out=out)


class HostLoop:
    """All steps of a run on a network whose other inputs are already written.

    A step allocates nothing, and if the network reads host memory, its input is written in place.

    Args:
        unet: bound to the batch, or to twice the batch for CFG.
        table: the schedule.
        shape: shape of the latents, ``[N, C, H, W]``.
        w: ``[N]`` for CFG, which evaluates every latent twice, unconditional first (Ho & Salimans 2022, one batch of
            two); None for one evaluation.
    """

    def __init__(self, unet: Bound, table: Schedule, shape: tuple[int, ...], w: np.ndarray | None = None) -> None:
        self.table = table
        self._unet = unet
        self._w: np.ndarray | float = 1.0 if w is None else np.asarray(w, np.float32)[:, None, None, None]
        evaluations = 1 if w is None else 2
        self._guided = None if w is None else np.empty(shape, np.float32)
        self._shown = _buffer(unet, "sample", (evaluations * shape[0], *shape[1:]), np.float32)
        # with one unscaled evaluation, the network's input is the latent itself, in the network's own memory
        self._same = evaluations == 1 and bool((table.input_scale == 1).all())
        self._trajectory = Trajectory(table, shape, self._shown if self._same else None)
        self._x = self._trajectory.x
        self._halves = [self._shown[: shape[0]], self._shown[shape[0] :]][:evaluations]
        self._timestep = _buffer(unet, "timestep", (evaluations * shape[0],), np.int64)
        # inputs that must be copied to the network
        inputs = {"sample": self._shown, "timestep": self._timestep}
        self._copied = {name: array for name, array in inputs.items() if unet.host_input(name) is not array}

    def run(self, start: np.ndarray, callback: Callback | None = None) -> np.ndarray:
        """Sample and return the last latents ``[N, C, H, W]`` float32 in a new array.

        Args:
            start: the initial latents, which are not changed.
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
        """The network's output for other latents at step ``i``; the next run may overwrite it."""
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
    """The network's own memory for an input if the host may write it, else new memory to copy from."""
    memory = unet.host_input(name)
    return memory if memory is not None and memory.shape == shape and memory.dtype == dtype else np.empty(shape, dtype)
