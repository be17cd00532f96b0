"""The sampling loop on a GPU: captured into graphs where that works, else put on the stream as it is.

What is captured is one step.  Which row of the table it reads is a number in the GPU's memory, which the step itself
raises, so that one graph, replayed, is a run of any number of steps and of any schedule.  What comes before the first
step and after the last one are two more graphs.

Here is what every kind of GPU buffers shares: which runs share buffers and graphs, when something is captured, and what
happens where that fails.  ``backends.cuda_graph`` (TensorRT) and ``backends.torch.graph`` (PyTorch) have the buffers.
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

#: buffers hold tables of a multiple of this many rows; Stable Diffusion's training timesteps are as many
ROWS = 1000


@dataclass(frozen=True)
class Shape:
    """Runs of equal shape share buffers and graphs.

    Attributes:
        batch: images.
        size: height and width of the latents.
        twice: whether the network sees every latent twice (CFG).
        rows: of the longest table that the buffers hold.
        tokens: of the text states; None where the network takes one number alone.
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
        batch: images.
        size: height and width of the latents.
        table: the schedule.
        twice: whether the network sees every latent twice (CFG).
        decode: whether it ends with pixels, else with latents.
        tokens: of the text states; None where the network takes one number alone.
    """

    batch: int
    size: Size
    table: Schedule
    twice: bool
    decode: bool
    tokens: int | None = None

    @property
    def shape(self) -> Shape:
        """Of the buffers that it runs on."""
        return Shape(self.batch, self.size, self.twice, ROWS * max(1, -(-len(self.table) // ROWS)), self.tokens)


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
class LoopOutput:
    """The outputs of one run.

    Attributes:
        values: pixels uint8 ``[N, H, W, 3]``, or the last latents ``[N, C, H, W]`` float32.
        bad_latents, bad_pixels: ``[N]`` bool; where a value is NaN or infinite.
    """

    values: np.ndarray
    bad_latents: np.ndarray
    bad_pixels: np.ndarray


class Lane(ABC):
    """Buffers of one shape on one stream, and the parts of a run; for one thread at a time.

    Everything that differs between two runs of one shape is data in the buffers, so that each part can be captured once
    and replayed for all of them.
    """

    @abstractmethod
    def load(self, table: Schedule, feeds: Feeds) -> None:
        """Copy in a table, of no more rows than the buffers hold, and the inputs of the next run."""

    @abstractmethod
    def begin(self) -> None:
        """Put what comes before the first step on the stream; the first row of the table becomes the current one."""

    @abstractmethod
    def step(self) -> None:
        """Put a step by the current row on the stream; the next row becomes the current one."""

    @abstractmethod
    def end(self, decode: bool) -> None:
        """Put what comes after the last step on the stream: the decoder if asked for, checks, the copy out."""

    @abstractmethod
    def wait(self) -> None:
        """Wait for all that is on the stream."""

    @abstractmethod
    def read(self, decode: bool) -> LoopOutput:
        """Wait, and copy the results; ``decode`` as of :meth:`end`."""

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


@dataclass(eq=False)
class _Part:
    """A part of a run.

    Attributes:
        work: puts it on the stream.
        seen: whether it ran, which warms everything up that a capture must not meet for the first time.
        graph: captured, or None.
    """

    work: Callable[[], None]
    seen: bool = False
    graph: Any = None


class _Held:
    """A lane and its parts.

    Attributes:
        ends: by whether they decode.
        failed: whether a capture failed.
    """

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        # methods are looked up at each call, for who watches a lane
        self.begin, self.step = _Part(lambda: lane.begin()), _Part(lambda: lane.step())
        self.ends = {False: _Part(lambda: lane.end(False)), True: _Part(lambda: lane.end(True))}
        self.failed = False

    def drop(self) -> None:
        """Give all graphs back; none is running."""
        for part in (self.begin, self.step, *self.ends.values()):
            if part.graph is not None:
                graph, part.graph = part.graph, None
                self.lane.drop(graph)

    def close(self) -> None:
        """Graphs first: they have the buffers' addresses."""
        try:
            self.lane.wait()
            self.drop()
        finally:
            self.lane.close()


