"""An engine that serves many clients: its own thread runs the step-level loop, and other threads submit and wait."""

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

#: maximum number of waiting images, besides the running ones
QUEUE = 64
#: shortest and longest Retry-After for a refused client, in seconds
RETRY = (1, 120)


class Busy(PnpError):
    """The queue is full.

    Attributes:
        retry_after: estimated seconds until there is room.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Expired(PnpError):
    """The request's deadline passed before its images were complete."""


class Stopping(PnpError):
    """The server is stopping and takes no more requests."""


@dataclass(frozen=True)
class JobProgress:
    """Progress of a job.

    Attributes:
        steps_done, steps: of all its images.
        running: number of its images in the engine's calls.
        over: whether it has ended.
        seconds: since it was submitted.
        left: estimated seconds until it ends; None before the first step.
    """

    steps_done: int
    steps: int
    running: int
    over: bool
    seconds: float
    left: float | None


@dataclass(eq=False)
class Job:
    """A request for one or more images.

    Attributes:
        id: unique identifier.
        prepared: what to generate.
        future: its images in order; or Busy, Expired, Cancelled or another ``PnpError``.
        submitted, admitted, ended: times on the monotonic clock, in seconds; None until then.
        deadline: on the same clock.
        partial: the unfinished image that is returned when a client interrupts the job.
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
        """Number of images."""
        return len(self.prepared.prompts)

    @property
    def evaluations(self) -> int:
        """Model evaluations of one image."""
        return len(self.prepared.table) * self.prepared.rows

    def progress(self) -> JobProgress:
        """Current progress; thread-safe."""
        now = time.monotonic()
        steps = len(self.prepared.table) * self.count
        steps_done = sum(ticket.steps_done for ticket in tuple(self.tickets))
        left = None
        if steps_done and self.admitted is not None:
            left = max(0.0, (now - self.admitted) / steps_done * (steps - steps_done))
        running = sum(ticket.running for ticket in tuple(self.tickets))
        return JobProgress(
            steps_done, steps, running, self.ended is not None, (self.ended or now) - self.submitted, left
        )


class Watcher:
    """Callbacks for an engine's events, called from the engine's thread; they must return soon."""

    def stepped(self, rows: int, padded: int, calls: int, seconds: float) -> None:
        """The loop made ``calls`` network calls with ``rows`` rows of images and ``padded`` rows of padding."""

    def ended(self, job: Job, error: PnpError | None) -> None:
        """A job has ended."""


@dataclass(frozen=True)
class EngineOptions:
    """Options for loading a bundle's engine.

    Attributes:
        slots, queue_size: as for :class:`Engine`.
        provider, threads: as for ``Pipeline.load``.
    """

    slots: int = SLOTS
    queue_size: int = QUEUE
    provider: str = "auto"
    threads: int | None = None


class Engine:
    """Serves one pipeline.

    Any thread may submit requests of any number of steps, w, schedule, method and size.  One thread, which this class
    starts, does all of the work.  Each image is byte-identical to the one that the pipeline generates alone.

    Args:
        pipeline: the bundle's pipeline; using it elsewhere at the same time slows both down.
        slots: maximum rows of an engine call; an image takes two with CFG and one with other methods.
        queue_size: maximum number of waiting images.
        watcher: notified of steps and ended jobs.

    Raises:
        InputError: as for ``Pipeline.step_loop``, or for a queue size below 0.
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

    # -- thread-safe ---------------------------------------------------------------------------------------------------
    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._stopping

    @property
    def images(self) -> int:
        """Number of waiting and running images."""
        return self._images

    @property
    def waiting(self) -> int:
        """Number of waiting images."""
        return max(0, self._images - len(self._loop.running))

    @property
    def rows_running(self) -> int:
        """Number of rows of a call that are in use."""
        return self._loop.rows_running

    def jobs(self) -> list[Job]:
        """Waiting and running jobs, the oldest first."""
        with self._lock:
            return list(self._jobs.values())

    def submit(self, prepared: Prepared, deadline: float | None = None) -> Job:
        """Put a request in the queue.

        Args:
            prepared: from ``Pipeline.prepare``.
            deadline: seconds after which it is dropped, even if it is running; None for never.

        Raises:
            InputError, Busy, Stopping: as for :meth:`submit_job`.
        """
        job = Job(prepared)
        self.submit_job(job, deadline)
        return job

    def submit_job(self, job: Job, deadline: float | None = None, since: float | None = None) -> None:
        """Same as :meth:`submit`, for an existing job that was not submitted yet.

        Args:
            since: arrival time of the request on the monotonic clock, in seconds; None for now.

        Raises:
            InputError: if it can never be served: its method is not one of ``step_methods``, or it has more images or
                rows than there is room for.
            Busy: if the queue has no room for all of its images.
            Stopping: if the engine is stopping.
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
        job.future.set_running_or_notify_cancel()  # from here on, only this engine ends the future
        with self._lock:
            if self._stopping or not self._thread.is_alive():
                raise Stopping(f"engine '{pipeline.name}' is being stopped; use another server, or retry later")
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
        """Cancel a waiting or running job, so that its future ends with ``Cancelled``; an ended job is unchanged."""
        self._inbox.put(lambda: self._drop(job, None))

    def preview(self, job: Job) -> Future[np.ndarray | None]:
        """The current estimate of one of the job's images, uint8 ``[H, W, 3]``; None if the job is not running."""
        preview: Future[np.ndarray | None] = Future()
        preview.set_running_or_notify_cancel()

        def make() -> None:
            try:
                estimates = [t.estimate() for t in job.tickets if t.running]
                estimate = next((e for e in estimates if e is not None), None)
                preview.set_result(None if estimate is None else self.pipeline.decode(estimate[None])[0])
            except Exception as e:
                preview.set_exception(e)

        with self._lock:
            if self._thread.is_alive() and job.id in self._jobs:
                self._inbox.put(make)
            else:
                preview.set_result(None)
        return preview

    def stop(self, drain: bool = True) -> bool:
        """Stop taking requests, and end.

        Args:
            drain: whether waiting and running requests are completed; else they are cancelled.

        Returns:
            Whether all requests were completed.
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
                self._run_commands(block=idle)
                self._expire()
                self._step()
            except Exception as e:  # a bug here or in a runtime: the running jobs have lost their state
                running = {self._owners[t][0] for t in self._loop.running if t in self._owners}
                for job in running or self.jobs():  # without a running job, drop all, so that the error does not repeat
                    self._drop(job, _unexpected(e))

    def _run_commands(self, block: bool) -> None:
        """Run the commands in the inbox; if ``block``, wait for the first one."""
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
        seconds = time.perf_counter() - start
        calls, rows, padded = loop.calls - before[0], loop.rows_used - before[1], loop.rows_padded - before[2]
        if rows:
            row_seconds = seconds / rows
            self._row_seconds = (
                row_seconds if self._row_seconds is None else 0.9 * self._row_seconds + 0.1 * row_seconds
            )
            self.watcher.stepped(rows, padded, calls, seconds)
        for ticket in ended:
            if (owner := self._owners.pop(ticket, None)) is not None:
                self._ended(ticket, *owner)

    def _ended(self, ticket: Ticket, job: Job, i: int) -> None:
        """Handle an image that has left the loop: decode it, or end its job."""
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
        """Remove a job's images from the loop and end it with ``error``, or as cancelled."""
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
        with contextlib.suppress(Exception):  # an error in the metrics must not lose the images
            self.watcher.ended(job, error)
        if error is None:
            job.future.set_result([job.images[i] for i in range(job.count)])
        else:
            job.future.set_exception(error)

    def _retry_after(self, count: int) -> int:
        """Estimated seconds until there is room for ``count`` images."""
        work = sum(p.steps - p.steps_done for p in (job.progress() for job in self._jobs.values()))
        seconds = work * (self._row_seconds or 0) * count / max(1, self._images)
        return min(max(RETRY[0], math.ceil(seconds)), RETRY[1])


def _unexpected(error: Exception) -> PnpError:
    return PnpError(f"unexpected {type(error).__name__}: {printable(error, limit=500)}; try again")
