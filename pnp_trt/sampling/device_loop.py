"""The sampling loop on a GPU: captured into graphs where possible, else put on the stream directly.

One step is captured.  The index of its row in the table is a number in the GPU's memory, which the step itself
increments, so that one graph, replayed, runs any number of steps of any schedule.  The work before the first step and
after the last one is two more graphs.

This module has what all kinds of GPU buffers share: which runs share buffers and graphs, when a part is captured, and
what happens if that fails.  ``backends.cuda_graph`` (TensorRT) and ``backends.torch.graph`` (PyTorch) have the buffers.
"""

from __future__ import annotations

import threading
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bundle.profiles import Size
from ..errors import Cancelled
from .loop import Callback as StepCallback
from .table import Schedule

#: a buffer's table length is a multiple of this, which is Stable Diffusion's number of training timesteps
ROWS = 1000


@dataclass(frozen=True)
class Shape:
    """Shape of the buffers; runs of equal shape share buffers and graphs.

    Attributes:
        batch: number of images.
        size: height and width of the latents.
        twice: whether the U-Net evaluates every latent twice (CFG).
        rows: length of the longest table that the buffers can hold.
        tokens: number of tokens of the text states; None if the network takes one number only.
    """

    batch: int
    size: Size
    twice: bool
    rows: int
    tokens: int | None = None


