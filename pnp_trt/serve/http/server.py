"""The process of a server: engines, application, and uvicorn until a signal."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import uvicorn

from ...bundle.store import Bundle, open_bundle
from ...errors import InputError
from ...runtime.pipeline import Pipeline
from ..engine import QUEUE, SLOTS, Engine
from ..loras import MOST_LOADED, LoraEngines, LoraFile, Plug
from .app import create
from .guard import App
from .metrics import Metrics
from .settings import MAX_CONNECTIONS, Settings

#: addresses that only this machine reaches
LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class LoraOffer:
    """LoRAs that requests may name.

    Attributes:
        files: as of ``read_loras``.
        plug: merges them into a bundle.
        check: raises ``InputError`` for a bundle that none can be merged into.
        most_loaded: engines with LoRAs, at most.
    """

    files: Mapping[str, LoraFile]
    plug: Plug
    check: Callable[[Bundle], None]
    most_loaded: int = MOST_LOADED


@dataclass(frozen=True)
class Server:
    """What is served, and where.

    Attributes:
        names: bundles, by name or folder.
        port: 0 takes a free one.
        provider, threads: as of ``Pipeline.load``.
        ready: called with the server's address when it takes requests.
        loras: that requests may name; None offers none.
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
    loras: LoraOffer | None = None

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM; what runs or waits then is finished, and a second signal ends it at once.

        Raises:
            InputError: if a bundle cannot be loaded, two have one name, or the address cannot be listened at.
        """
        listener = listen(self.host, self.port)
        engines: dict[str, Engine] = {}
        metrics = Metrics()
        loras = self._loras(metrics)
        try:
            check = None if self.loras is None else self.loras.check
            engines = load_engines(self.names, self.slots, self.queue_size, self.provider, self.threads, metrics, check)
            serve_app(create(engines, metrics, self.settings, loras), listener, self.host, self.ready)
        finally:
            if loras is not None:
                loras.stop(drain=False)
            for engine in engines.values():
                engine.stop(drain=False)
            listener.close()

    def _loras(self, metrics: Metrics) -> LoraEngines | None:
        if self.loras is None:
            return None

        def start(bundle: Bundle) -> Engine:
            return start_engine(bundle, self.slots, self.queue_size, self.provider, self.threads, metrics)

        return LoraEngines(self.loras.files, self.loras.plug, start, self.loras.most_loaded, self.queue_size + 1)


def start_engine(
    bundle: Bundle, slots: int, queue_size: int, provider: str, threads: int | None, metrics: Metrics
) -> Engine:
    """The engine of a bundle; ``metrics`` watches it under the bundle's name."""
    pipeline = Pipeline(bundle, provider=provider, threads=threads)
    return Engine(pipeline, slots, queue_size, watcher=metrics.watch(bundle.name))


def load_engines(
    names: Sequence[str | Path],
    slots: int,
    queue_size: int,
    provider: str,
    threads: int | None,
    metrics: Metrics,
    check: Callable[[Bundle], None] | None = None,
) -> dict[str, Engine]:
    """An engine of each bundle, by its name; ``metrics`` watches them.

    Args:
        check: raises ``InputError`` for a bundle that is not to be served.

    Raises:
        InputError: if a bundle cannot be loaded, or two have one name; the engines before it are stopped.
    """
    engines: dict[str, Engine] = {}
    try:
        for name in names:
            bundle = open_bundle(name)
            if bundle.name in engines:
                raise InputError(f"two engines have the name '{bundle.name}'; name each once")
            if check is not None:
                check(bundle)
            engines[bundle.name] = start_engine(bundle, slots, queue_size, provider, threads, metrics)
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
