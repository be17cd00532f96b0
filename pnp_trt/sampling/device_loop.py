"""The sampling loop on a GPU: captured into one graph where that works, else put on the stream step by step.

Here is what every kind of GPU buffers shares: which runs share buffers and graphs, when a run is captured, and what
happens where that fails.  ``backends.cuda_graph`` (TensorRT) and ``backends.torch_graph`` (PyTorch) have the buffers.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..bundle.profiles import Size
from ..errors import Cancelled
from .loop import Callback as StepCallback
from .table import Schedule

#: a graph has every kernel of every step; beyond this many steps it would take more memory than it saves time
MOST_STEPS = 200


@dataclass(frozen=True)
class Plan:
    """The shape of a run, independent of its inputs.

    Attributes:
        batch: images.
        size: height and width of the latents.
        table: the schedule.
        twice: whether the network sees every latent twice (CFG).
        decode: whether it ends with pixels, else with latents.
    """

    batch: int
    size: Size
    table: Schedule
    twice: bool
    decode: bool

    @cached_property
    def buffers(self) -> tuple[Any, ...]:
        """Equal for runs that share buffers."""
        return self.batch, self.size, self.twice

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for runs that share a graph: batch, size, steps, schedule (and method, and end)."""
        table = hashlib.sha256(self.table.table().tobytes() + self.table.timesteps.tobytes()).hexdigest()
        return *self.buffers, self.decode, self.table.name, len(self.table), table


@dataclass(frozen=True)
class Feeds:
    """The inputs of one run, all that is copied to the GPU.

    Attributes:
        latents: the first ones, ``[N, C, H, W]`` float32.
        guidance: w, ``[N]`` float32.
        inputs: the U-Net's other inputs by name, text states and such, for its whole batch.
    """

    latents: np.ndarray
    guidance: np.ndarray
    inputs: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Drawn:
    """The outputs of one run.

    Attributes:
        values: pixels uint8 ``[N, H, W, 3]``, or the last latents ``[N, C, H, W]`` float32.
        bad_latents, bad_pixels: ``[N]`` bool; where a value is NaN or infinite.
    """

    values: np.ndarray
    bad_latents: np.ndarray
    bad_pixels: np.ndarray


class Lane(ABC):
    """Buffers of one batch and size on one stream, and the parts of a run; for one thread at a time."""

    @abstractmethod
    def prepare(self, plan: Plan) -> Any:
        """The plan's table on the device, in the form that the other methods take."""

    @abstractmethod
    def release(self, prepared: Any) -> None:
        """Give a table back."""

    @abstractmethod
    def load(self, feeds: Feeds) -> None:
        """Copy in the inputs of the next run."""

    @abstractmethod
    def begin(self, prepared: Any) -> None:
        """Put what comes before the first step on the stream."""

    @abstractmethod
    def step(self, prepared: Any, i: int) -> None:
        """Put step ``i`` on the stream."""

    @abstractmethod
    def end(self, prepared: Any) -> None:
        """Put what comes after the last step on the stream: the decoder, checks, the copy out."""

    @abstractmethod
    def wait(self) -> None:
        """Wait for all that is on the stream."""

    @abstractmethod
    def read(self, prepared: Any) -> Drawn:
        """Wait, and copy the results."""

    @abstractmethod
    def capture(self, work: Callable[[], None]) -> Any:
        """A graph of what ``work`` puts on the stream; after a run of the same was waited for."""

    @abstractmethod
    def replay(self, graph: Any) -> None:
        """Put a graph on the stream."""

    @abstractmethod
    def drop(self, graph: Any) -> None:
        """Give a graph back; it is not running."""

    @abstractmethod
    def close(self) -> None:
        """Give the buffers back."""


@dataclass
class _Run:
    """A plan that a lane has seen.

    Attributes:
        seen: whether it ran, which warms everything up that a capture must not meet for the first time.
        graph: captured, or None.
        failed: whether capturing was tried and failed.
    """

    prepared: Any
    seen: bool = False
    graph: Any = None
    failed: bool = False


@dataclass
class _Held:
    lane: Lane
    runs: OrderedDict[tuple[Any, ...], _Run] = field(default_factory=OrderedDict)


