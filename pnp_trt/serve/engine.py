"""One bundle that serves many: a thread of its own runs the step-level loop, everyone else submits and waits."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from ..errors import InputError, PnpError
from ..io.text import printable
from ..runtime.pipeline import GeneratedImage, Pipeline, Prepared
from ..sampling.step_loop import SLOTS, Run, Ticket

#: images that wait, at most, beside those that run
QUEUE = 64
#: shortest and longest time that a refused client is told to wait, in seconds
RETRY = (1, 120)


class Busy(PnpError):
    """The queue is full.

    Attributes:
        retry_after: seconds after which there is room, as far as is known.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Expired(PnpError):
    """The request's deadline passed before its images were done."""


class Stopping(PnpError):
    """The server is being stopped and takes no more requests."""


@dataclass(frozen=True)
class JobProgress:
    """Where a job is.

    Attributes:
        steps_done, steps: of all its images.
        running: images that have a place in the engine's calls.
        over: whether it has ended.
        seconds: since it was submitted.
        left: seconds to its end as far as is known; None before the first step.
    """

    steps_done: int
    steps: int
    running: int
    over: bool
    seconds: float
    left: float | None


@dataclass(eq=False)
class Job:
    """A request for one image or several.

    Attributes:
        id: unlike that of any other job.
        prepared: what is to be made.
        future: its images in order; or Busy, Expired, Cancelled or another ``PnpError``.
        submitted, admitted, ended: by the monotonic clock, in seconds; None where it has not come to that.
        deadline: by the same clock.
        partial: an image as far as it had come when a client interrupted it and took that for its answer.
    """

    prepared: Prepared
    deadline: float | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    future: Future[list[GeneratedImage]] = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    ended: float | None = None
    tickets: list[Ticket] = field(default_factory=list)
    images: dict[int, GeneratedImage] = field(default_factory=dict)
    partial: GeneratedImage | None = None

    @property
    def count(self) -> int:
        """Images of it."""
        return len(self.prepared.prompts)

    @property
    def evaluations(self) -> int:
        """Model evaluations of one image."""
        return len(self.prepared.table) * self.prepared.rows

    def progress(self) -> JobProgress:
        """Where it is; for any thread."""
        now = time.monotonic()
        steps = len(self.prepared.table) * self.count
        made = sum(ticket.steps_done for ticket in tuple(self.tickets))
        left = None
        if made and self.admitted is not None:
            left = max(0.0, (now - self.admitted) / made * (steps - made))
        running = sum(ticket.running for ticket in tuple(self.tickets))
        return JobProgress(made, steps, running, self.ended is not None, (self.ended or now) - self.submitted, left)


