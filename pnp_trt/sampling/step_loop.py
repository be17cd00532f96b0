"""Many images in one network call, each at its own step, schedule, w and text.

The network takes timestep, w and text states per sample, and a step's update is a row of its schedule's table.  So the
images of a call need nothing in common but the latents' size: an image enters when a row is free and leaves after its
last step, independently of the others (step-level batching).  Guided, unguided and CFG images share a call as well: the
residuals of a guide vanish at w = 1, and CFG is two rows of w = 1 whose predictions are combined.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..bundle.profiles import Size
from ..errors import Cancelled, InputError, PnpError
from .loop import Trajectory, classifier_free
from .network import Network
from .table import Schedule

#: steps that are subtracted from a waiting request's length for every network call.  At 1, a request of S steps can be
#: overtaken by shorter ones that arrive in the next S calls, and by none that arrive later.
AGEING = 1.0
#: default rows of a server's network calls
SLOTS = 8


@dataclass(frozen=True)
class Run:
    """One image to sample.

    Attributes:
        table: the schedule, with at least one step.
        start: initial latents, ``[C, H, W]`` float32.
        inputs: the network's other inputs by name, without the batch: one row, or two for CFG, unconditional first.
        w: guidance scale of CFG; unused with one row.
    """

    table: Schedule
    start: np.ndarray
    inputs: tuple[Mapping[str, np.ndarray], ...]
    w: float = 1.0


@dataclass(eq=False)
class Ticket:
    """A request and its state.

    Attributes:
        steps: number of steps.
        rows: rows that it takes in a call's batch.
        steps_done: number of completed steps.
        began, ended: number of network calls before its admission and before it left; None until then.
        latents: the last latents, ``[C, H, W]`` float32, once it is done.
        error: why it has no latents; ``Cancelled`` after :meth:`StepLoop.cancel`.
    """

    steps: int
    rows: int
    steps_done: int = 0
    began: int | None = None
    ended: int | None = None
    latents: np.ndarray | None = None
    error: PnpError | None = None
    _begin: Callable[[], Run] | None = field(default=None, repr=False)
    _slot: _Slot | None = field(default=None, repr=False)

    @property
    def over(self) -> bool:
        """Whether it has left the loop: done, failed or cancelled."""
        return self.ended is not None

    @property
    def running(self) -> bool:
        """Whether it takes part in the calls."""
        return self._slot is not None

    def estimate(self) -> np.ndarray | None:
        """The current estimate of the clean latents, ``[C, H, W]`` float32; None before the first step.

        It is solved from the latents before and after the last step, two combinations of the same clean latents and
            noise.
        """
        return self.latents if self.latents is not None or self._slot is None else self._slot.estimate(self.steps_done)


class _Slot:
    """A running image: its run, its latents and the buffers of a step."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.trajectory = Trajectory(run.table, run.start.shape)
        np.copyto(self.trajectory.x, run.start)
        self._before = np.empty_like(self.trajectory.x)
        self._guided = np.empty_like(self.trajectory.x) if len(run.inputs) > 1 else None

    @property
    def size(self) -> Size:
        return self.run.start.shape[-2], self.run.start.shape[-1]

    @property
    def shares(self) -> tuple[object, ...]:
        """Key that is equal for images that can share a call."""
        return self.run.start.shape, tuple((name, value.shape) for name, value in self.run.inputs[0].items())

    def update(self, i: int, outputs: np.ndarray) -> None:
        np.copyto(self._before, self.trajectory.x)
        if self._guided is None:
            self.trajectory.update(i, outputs[0])
        else:
            output = classifier_free(outputs[0], outputs[1], self.run.w, self._guided)
            self.trajectory.update(i, output)

    def estimate(self, done: int) -> np.ndarray | None:
        table = self.run.table
        if done == 0:
            return None
        if done == len(table):
            return self.trajectory.x.copy()
        if self.trajectory.data is not None:
            return self.trajectory.data.copy()
        (a, b), (s, t) = table.image_scale[done - 1 : done + 1], table.noise_scale[done - 1 : done + 1]
        clean: np.ndarray = (t * self._before - s * self.trajectory.x) / (a * t - b * s)
        return clean


