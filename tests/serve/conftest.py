"""A server of the micro bundles on a free local port, in a thread of the tests' process."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pnp_trt.bundle.store import Bundle
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.serve.engine import Engine, Job, Watcher
from pnp_trt.serve.loras import LoraEngines

if TYPE_CHECKING:
    from pnp_trt.serve.http.metrics import Metrics

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")


@dataclass
class Held(Watcher):
    """Forward events to the metrics; while ``gate`` is closed, the engine pauses after a call."""

    inner: Watcher
    gate: threading.Event = field(default_factory=threading.Event)

    def stepped(self, rows: int, padded: int, calls: int, seconds: float) -> None:
        self.inner.stepped(rows, padded, calls, seconds)
        self.gate.wait(600)

    def ended(self, job: Job, error: Exception | None) -> None:
        self.inner.ended(job, error)  # type: ignore[arg-type]


@dataclass
class Running:
    """A running server."""

    url: str
    port: int
    engines: dict[str, Engine]

    @property
    def gate(self) -> threading.Event:
        watcher = self.engines["guided"].watcher
        assert isinstance(watcher, Held)
        return watcher.gate

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """Pause the guided engine after its next call, until the block ends."""
        self.gate.clear()
        try:
            yield
        finally:
            self.gate.set()

    def wait_for(self, jobs: int) -> None:
        """Wait until the guided engine has ``jobs`` jobs and, if there are any, one of them has made a step."""
        deadline = time.monotonic() + 600
        engine = self.engines["guided"]
        while len(engine.jobs()) != jobs or (jobs and not any(job.progress().steps_done for job in engine.jobs())):
            assert time.monotonic() < deadline, [job.progress() for job in engine.jobs()]
            time.sleep(0.002)


@contextlib.contextmanager
def serving(
    pipelines: dict[str, Pipeline],
    body_seconds: float = 30.0,
    loras: Callable[[Callable[[Bundle], Engine]], LoraEngines] | None = None,
    **options: object,
) -> Iterator[Running]:
    """Serve pipelines with two slots and a queue for four more images.

    Args:
        loras: creates the engines with LoRAs from a function that creates the engine of a bundle.
    """
    from pnp_trt.serve.http import guard
    from pnp_trt.serve.http.app import create
    from pnp_trt.serve.http.metrics import Metrics
    from pnp_trt.serve.http.settings import Settings

    metrics = Metrics()
    engines: dict[str, Engine] = {}
    for name, pipeline in pipelines.items():
        watcher = Held(metrics.watch(name))
        watcher.gate.set()
        engines[name] = Engine(pipeline, slots=2, queue_size=4, watcher=watcher)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard.Guard.__init__, "__defaults__", (body_seconds,))
        with_loras = None if loras is None else loras(partial(_started, metrics))
        app = create(engines, metrics, Settings(**options), with_loras)  # type: ignore[arg-type]
        app.middleware_stack = app.build_middleware_stack()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    config = uvicorn.Config(
        app, log_level="critical", access_log=False, ws="none", lifespan="on", http="h11", loop="asyncio"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    deadline = time.monotonic() + 600
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    try:
        yield Running(f"http://127.0.0.1:{port}", port, engines)
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive() and not any(engine.alive for engine in engines.values())


def _started(metrics: Metrics, bundle: Bundle) -> Engine:
    pipeline = Pipeline(bundle, provider="cpu", threads=1)
    return Engine(pipeline, slots=2, queue_size=4, watcher=metrics.watch(bundle.name))


@pytest.fixture(scope="session")
def pipelines(micro_bundles: Path) -> dict[str, Pipeline]:
    return {name: Pipeline.load(micro_bundles / name, provider="cpu", threads=1) for name in ("guided", "plain")}


@pytest.fixture(scope="session")
def server(pipelines: dict[str, Pipeline]) -> Iterator[Running]:
    with serving(pipelines) as running:
        yield running