@dataclass(frozen=True)
class LoopPlan:
    """A run, independent of its inputs.

    Attributes:
        batch: number of images.
        size: height and width of the latents.
        table: the schedule.
        twice: whether the U-Net evaluates every latent twice (CFG).
        decode: whether the result is pixels, else latents.
        tokens: number of tokens of the text states; None if the network takes one number only.
    """

    batch: int
    size: Size
    table: Schedule
    twice: bool
    decode: bool
    tokens: int | None = None

    @property
    def shape(self) -> Shape:
        """Shape of the buffers for this run."""
        return Shape(self.batch, self.size, self.twice, ROWS * max(1, -(-len(self.table) // ROWS)), self.tokens)


@dataclass(frozen=True)
class Feeds:
    """The inputs of one run, which are all that is copied to the GPU.

    Attributes:
        latents: the initial latents, ``[N, C, H, W]`` float32.
        guidance: w, ``[N]`` float32.
        inputs: the U-Net's other inputs by name, such as text states, for its whole batch.
    """

    latents: np.ndarray
    guidance: np.ndarray
    inputs: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class LoopOutput:
    """The outputs of one run.

    Attributes:
        values: pixels uint8 ``[N, H, W, 3]``, or the last latents ``[N, C, H, W]`` float32.
        bad_latents, bad_pixels: ``[N]`` bool; whether any value is NaN or infinite.
    """

    values: np.ndarray
    bad_latents: np.ndarray
    bad_pixels: np.ndarray


class Lane(ABC):
    """Buffers of one shape on one stream, and the parts of a run; not thread-safe.

    Everything that differs between two runs of one shape is data in the buffers, so that each part can be captured once
    and replayed for all of them.
    """

    @abstractmethod
    def load(self, table: Schedule, feeds: Feeds) -> None:
        """Copy in the inputs of the next run and its table, which must fit into the buffers."""

    @abstractmethod
    def begin(self) -> None:
        """Put the work before the first step on the stream, and make the first row of the table the current one."""

    @abstractmethod
    def step(self) -> None:
        """Put one step with the current row on the stream, and make the next row the current one."""

    @abstractmethod
    def end(self, decode: bool) -> None:
        """Put the work after the last step on the stream: decoder if ``decode``, checks and the copy to the host."""

    @abstractmethod
    def wait(self) -> None:
        """Wait for all work on the stream."""

    @abstractmethod
    def read(self, decode: bool) -> LoopOutput:
        """Wait, and copy the results; ``decode`` as for :meth:`end`."""

    @abstractmethod
    def capture(self, work: Callable[[], None]) -> Any:
        """Capture what ``work`` puts on the stream into a graph; it must have run, and completed, before."""

    @abstractmethod
    def replay(self, graph: Any) -> None:
        """Put a graph on the stream."""

    @abstractmethod
    def drop(self, graph: Any) -> None:
        """Free a graph that is not running."""

    @abstractmethod
    def close(self) -> None:
        """Free the buffers."""


@dataclass(eq=False)
class _Part:
    """A part of a run.

    Attributes:
        work: puts the part on the stream.
        has_run: whether it has run, which initialises everything that must not happen inside a capture.
        graph: the captured graph, or None.
    """

    work: Callable[[], None]
    has_run: bool = False
    graph: Any = None


class _CachedLane:
    """A lane and its parts.

    Attributes:
        ends: the parts after the last step, by whether they decode.
        failed: whether a capture failed.
    """

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        # lambdas look up the methods at each call, so that they can be monkeypatched
        self.begin, self.step = _Part(lambda: lane.begin()), _Part(lambda: lane.step())
        self.ends = {False: _Part(lambda: lane.end(False)), True: _Part(lambda: lane.end(True))}
        self.failed = False

    def drop(self) -> None:
        """Free all graphs; none is running."""
        for part in (self.begin, self.step, *self.ends.values()):
            if part.graph is not None:
                graph, part.graph = part.graph, None
                self.lane.drop(graph)

    def close(self) -> None:
        """Free the graphs and then the buffers, whose addresses the graphs contain."""
        try:
            self.lane.wait()
            self.drop()
        finally:
            self.lane.close()


class DeviceLoops:
    """Runs plans on lanes and keeps the most recently used lanes.  Thread-safe; runs are serialised.

    The first run of a shape puts its work on the stream directly, which initialises everything.  The second run
    captures begin, step and end, and from then on these graphs are replayed for any number of steps and any schedule.
    If a capture fails, one warning states the reason, and runs of that shape continue uncaptured: the same work on the
    same buffers, with equal results.

    Args:
        open_lane: creates the buffers for a shape.
        name: name of the engine, for warnings.

    Attributes:
        capture: if False, all runs are uncaptured.
        why_not: reason why the last capture failed, or None.
        captures: number of captures of a step.
        replays: number of runs whose steps were replayed.
    """

    LANES = 2

    def __init__(self, open_lane: Callable[[Shape], Lane], name: str) -> None:
        self.capture = True
        self.why_not: str | None = None
        self.replays = self.captures = 0
        self._open, self._name = open_lane, name
        self._lanes: OrderedDict[Shape, _CachedLane] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, plan: LoopPlan, feeds: Feeds, callback: StepCallback | None = None) -> LoopOutput:
        """Run a plan for one batch of images.

        The host waits once, at the end; with a callback, after each step.

        Args:
            callback: called with (steps done, steps) after each step; returning False cancels the run.

        Raises:
            Cancelled: if the callback returned False.
            PnpError: if the GPU fails; the next run then allocates new buffers.
        """
        with self._lock:
            entry = self._lane(plan)
            try:
                return self._on(entry, plan, feeds, callback)
            except Cancelled:
                raise  # raised between two steps, when the stream is idle
            except BaseException:
                self._lanes.pop(plan.shape, None)
                entry.close()  # the stream may still be busy, and the buffers in any state
                raise

    def clear(self) -> None:
        """Drop all graphs and buffers, after weights were changed in place.  Later runs capture again."""
        with self._lock:
            while self._lanes:
                self._lanes.popitem()[1].close()

    def _lane(self, plan: LoopPlan) -> _CachedLane:
        shape = plan.shape
        if shape not in self._lanes:
            while len(self._lanes) >= self.LANES:  # before opening another, which may not fit into memory beside them
                self._lanes.popitem(last=False)[1].close()
            self._lanes[shape] = _CachedLane(self._open(shape))
        self._lanes.move_to_end(shape)
        return self._lanes[shape]

    def _on(self, entry: _CachedLane, plan: LoopPlan, feeds: Feeds, callback: StepCallback | None) -> LoopOutput:
        lane, end, steps = entry.lane, entry.ends[plan.decode], len(plan.table)
        lane.load(plan.table, feeds)
        if self.capture and not entry.failed:
            self._capture(entry, end)
        self._put(lane, entry.begin)
        for i in range(steps):
            self._put(lane, entry.step)
            if callback is not None:
                lane.wait()
                if callback(i + 1, steps) is False:
                    raise Cancelled(f"sampling was cancelled after {i + 1} of {steps} steps")
        self._put(lane, end)
        output = lane.read(plan.decode)
        for part in (entry.begin, entry.step, end):
            part.has_run = True
        if self.capture and entry.step.graph is not None:
            self.replays += 1
        return output

    def _put(self, lane: Lane, part: _Part) -> None:
        """Put a part on the stream, as a graph if it has one."""
        if self.capture and part.graph is not None:
            lane.replay(part.graph)
        else:
            part.work()

    def _capture(self, entry: _CachedLane, end: _Part) -> None:
        """Capture those parts that have run before and have no graph."""
        missing = [part for part in (entry.begin, entry.step, end) if part.has_run and part.graph is None]
        if not missing:
            return
        entry.lane.wait()  # a capture needs an idle stream
        try:
            for part in missing:
                part.graph = entry.lane.capture(part.work)
        except Exception as e:  # for any reason; the same work still runs uncaptured
            entry.failed = True
            entry.drop()
            self.why_not = str(e) or type(e).__name__
            warnings.warn(
                f"engine '{self._name}': the sampling loop could not be captured into a CUDA graph "
                f"({self.why_not}); it runs uncaptured, with equal results",
                stacklevel=2,
            )
            return
        self.captures += entry.step in missing