class DeviceLoops:
    """Runs plans on lanes; those used last are kept.  Threads take turns.

    The first run of a kind goes step by step, which warms everything up; the second one is captured.  Where that
    fails, one warning gives the reason, and such runs continue step by step: the same work on the same buffers, so that
    both give equal results.  With a callback a run always goes step by step, for there to be something to report.

    Args:
        open_lane: makes the buffers for (batch, latents' size, whether for CFG).
        name: of the engine, for warnings.

    Attributes:
        capture: switch it off, and all runs go step by step.
        why_not: why the last capture failed, or None.
        replays, captures: how many there were.
    """

    LANES = 2
    GRAPHS = 4

    def __init__(self, open_lane: Callable[[int, Size, bool], Lane], name: str) -> None:
        self.capture = True
        self.why_not: str | None = None
        self.replays = self.captures = 0
        self._open, self._name = open_lane, name
        self._lanes: OrderedDict[tuple[Any, ...], _Held] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, plan: Plan, feeds: Feeds, callback: StepCallback | None = None) -> Drawn:
        """One batch of images.

        Args:
            callback: called with (steps done, steps) after each step; False stops the work.

        Raises:
            Cancelled: if the callback returned False.
            PnpError: if the GPU fails; the buffers are then made anew by the next run.
        """
        with self._lock:
            held = self._lane(plan)
            try:
                return self._on(held, plan, feeds, callback)
            except Cancelled:
                raise  # between two steps, nothing is on the way
            except BaseException:
                self._lanes.pop(plan.buffers, None)
                _close(held)  # work may be on the way, and buffers in any state
                raise

    def clear(self) -> None:
        """Forget all graphs and buffers: for who changed weights in place.  The next runs capture again."""
        with self._lock:
            while self._lanes:
                _close(self._lanes.popitem()[1])

    def _lane(self, plan: Plan) -> _Held:
        if plan.buffers not in self._lanes:
            while len(self._lanes) >= self.LANES:  # before the new one: there may be memory for no more
                _close(self._lanes.popitem(last=False)[1])
            self._lanes[plan.buffers] = _Held(self._open(plan.batch, plan.size, plan.twice))
        self._lanes.move_to_end(plan.buffers)
        return self._lanes[plan.buffers]

    def _on(self, held: _Held, plan: Plan, feeds: Feeds, callback: StepCallback | None) -> Drawn:
        lane = held.lane
        run = self._find(held, plan)
        lane.load(feeds)
        if callback is None and self._captured(lane, run, plan):
            lane.replay(run.graph)
            self.replays += 1
        else:
            steps = len(plan.table)
            lane.begin(run.prepared)
            for i in range(steps):
                lane.step(run.prepared, i)
                if callback is not None:
                    lane.wait()
                    if callback(i + 1, steps) is False:
                        raise Cancelled(f"sampling was cancelled after {i + 1} of {steps} steps")
            lane.end(run.prepared)
        drawn = lane.read(run.prepared)
        run.seen = True
        return drawn

    def _find(self, held: _Held, plan: Plan) -> _Run:
        if plan.key not in held.runs:
            while len(held.runs) >= self.GRAPHS:
                _release(held.lane, held.runs.popitem(last=False)[1])
            held.runs[plan.key] = _Run(held.lane.prepare(plan))
        held.runs.move_to_end(plan.key)
        return held.runs[plan.key]

    def _captured(self, lane: Lane, run: _Run, plan: Plan) -> bool:
        """Whether there is a graph for it, which is made if it can be."""
        if not self.capture or run.failed or not run.seen or len(plan.table) > MOST_STEPS:
            return False
        if run.graph is None:

            def work() -> None:
                lane.begin(run.prepared)
                for i in range(len(plan.table)):
                    lane.step(run.prepared, i)
                lane.end(run.prepared)

            lane.wait()  # a capture needs nothing on the way
            try:
                run.graph = lane.capture(work)
            except Exception as e:  # whatever it is, the same work still runs uncaptured
                run.failed = True
                self.why_not = str(e) or type(e).__name__
                warnings.warn(
                    f"engine '{self._name}': the sampling loop could not be captured into a CUDA graph "
                    f"({self.why_not}); it runs step by step, with equal results",
                    stacklevel=2,
                )
                return False
            self.captures += 1
        return True


def _release(lane: Lane, run: _Run) -> None:
    if run.graph is not None:
        lane.drop(run.graph)
    lane.release(run.prepared)


def _close(held: _Held) -> None:
    """Graphs first: they have the buffers' addresses."""
    try:
        held.lane.wait()
        while held.runs:
            _release(held.lane, held.runs.popitem()[1])
    finally:
        held.lane.close()