class DeviceLoops:
    """Runs plans on lanes; those used last are kept.  Threads take turns.

    The first run of a shape is put on the stream as it is, which warms everything up; in the second one begin, step and
    end are captured, and from then on replayed, whatever the number of steps and the schedule.  Where a capture fails,
    one warning gives the reason, and runs of that shape continue uncaptured: the same work on the same buffers, so that
    both give equal results.

    Args:
        open_lane: makes the buffers for a shape.
        name: of the engine, for warnings.

    Attributes:
        capture: switch it off, and all runs are put on the stream uncaptured.
        why_not: why the last capture failed, or None.
        captures: how often a step was captured.
        replays: runs whose steps were replayed.
    """

    LANES = 2

    def __init__(self, open_lane: Callable[[Shape], Lane], name: str) -> None:
        self.capture = True
        self.why_not: str | None = None
        self.replays = self.captures = 0
        self._open, self._name = open_lane, name
        self._lanes: OrderedDict[Shape, _Held] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, plan: LoopPlan, feeds: Feeds, callback: StepCallback | None = None) -> LoopOutput:
        """One batch of images.

        The host waits once, at the end; with a callback after each step.

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
                self._lanes.pop(plan.shape, None)
                held.close()  # work may be on the way, and buffers in any state
                raise

    def clear(self) -> None:
        """Forget all graphs and buffers: for who changed weights in place.  The next runs capture again."""
        with self._lock:
            while self._lanes:
                self._lanes.popitem()[1].close()

    def _lane(self, plan: LoopPlan) -> _Held:
        shape = plan.shape
        if shape not in self._lanes:
            while len(self._lanes) >= self.LANES:  # before the new one: there may be memory for no more
                self._lanes.popitem(last=False)[1].close()
            self._lanes[shape] = _Held(self._open(shape))
        self._lanes.move_to_end(shape)
        return self._lanes[shape]

    def _on(self, held: _Held, plan: LoopPlan, feeds: Feeds, callback: StepCallback | None) -> LoopOutput:
        lane, end, steps = held.lane, held.ends[plan.decode], len(plan.table)
        lane.load(plan.table, feeds)
        if self.capture and not held.failed:
            self._capture(held, end)
        self._put(lane, held.begin)
        for i in range(steps):
            self._put(lane, held.step)
            if callback is not None:
                lane.wait()
                if callback(i + 1, steps) is False:
                    raise Cancelled(f"sampling was cancelled after {i + 1} of {steps} steps")
        self._put(lane, end)
        drawn = lane.read(plan.decode)
        for part in (held.begin, held.step, end):
            part.seen = True
        if self.capture and held.step.graph is not None:
            self.replays += 1
        return drawn

    def _put(self, lane: Lane, part: _Part) -> None:
        """Put a part on the stream, by its graph if there is one."""
        if self.capture and part.graph is not None:
            lane.replay(part.graph)
        else:
            part.work()

    def _capture(self, held: _Held, end: _Part) -> None:
        """Make the graphs that are missing of parts that ran before."""
        missing = [part for part in (held.begin, held.step, end) if part.seen and part.graph is None]
        if not missing:
            return
        held.lane.wait()  # a capture needs nothing on the way
        try:
            for part in missing:
                part.graph = held.lane.capture(part.work)
        except Exception as e:  # whatever it is, the same work still runs uncaptured
            held.failed = True
            held.drop()
            self.why_not = str(e) or type(e).__name__
            warnings.warn(
                f"engine '{self._name}': the sampling loop could not be captured into a CUDA graph "
                f"({self.why_not}); it runs uncaptured, with equal results",
                stacklevel=2,
            )
            return
        self.captures += held.step in missing