class StepLoop:
    """Runs of any number of steps in the calls of one network; not thread-safe.

    Every :meth:`step` admits waiting requests while there is room, calls the network once for all running ones (once
    for each of their sizes), and releases those that have ended.  The request with the fewest steps, less ``ageing``
    times the calls that it has waited, is admitted first: short requests overtake long ones, and none waits forever.
    If the first does not fit, because it takes two rows and one is free, no other overtakes it.

    Args:
        unet: the network; each row of its outputs must depend on the same row of its inputs only.
        slots: maximum rows of a call.
        buckets: allowed batches of the calls, which are padded to the next one; None allows any up to ``slots``.
        ageing: see above.

    Attributes:
        calls: number of network calls.
        rows_used, rows_padded: rows of these calls that belonged to images, and that were padding.

    Raises:
        InputError: if ``slots`` is below 1, or no bucket is large enough.
    """

    def __init__(
        self, unet: Network, slots: int = 8, buckets: Iterable[int] | None = None, ageing: float = AGEING
    ) -> None:
        self.buckets = tuple(sorted(set(range(1, slots + 1) if buckets is None else buckets)))
        if slots < 1 or not self.buckets or self.buckets[0] < 1:
            raise InputError(f"slots is {slots} and buckets are {self.buckets}; each must be at least 1")
        if self.buckets[-1] < slots:
            raise InputError(f"slots is {slots} and the largest bucket {self.buckets[-1]}; take at most as many slots")
        self.slots = slots
        self.calls = self.rows_used = self.rows_padded = 0
        self._unet, self._ageing = unet, ageing
        self._waiting: list[tuple[float, int, Ticket]] = []
        self._running: list[Ticket] = []
        self._number = itertools.count()

    def submit(self, begin: Callable[[], Run], steps: int, rows: int = 1) -> Ticket:
        """Put a request in the queue.

        Args:
            begin: creates its run when it is admitted; a ``PnpError`` that it raises becomes the ticket's ``error``.
            steps: length of the run's table.
            rows: number of the run's ``inputs``.

        Raises:
            InputError: if it takes more rows than there are slots.
        """
        if not 1 <= rows <= self.slots:
            raise InputError(f"the request takes {rows} rows of the batch and there are {self.slots} slots; take more")
        ticket = Ticket(steps, rows, _begin=begin)
        heapq.heappush(self._waiting, (steps + self._ageing * self.calls, next(self._number), ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> bool:
        """Remove a waiting or running request, which frees its rows at once; False if it had already left."""
        if ticket.over:
            return False
        self._leave(ticket, Cancelled(f"sampling was cancelled after {ticket.steps_done} of {ticket.steps} steps"))
        self._waiting = [entry for entry in self._waiting if entry[2] is not ticket]
        heapq.heapify(self._waiting)
        return True

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return len(self._waiting)

    @property
    def running(self) -> tuple[Ticket, ...]:
        """The running requests in the order of their admission."""
        return tuple(self._running)

    @property
    def rows_running(self) -> int:
        """Rows of the running requests."""
        return sum(ticket.rows for ticket in self._running)

    def step(self) -> list[Ticket]:
        """Admit requests, call the network, and return the requests that have left: done, or with an ``error``."""
        ended = self._admit()
        groups: dict[tuple[object, ...], list[Ticket]] = {}
        for ticket in self._running:
            assert ticket._slot is not None
            groups.setdefault(ticket._slot.shares, []).append(ticket)
        for group in groups.values():
            try:
                self._call(group)
            except PnpError as e:
                for ticket in group:
                    self._leave(ticket, e)
                ended += group
            else:
                ended += [ticket for ticket in group if ticket.over]
        return ended

    def _admit(self) -> list[Ticket]:
        """Start requests while there is room; returns those whose start failed."""
        failed: list[Ticket] = []
        while self._waiting and self._waiting[0][2].rows <= self.slots - self.rows_running:
            ticket = heapq.heappop(self._waiting)[2]
            begin, ticket._begin = ticket._begin, None
            assert begin is not None
            try:
                run = begin()
                if (len(run.table), len(run.inputs)) != (ticket.steps, ticket.rows):
                    raise InputError(
                        f"the run has {len(run.table)} steps and {len(run.inputs)} rows, but its request stated "
                        f"{ticket.steps} and {ticket.rows}; state the run's"
                    )
            except PnpError as e:
                self._leave(ticket, e)
                failed.append(ticket)
                continue
            ticket._slot, ticket.began = _Slot(run), self.calls
            self._running.append(ticket)
        return failed

    def _call(self, group: Sequence[Ticket]) -> None:
        """Run one step of all requests in ``group``, which share the network's input shapes."""
        slots = [ticket._slot for ticket in group if ticket._slot is not None]
        used = sum(ticket.rows for ticket in group)
        batch = next(b for b in self.buckets if b >= used)
        with self._unet.for_states(slots[0].run.inputs[0]).bind(batch, slots[0].size) as bound:
            shown = bound.host_input("sample")
            shared = shown is not None
            if shown is None:
                shown = np.empty((batch, *slots[0].run.start.shape), np.float32)
            timesteps = np.empty(batch, np.int64)
            rows: list[Mapping[str, np.ndarray]] = []
            for ticket, slot in zip(group, slots, strict=True):
                for inputs in slot.run.inputs:
                    slot.trajectory.show(ticket.steps_done, shown[len(rows)])
                    timesteps[len(rows)] = slot.run.table.timesteps[ticket.steps_done]
                    rows.append(inputs)
            # padding repeats the first row, whose values are valid
            shown[used:], timesteps[used:] = shown[0], timesteps[0]
            rows += [rows[0]] * (batch - used)
            written = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            if not shared:
                written["sample"] = shown
            bound.write(timestep=timesteps, **written)
            bound.run()
            output, first = bound.output(), 0
            self.calls += 1
            self.rows_used += used
            self.rows_padded += batch - used
            for ticket, slot in zip(group, slots, strict=True):
                slot.update(ticket.steps_done, output[first : first + ticket.rows])
                first += ticket.rows
                ticket.steps_done += 1
        for ticket, slot in zip(group, slots, strict=True):
            if ticket.steps_done == ticket.steps:
                ticket.latents = slot.trajectory.x
                self._leave(ticket, None)

    def _leave(self, ticket: Ticket, error: PnpError | None) -> None:
        ticket.error, ticket.ended = error, self.calls
        ticket._slot = ticket._begin = None
        if ticket in self._running:
            self._running.remove(ticket)
