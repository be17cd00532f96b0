"""The process of a server: engines, application, and uvicorn until a signal."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import uvicorn

from ...errors import InputError
from ...runtime.pipeline import Pipeline
from ..engine import QUEUE, SLOTS, Engine
from .app import create
from .guard import App
from .metrics import Metrics
from .settings import MAX_CONNECTIONS, Settings

#: addresses that only this machine reaches
LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Server:
    """What is served, and where.

    Attributes:
        names: bundles, by name or folder.
        port: 0 takes a free one.
        provider, threads: as of ``Pipeline.load``.
        ready: called with the server's address when it takes requests.
    """

    names: Sequence[str]
    host: str = "127.0.0.1"
    port: int = 7860
    slots: int = SLOTS
    queue_size: int = QUEUE
    provider: str = "auto"
    threads: int | None = None
    settings: Settings = field(default_factory=Settings)
    ready: Callable[[str], object] = print

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM; what runs or waits then is finished, and a second signal ends it at once.

        Raises:
            InputError: if a bundle cannot be loaded, two have one name, or the address cannot be listened at.
        """
        listener = listen(self.host, self.port)
        engines: dict[str, Engine] = {}
        metrics = Metrics()
        try:
            engines = load_engines(self.names, self.slots, self.queue_size, self.provider, self.threads, metrics)
            serve_app(create(engines, metrics, self.settings), listener, self.host, self.ready)
        finally:
            for engine in engines.values():
                engine.stop(drain=False)
            listener.close()


def load_engines(
    names: Sequence[str | Path], slots: int, queue_size: int, provider: str, threads: int | None, metrics: Metrics
) -> dict[str, Engine]:
    """An engine of each bundle, by its name; ``metrics`` watches them.

    Raises:
        InputError: if a bundle cannot be loaded, or two have one name; the engines before it are stopped.
    """
    engines: dict[str, Engine] = {}
    try:
        for name in names:
            pipeline = Pipeline.load(name, provider=provider, threads=threads)
            if pipeline.name in engines:
                raise InputError(f"two engines have the name '{pipeline.name}'; name each once")
            engines[pipeline.name] = Engine(pipeline, slots, queue_size, watcher=metrics.watch(pipeline.name))
    except BaseException:
        for engine in engines.values():
            engine.stop(drain=False)
        raise
    return engines


def serve_app(
    app: App,
    listener: socket.socket,
    host: str,
    ready: Callable[[str], object],
    lifespan: Literal["on", "off"] = "on",
    connections: int = MAX_CONNECTIONS,
) -> None:
    """Serve an ASGI application until a signal.

    Args:
        listener: bound to ``host``.
        ready: called with the server's address.
        lifespan: whether the application takes ASGI's events of a server's start and end.
        connections: at once; more are refused with 503.
    """
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, limit_concurrency=connections, timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 << 10, server_header=False, lifespan=lifespan, ws="none",
        http="h11", loop="asyncio",  # whatever else is installed: its limits are h11's
    )  # fmt: skip
    server = uvicorn.Server(config)
    host = f"[{host}]" if ":" in host else host
    ready(f"http://{host}:{listener.getsockname()[1]}")
    server.run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 takes a free one.

    Raises:
        InputError: if it cannot be listened at.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as e:
        listener.close()
        raise InputError(
            f"cannot listen at {host}, port {port} ({getattr(e, 'strerror', None) or e}); name another "
            "--port, or an address of this machine"
        ) from None
    return listener


def check(settings: Settings, host: str) -> None:
    """Refuse a server that everyone reaches and nobody needs a key for.

    Raises:
        InputError: unless ``host`` is this machine's own address, or there is a key.
    """
    if host not in LOCAL and settings.api_key is None:
        raise InputError(
            f"--host {host} is reached by other machines and there is no API key; set --api-key or PNP_TRT_API_KEY, "
            "or --no-key to serve everyone"
        )
