"""What the interfaces share: which engine, a request's images, and the client that may leave meanwhile."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import io
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import Request

from ...errors import BundleNotFound, InputError
from ...io.image_files import FORMATS, decode_rgb
from ...io.inputs import excerpt
from ...runtime.images import encode_image
from ...runtime.pipeline import Picture
from ...runtime.prompt_syntax import PLAIN
from ..engine import Busy, Engine, Job
from .errors import Refused
from .metrics import Metrics
from .settings import DECODERS, MAX_PIXELS, Settings

#: seeds that a client that names none is given; those below are exact in JavaScript and in 32 bits
_SEEDS = 2**31


@dataclass(frozen=True)
class Asked:
    """A request in the terms of ``Pipeline.prepare``, whatever interface it came by.

    Attributes:
        engine: its name; None takes the server's first.
        prompt, negative: texts; an empty negative prompt is none.
        seed: of the first image, each next adds 1; None takes a random one.
        size: height and width in pixels; None takes the engine's own.
        init: pixels uint8 ``[H, W, 3]`` to begin with.
        syntax: of the prompts, one of ``SYNTAXES``.
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


@dataclass
class Service:
    """Engines by name, and what all requests of one server share.

    Attributes:
        engines: at least one; the first serves requests that name none.
        owners: who sent a job that runs: the interface and the client's address.
    """

    engines: dict[str, Engine]
    metrics: Metrics
    settings: Settings

    def __post_init__(self) -> None:
        self.owners: dict[Job, tuple[str, str]] = {}
        self._decoders = asyncio.Semaphore(DECODERS)

    def engine(self, name: str | None) -> Engine:
        """The engine of this name; None takes the first.

        Raises:
            BundleNotFound: with the names that there are.
        """
        if name is None:
            return next(iter(self.engines.values()))
        if name not in self.engines:
            raise BundleNotFound(f"model is {excerpt(name)}; this server has: {', '.join(self.engines)}")
        return self.engines[name]

    async def submit(self, request: Request, api: str, asked: Asked) -> Job:
        """A request checked and in its engine's queue; :meth:`wait` must follow.

        A negative prompt that an engine's guide cannot take is served by CFG on the same engine.

        Raises:
            PnpError: as ``Pipeline.prepare`` and ``Engine.submit`` do.
        """
        engine = self.engine(asked.engine)
        pipeline = engine.pipeline
        method = asked.method
        if method is None and asked.negative and not pipeline.negative_prompts and "cfg" in pipeline.step_methods:
            method = "cfg"
        first = secrets.randbelow(_SEEDS) if asked.seed is None else asked.seed
        given: dict[str, Any] = {} if asked.guidance is None else {"guidance": asked.guidance}
        prepared = await asyncio.to_thread(
            pipeline.prepare, [asked.prompt] * asked.count, steps=asked.steps, method=method,
            seed=[first + i for i in range(asked.count)], negative=asked.negative or None, schedule=asked.schedule,
            init=asked.init, strength=asked.strength, size=asked.size, prompt_syntax=asked.syntax, **given,
        )  # fmt: skip
        job = Job(prepared)
        if asked.name is not None:
            if any(held.id == asked.name for held in self.owners):
                raise Refused(409, f"a request with the id {excerpt(asked.name)} is running; choose another")
            job.id = asked.name
        try:
            engine.submit_job(job, self.settings.deadline)
        except Busy:
            self.metrics.requests.labels(pipeline.name, "429").inc()
            raise
        self.owners[job] = api, request.client.host if request.client else ""
        return job

    async def wait(self, request: Request, job: Job) -> list[Picture]:
        """The images of a job; it is cancelled when its client goes.

        Raises:
            PnpError: for what happened on the way.
        """
        engine = self.engines[job.prepared.engine]
        done = asyncio.ensure_future(asyncio.wrap_future(job.future))
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((done, gone), return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                engine.cancel(job)
            return await done
        finally:
            self.owners.pop(job, None)
            if not done.done():  # the server ends the request
                engine.cancel(job)
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone

    async def files(self, pictures: Sequence[Picture], kind: str) -> list[bytes]:
        """The images as files of ``png``, ``webp`` or ``jpeg``, their parameters inside."""
        return await asyncio.to_thread(
            lambda: [encode_image(p.pixels, p.parameters, kind, Path(f"image {i}")) for i, p in enumerate(pictures)]
        )

    async def pixels(self, data: bytes, name: str) -> np.ndarray:
        """An image file that a client sent, uint8 ``[H, W, 3]``.

        Raises:
            InputError: if it is not an image, or has more than ``MAX_PIXELS``.
        """
        async with self._decoders:
            return await asyncio.to_thread(decode_rgb, io.BytesIO(data), name, FORMATS, MAX_PIXELS)

    def job(self, name: str) -> tuple[Engine, Job]:
        """A job that waits or runs, and its engine.

        Raises:
            Refused: 404 if there is none.
        """
        for engine in self.engines.values():
            if (job := engine.job(name)) is not None:
                return engine, job
        raise Refused(404, f"no request with the id {excerpt(name)} waits or runs; ask for one that does")

    def jobs_of(self, api: str, request: Request) -> list[tuple[Engine, Job]]:
        """The jobs that wait or run and that came by one interface from the same address, the oldest first."""
        mine = api, request.client.host if request.client else ""
        found = [
            (engine, job) for engine in self.engines.values() for job in engine.jobs() if self.owners.get(job) == mine
        ]
        return sorted(found, key=lambda pair: pair[1].submitted)


async def _gone(request: Request) -> None:
    """Wait until the client goes; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def from_base64(text: str, name: str) -> bytes:
    """The bytes of an image in base64, with or without the head of a data URL.

    Raises:
        InputError: for anything else, a path or an address among it: nothing is opened on a client's word.
    """
    head, comma, rest = text.partition(",")
    if comma and not (head.startswith("data:") and head.endswith(";base64")):
        raise InputError(f"{name} is not an image in base64; send its bytes, no path and no address")
    try:
        return base64.b64decode("".join((rest if comma else text).split()), validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{name} is not an image in base64; send its bytes, no path and no address") from None
