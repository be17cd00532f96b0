"""The server process: engines, the application, and uvicorn until a signal."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import uvicorn

from ...bundle.store import Bundle, open_bundle
from ...errors import InputError
from ...runtime.pipeline import Pipeline
from ..engine import Engine, EngineOptions
from ..loras import MOST_LOADED, LoraEngines, LoraFile, Plug
from .app import create
from .guard import App
from .metrics import Metrics
from .settings import MAX_CONNECTIONS, Settings

#: addresses that are reachable from this machine only
LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class LoraOffer:
    """LoRAs that requests may name.

    It can be pickled if ``plug`` and ``check`` can, as those of a ``PlugCache`` can.

    Attributes:
        files: from ``read_loras``.
        plug: merges them into a bundle; several processes may call it.
        check: raises ``InputError`` for a bundle that does not support LoRAs.
        most_loaded: maximum number of loaded engines with LoRAs.
    """

    files: Mapping[str, LoraFile]
    plug: Plug
    check: Callable[[Bundle], None]
    most_loaded: int = MOST_LOADED


@dataclass(frozen=True)
class Site:
    """The server's bundles, address and options.

    Attributes:
        names: bundles, by name or folder.
        port: 0 takes a free one.
        options: options of every engine.
        ready: called with the server's address when it takes requests.
    """

    names: Sequence[str]
    host: str = "127.0.0.1"
    port: int = 7860
    options: EngineOptions = field(default_factory=EngineOptions)
    settings: Settings = field(default_factory=Settings)
    ready: Callable[[str], object] = print


def serve(site: Site, loras: LoraOffer | None = None) -> None:
    """Serve until SIGINT or SIGTERM.  Waiting and running requests are completed; a second signal ends them at once.

    Args:
        loras: LoRAs that requests may name; None offers none.

    Raises:
        InputError: if a bundle cannot be loaded, two bundles have the same name, or the address is not available.
    """
    listener = listen(site.host, site.port)
    metrics = Metrics()
    engines: dict[str, Engine] = {}
    with_loras = None
    try:
        bundles = open_bundles(site.names, loras)
        with_loras = lora_engines(loras, site.options, metrics)
        engines = load_engines(bundles, site.options, metrics)
        serve_app(create(engines, metrics, site.settings, with_loras), listener, site.host, site.ready)
    finally:
        if with_loras is not None:
            with_loras.stop(drain=False)
        for engine in engines.values():
            engine.stop(drain=False)
        listener.close()


def lora_engines(offer: LoraOffer | None, options: EngineOptions, metrics: Metrics) -> LoraEngines | None:
    """The engines with LoRAs of a server, started as by :func:`load_engines`; None without an offer."""
    if offer is None:
        return None
    start = partial(start_engine, options=options, metrics=metrics)
    return LoraEngines(offer.files, offer.plug, start, offer.most_loaded, options.queue_size + 1)


def open_bundles(names: Sequence[str | Path], loras: LoraOffer | None = None) -> list[Bundle]:
    """Open bundles and verify every file, before anything is loaded.

    Raises:
        InputError: if a bundle cannot be opened or does not support the offered LoRAs, or two have the same name.
    """
    bundles = [open_bundle(name) for name in names]
    bundle_names = [bundle.name for bundle in bundles]
    if duplicate := next((name for name in bundle_names if bundle_names.count(name) > 1), None):
        raise InputError(f"two engines have the name '{duplicate}'; name each once")
    if loras is not None:
        for bundle in bundles:
            loras.check(bundle)
    return bundles


def start_engine(bundle: Bundle, options: EngineOptions, metrics: Metrics) -> Engine:
    """The engine of a bundle; ``metrics`` watches it under the bundle's name."""
    pipeline = Pipeline(bundle, provider=options.provider, threads=options.threads)
    return Engine(pipeline, options.slots, options.queue_size, watcher=metrics.watch(bundle.name))


def load_engines(bundles: Sequence[Bundle], options: EngineOptions, metrics: Metrics) -> dict[str, Engine]:
    """Start an engine for each bundle, by its name; ``metrics`` watches them.

    Raises:
        InputError: if a bundle cannot be loaded; the engines before it are stopped.
    """
    engines: dict[str, Engine] = {}
    try:
        for bundle in bundles:
            engines[bundle.name] = start_engine(bundle, options, metrics)
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
        lifespan: whether the application handles ASGI's lifespan events.
        connections: maximum number of simultaneous connections; more are refused with 503.
    """
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, limit_concurrency=connections, timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 << 10, server_header=False, lifespan=lifespan, ws="none",
        http="h11", loop="asyncio",  # even if httptools or uvloop is installed, because the limits here are h11's
    )  # fmt: skip
    server = uvicorn.Server(config)
    host = f"[{host}]" if ":" in host else host
    ready(f"http://{host}:{listener.getsockname()[1]}")
    server.run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        InputError: if the address is not available.
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
    """Refuse to serve other machines without an API key.

    Raises:
        InputError: unless ``host`` is this machine's own address, or there is a key.
    """
    if host not in LOCAL and settings.api_key is None:
        raise InputError(
            f"--host {host} is reached by other machines and there is no API key; set --api-key or PNP_TRT_API_KEY, "
            "or --no-key to serve everyone"
        )
