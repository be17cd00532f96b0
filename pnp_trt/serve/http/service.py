"""Code shared by the interfaces: choice of the engine, a request's images, and clients that disconnect."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import io
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import Request

from ...errors import BundleNotFound, Cancelled, InputError
from ...io.image_files import FORMATS, decode_rgb
from ...io.inputs import excerpt
from ...io.text import printable
from ...runtime.images import encode_image
from ...runtime.pipeline import GeneratedImage
from ...runtime.prompt_syntax import PLAIN
from ..engine import Busy, Engine, Expired, Job
from ..loras import Lease, LoraEngines, Loras
from .errors import Refused
from .metrics import Metrics
from .settings import DECODERS, MAX_IGNORED, MAX_PIXELS, MAX_TEXT, Settings

#: random seeds are below this, so that they are exact in JavaScript and fit 32 bits
_SEEDS = 2**31


@dataclass(frozen=True)
class GenerationRequest:
    """A request in the terms of ``Pipeline.prepare``, independent of the interface.

    Attributes:
        engine: name of the engine; None takes the server's first.
        prompt, negative: texts; an empty negative prompt means none.
        seed: seed of the first image; each next image adds 1.  None takes a random one.
        size: height and width in pixels; None takes the engine's own.
        init: pixels of an initial image, uint8 ``[H, W, 3]``.
        syntax: syntax of the prompts, one of ``SYNTAXES``.
        name: id of the request, if the client chose one.
        loras: names and scales, as the client stated them.
    """

    prompt: str
    engine: str | None = None
    count: int = 1
    negative: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    method: str | None = None
    schedule: str | None = None
    size: tuple[int, int] | None = None
    init: np.ndarray | None = None
    strength: float | None = None
    syntax: str = PLAIN
    name: str | None = None
    loras: Loras = ()


@dataclass(frozen=True)
class Owner:
    """The client that sent a job, and the engine that serves it.

    Attributes:
        api, address: the interface and the client's address.
        engine: the engine of the job; the one without LoRAs while the one with LoRAs is being made.
        lease: lease of an engine with LoRAs.
        loading: set to cancel a job whose engine is being made; None once an engine has the job.
    """

    api: str
    address: str
    engine: Engine
    lease: Lease | None
    loading: asyncio.Event | None = None


@dataclass
class Service:
    """Engines by name, and the state that all requests of a server share.

    Attributes:
        engines: at least one; the first serves requests that name none.
        loras: engines with LoRAs, or None if the server offers none.
        owners: by job, until it ends.
    """

    engines: dict[str, Engine]
    metrics: Metrics
    settings: Settings
    loras: LoraEngines | None = None

    def __post_init__(self) -> None:
        self.owners: dict[Job, Owner] = {}
        self._decoders = asyncio.Semaphore(DECODERS)

    def engine(self, name: str | None) -> Engine:
        """The engine with this name; None takes the first.

        Raises:
            BundleNotFound: if there is none; the message lists the names.
        """
        if name is None:
            return next(iter(self.engines.values()))
        if name not in self.engines:
            raise BundleNotFound(f"model is {excerpt(name)}; this server has: {', '.join(self.engines)}")
        return self.engines[name]

    async def submit(self, request: Request, api: str, asked: GenerationRequest) -> Job:
        """Check a request and put it into its engine's queue; :meth:`wait` must follow.

        A request with LoRAs waits here until their engine is loaded.

        Raises:
            PnpError: as for ``Pipeline.prepare``, ``LoraEngines`` and ``Engine.submit``; or Expired, Cancelled.
        """
        since = time.monotonic()
        engine = self.engine(asked.engine)
        loras = self._checked(asked.loras)
        pipeline = engine.pipeline
        first = secrets.randbelow(_SEEDS) if asked.seed is None else asked.seed
        options: dict[str, Any] = {} if asked.guidance is None else {"guidance": asked.guidance}
        prepared = await asyncio.to_thread(
            pipeline.prepare, [asked.prompt] * asked.count, steps=asked.steps, method=asked.method,
            seed=[first + i for i in range(asked.count)], negative=asked.negative or None, schedule=asked.schedule,
            init=asked.init, strength=asked.strength, size=asked.size, prompt_syntax=asked.syntax, **options,
        )  # fmt: skip
        job = Job(replace(prepared, loras=loras), submitted=since)
        if asked.name is not None:
            if any(other.id == asked.name for other in self.owners):
                raise Refused(409, f"a request with the id {excerpt(asked.name)} is running; choose another")
            job.id = asked.name
        lease = None
        try:
            if self.loras is not None and loras:
                lease = self.loras.acquire(engine, loras)
                self.owners[job] = owner = Owner(api, address_of(request), engine, lease, asyncio.Event())
                engine = await self._loaded(request, owner, since)
            engine.submit_job(job, self.settings.deadline, since)
        except BaseException as e:
            self.owners.pop(job, None)
            if lease is not None:
                lease.release()
            if isinstance(e, Busy):
                self.metrics.requests.labels(pipeline.name, "429").inc()
            raise
        self.owners[job] = Owner(api, address_of(request), engine, lease)
        return job

    def _checked(self, loras: Loras) -> Loras:
        if self.loras is not None:
            return self.loras.check(loras)
        if loras:
            raise InputError(
                f"the LoRA {excerpt(loras[0][0])} is named and this server offers none; leave it out, or start the "
                "server with --loras DIR"
            )
        return ()

    async def _loaded(self, request: Request, owner: Owner, since: float) -> Engine:
        """The engine of a lease; raises ``Expired`` or ``Cancelled`` if it is not loaded in time."""
        assert owner.lease is not None and owner.loading is not None
        engine_future = asyncio.wrap_future(owner.lease.future)
        # retrieve a late error, which asyncio would otherwise log as never retrieved
        engine_future.add_done_callback(lambda done: done.cancelled() or done.exception())
        ready = asyncio.shield(engine_future)  # other requests wait for it too
        gone = asyncio.ensure_future(_gone(request))
        stopped = asyncio.ensure_future(owner.loading.wait())
        try:
            left = max(0.0, since + self.settings.deadline - time.monotonic())
            await asyncio.wait((ready, gone, stopped), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done():
                raise Cancelled("the request was cancelled while its LoRA was loaded")
            if ready.done():
                return await ready
            if gone.done():
                raise Cancelled("the client disconnected while its LoRA was loaded")
            raise Expired(
                f"the engine with the LoRA was not loaded within {self.settings.deadline:g} s; try again later"
            )
        finally:
            for each in (ready, gone, stopped):
                each.cancel()
            for each in (gone, stopped):
                with contextlib.suppress(asyncio.CancelledError):
                    await each

    async def wait(self, request: Request, job: Job) -> list[GeneratedImage]:
        """The images of a job, which is cancelled when its client disconnects.

        Raises:
            PnpError: the error that the job ended with.
        """
        owner = self.owners[job]
        engine = owner.engine
        done = asyncio.ensure_future(asyncio.wrap_future(job.future))
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((done, gone), return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                engine.cancel(job)
            return await done
        finally:
            self.owners.pop(job, None)
            if not done.done():  # the server cancelled this task
                engine.cancel(job)
            if owner.lease is not None:
                owner.lease.release()
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone

    async def files(self, images: Sequence[GeneratedImage], kind: str) -> list[bytes]:
        """The images as ``png``, ``webp`` or ``jpeg`` files that contain their parameters."""
        return await asyncio.to_thread(
            lambda: [encode_image(p.pixels, p.parameters, kind, Path(f"image {i}")) for i, p in enumerate(images)]
        )

    async def pixels(self, data: bytes, name: str) -> np.ndarray:
        """An image file that a client sent, uint8 ``[H, W, 3]``.

        Raises:
            InputError: if it is not an image, or has more than ``MAX_PIXELS``.
        """
        async with self._decoders:
            return await asyncio.to_thread(decode_rgb, io.BytesIO(data), name, FORMATS, MAX_PIXELS)

    def job_or_none(self, name: str) -> tuple[Engine, Job] | None:
        """A waiting or running job by its id, and its engine; None if there is none."""
        matches = ((owner.engine, job) for job, owner in self.owners.items() if job.id == name and job.ended is None)
        return next(matches, None)

    def job(self, name: str) -> tuple[Engine, Job]:
        """Same as :meth:`job_or_none`.

        Raises:
            Refused: 404 if there is none.
        """
        if (match := self.job_or_none(name)) is None:
            raise Refused(404, f"no request with the id {excerpt(name)} waits or runs; use the id of one that does")
        return match

    def state(self, job: Job) -> str:
        """The state of a job: ``loading`` (its engine with LoRAs is being made), ``waiting`` or ``running``."""
        if (owner := self.owners.get(job)) is not None and owner.loading is not None:
            return "loading"
        return "running" if job.progress().running else "waiting"

    def cancel(self, job: Job) -> None:
        """End a job with ``Cancelled``, whatever its state; a job that has ended is not changed."""
        if (owner := self.owners.get(job)) is None:
            return
        if owner.loading is not None:
            owner.loading.set()
        else:
            owner.engine.cancel(job)

    def jobs_of(self, api: str, request: Request) -> list[tuple[Engine, Job]]:
        """The waiting and running jobs of one interface from the same address, the oldest first."""
        origin = api, address_of(request)
        matches = [
            (o.engine, job) for job, o in self.owners.items() if (o.api, o.address) == origin and job.ended is None
        ]
        return sorted(matches, key=lambda pair: pair[1].submitted)


def address_of(request: Request) -> str:
    """The client's address; empty if the server does not know it."""
    return request.client.host if request.client else ""


async def _gone(request: Request) -> None:
    """Wait until the client disconnects; the request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def ignored(names: Iterable[str]) -> list[str]:
    """Fields of a request that were not applied, for its answer: at most ``MAX_IGNORED``."""
    return [printable(name, limit=MAX_TEXT) for name in sorted(names)[:MAX_IGNORED]]


def from_base64(text: str, name: str) -> bytes:
    """The bytes of an image in base64, with or without the prefix of a data URL.

    Raises:
        InputError: for anything else, including a path or an address: a client cannot make the server open either.
    """
    head, comma, rest = text.partition(",")
    if comma and not (head.startswith("data:") and head.endswith(";base64")):
        raise InputError(f"{name} is not an image in base64; send its bytes, not a path or an address")
    try:
        return base64.b64decode("".join((rest if comma else text).split()), validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{name} is not an image in base64; send its bytes, not a path or an address") from None