class Watcher:
    """What an engine tells of itself, from its own thread; the methods must return soon."""

    def stepped(self, rows: int, padded: int, calls: int, seconds: float) -> None:
        """The loop made ``calls`` network calls with ``rows`` rows of images and ``padded`` beside."""

    def ended(self, job: Job, error: PnpError | None) -> None:
        """A job has ended."""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine of a bundle is loaded.

    Attributes:
        slots, queue_size: as of :class:`Engine`.
        provider, threads: as of ``Pipeline.load``.
    """

    slots: int = SLOTS
    queue_size: int = QUEUE
    provider: str = "auto"
    threads: int | None = None


class Engine:
    """Serves one pipeline.

    Requests of any steps, w, schedule, method and size are taken from any thread; one thread, which this starts, does
    all of the work.  An image that it makes has the bytes that the pipeline gives it alone.

    Args:
        pipeline: the bundle; nobody else should use it meanwhile, as both would be slower.
        slots: rows of an engine call, at most; CFG takes two an image, the other methods one.
        queue: images that may wait.
        watcher: told of steps and ends.

    Raises:
        InputError: as ``Pipeline.step_loop`` does, or for a queue below 0.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        slots: int = SLOTS,
        queue_size: int = QUEUE,
        watcher: Watcher | None = None,
    ) -> None:
        if queue_size < 0:
            raise InputError(f"the queue is {queue_size}; it must be at least 0")
        self.pipeline = pipeline
        self.watcher = watcher or Watcher()
        self._loop = pipeline.step_loop(slots)
        self.slots = self._loop.slots
        self._room = self.slots + queue_size
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._owners: dict[Ticket, tuple[Job, int]] = {}
        self._images = 0
        self._stopping = False
        self._row_seconds: float | None = None
        self._thread = threading.Thread(target=self._work, name=f"pnp-trt {pipeline.name}", daemon=True)
        self._thread.start()

    # -- for any thread ------------------------------------------------------------------------------------------------
    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._stopping

    @property
    def images(self) -> int:
        """Images that wait or run."""
        return self._images

    @property
    def waiting(self) -> int:
        """Images that wait."""
        return max(0, self._images - len(self._loop.running))

    @property
    def rows_running(self) -> int:
        """Rows of a call that are in use."""
        return self._loop.rows_running

    def jobs(self) -> list[Job]:
        """Those that wait or run, the oldest first."""
        with self._lock:
            return list(self._jobs.values())

    def submit(self, prepared: Prepared, deadline: float | None = None) -> Job:
        """Put a request in the queue.

        Args:
            prepared: as ``Pipeline.prepare`` gives it.
            deadline: seconds after which it is dropped, wherever it is; None for never.

        Raises:
            InputError, Busy, Stopping: as :meth:`submit_job` does.
        """
        job = Job(prepared)
        self.submit_job(job, deadline)
        return job

    def submit_job(self, job: Job, deadline: float | None = None, since: float | None = None) -> None:
        """As :meth:`submit`, for a job that nobody has submitted.

        Args:
            since: when the request came, by the monotonic clock, in seconds; None for now.

        Raises:
            InputError: if it can never be served: its method is none of ``step_methods``, or it has more images or rows
                than there is room for.
            Busy: if the queue has no room for all of its images.
            Stopping: if the engine is being stopped.
        """
        pipeline, prepared, count = self.pipeline, job.prepared, job.count
        pipeline.check_step_method(prepared.method)
        if prepared.rows > self.slots:
            raise InputError(
                f"method '{prepared.method}' takes {prepared.rows} rows of a call and the server has {self.slots} "
                "slot; start it with more --slots"
            )
        if count > self._room:
            raise InputError(f"{count} images were requested at once; at most {self._room} are taken")
        job.submitted = time.monotonic() if since is None else since
        job.deadline = None if deadline is None else job.submitted + deadline
        job.future.set_running_or_notify_cancel()  # from here on the future ends by this engine alone
        with self._lock:
            if self._stopping or not self._thread.is_alive():
                raise Stopping(f"engine '{pipeline.name}' is being stopped; ask another server, or later")
            if self._images + count > self._room:
                raise Busy(
                    f"engine '{pipeline.name}' has {self._images} images in its queue and room for {self._room}; try "
                    "again later",
                    self._retry_after(count),
                )
            self._images += count
            self._jobs[job.id] = job
            self._inbox.put(lambda: self._take(job))

    def cancel(self, job: Job) -> None:
        """Take a job out, waiting or running, so that its future ends with ``Cancelled``; one that has ended stays."""
        self._inbox.put(lambda: self._drop(job, None))

    def preview(self, job: Job) -> Future[np.ndarray | None]:
        """An image of the job as far as it has come, uint8 ``[H, W, 3]``; None where it is not running."""
        found: Future[np.ndarray | None] = Future()
        found.set_running_or_notify_cancel()

        def make() -> None:
            try:
                estimates = [t.estimate() for t in job.tickets if t.running]
                known = next((e for e in estimates if e is not None), None)
                found.set_result(None if known is None else self.pipeline.decode(known[None])[0])
            except Exception as e:
                found.set_exception(e)

        with self._lock:
            if self._thread.is_alive() and job.id in self._jobs:
                self._inbox.put(make)
            else:
                found.set_result(None)
        return found

    def stop(self, drain: bool = True) -> bool:
        """Take no more requests, and end.

        Args:
            drain: finish what waits and runs; else it is cancelled.

        Returns:
            Whether all that was there was finished.
        """
        with self._lock:
            self._stopping = True
        self._inbox.put(lambda: None)
        if drain:
            self._thread.join()
        left = self.jobs()
        for job in left:
            self.cancel(job)
        self._thread.join()
        return not left

    # -- for the engine's own thread -----------------------------------------------------------------------------------
    def _work(self) -> None:
        while True:
            try:
                idle = not self._loop.waiting and not self._loop.running
                with self._lock:
                    if idle and self._stopping and not self._jobs:
                        return
                self._hear(block=idle)
                self._expire()
                self._step()
            except Exception as e:  # a bug of ours, or of a runtime: those that run have lost their state
                running = {self._owners[t][0] for t in self._loop.running if t in self._owners}
                for job in running or self.jobs():  # it must not come again and again
                    self._drop(job, _unexpected(e))

    def _hear(self, block: bool) -> None:
        """Do what was put into the inbox; ``block`` until there is something."""
        while True:
            try:
                command = self._inbox.get(block=block)
            except queue.Empty:
                return
            command()
            block = False

    def _take(self, job: Job) -> None:
        prepared = job.prepared
        for i in range(0 if job.ended is not None else job.count):
            ticket = self._loop.submit(self._beginning(job, i), len(prepared.table), prepared.rows)
            job.tickets.append(ticket)
            self._owners[ticket] = job, i

    def _beginning(self, job: Job, i: int) -> Callable[[], Run]:
        def begin() -> Run:
            if job.admitted is None:
                job.admitted = time.monotonic()
            try:
                return self.pipeline.run(job.prepared, i)
            except PnpError:
                raise
            except Exception as e:
                raise _unexpected(e) from e

        return begin

    def _expire(self) -> None:
        now = time.monotonic()
        for job in self.jobs():
            if job.deadline is not None and now > job.deadline:
                after = job.deadline - job.submitted
                progress = job.progress()
                self._drop(
                    job,
                    Expired(
                        f"the request was not done within {after:g} s: {progress.steps_done} of {progress.steps} "
                        "steps; take fewer steps or images, or try again later"
                    ),
                )

    def _step(self) -> None:
        loop = self._loop
        before = loop.calls, loop.rows_used, loop.rows_padded
        start = time.perf_counter()
        ended = loop.step()
        spent = time.perf_counter() - start
        calls, rows, padded = loop.calls - before[0], loop.rows_used - before[1], loop.rows_padded - before[2]
        if rows:
            each = spent / rows
            self._row_seconds = each if self._row_seconds is None else 0.9 * self._row_seconds + 0.1 * each
            self.watcher.stepped(rows, padded, calls, spent)
        for ticket in ended:
            if (owner := self._owners.pop(ticket, None)) is not None:
                self._ended(ticket, *owner)

    def _ended(self, ticket: Ticket, job: Job, i: int) -> None:
        """An image has left the loop: decode it, or end its job."""
        if ticket.error is not None or ticket.latents is None:
            self._drop(job, ticket.error)
            return
        try:
            pixels = self.pipeline.decode(ticket.latents[None])[0]
        except PnpError as e:
            self._drop(job, e)
            return
        job.images[i] = GeneratedImage(pixels, job.prepared.parameters(i))
        if len(job.images) == job.count:
            self._end(job, None)

    def _drop(self, job: Job, error: PnpError | None) -> None:
        """Take a job's images out of the loop and end it; by ``error``, or as cancelled."""
        if job.ended is not None:
            return
        for ticket in job.tickets:
            self._loop.cancel(ticket)
            self._owners.pop(ticket, None)
            error = error or ticket.error
        self._end(job, error or PnpError("the request was dropped; try again"))

    def _end(self, job: Job, error: PnpError | None) -> None:
        job.ended = time.monotonic()
        with self._lock:
            self._jobs.pop(job.id, None)
            self._images -= job.count
        with contextlib.suppress(Exception):  # a figure that is lost must not lose the images
            self.watcher.ended(job, error)
        if error is None:
            job.future.set_result([job.images[i] for i in range(job.count)])
        else:
            job.future.set_exception(error)

    def _retry_after(self, count: int) -> int:
        """Seconds until ``count`` images have left, as far as is known."""
        work = sum(p.steps - p.steps_done for p in (job.progress() for job in self._jobs.values()))
        seconds = work * (self._row_seconds or 0) * count / max(1, self._images)
        return min(max(RETRY[0], math.ceil(seconds)), RETRY[1])


def _unexpected(error: Exception) -> PnpError:
    return PnpError(f"unexpected {type(error).__name__}: {printable(error, limit=500)}; try again")
