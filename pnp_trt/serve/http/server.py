"""The process of a server: engines, application, and uvicorn until a signal."""

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

#: addresses that only this machine reaches
LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class LoraOffer:
    """LoRAs that requests may name.

    It can be pickled where ``plug`` and ``check`` can, as those of a ``PlugCache``.

    Attributes:
        files: as of ``read_loras``.
        plug: merges them into a bundle; may be called by several processes.
        check: raises ``InputError`` for a bundle that none can be merged into.
        most_loaded: engines with LoRAs, at most.
    """

    files: Mapping[str, LoraFile]
    plug: Plug
    check: Callable[[Bundle], None]
    most_loaded: int = MOST_LOADED


@dataclass(frozen=True)
class Site:
    """What is served, and where.

    Attributes:
        names: bundles, by name or folder.
        port: 0 takes a free one.
        options: of every engine.
        ready: called with the server's address when it takes requests.
    """

    names: Sequence[str]
    host: str = "127.0.0.1"
    port: int = 7860
    options: EngineOptions = field(default_factory=EngineOptions)
    settings: Settings = field(default_factory=Settings)
    ready: Callable[[str], object] = print


def serve(site: Site, loras: LoraOffer | None = None) -> None:
    """Serve until SIGINT or SIGTERM; what runs or waits then is finished, and a second signal ends it at once.

    Args:
        loras: that requests may name; None offers none.

    Raises:
        InputError: if a bundle cannot be loaded, two have one name, or the address cannot be listened at.
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
    """What makes engines with LoRAs, as those of :func:`load_engines`; None without an offer."""
    if offer is None:
        return None
    start = partial(start_engine, options=options, metrics=metrics)
    return LoraEngines(offer.files, offer.plug, start, offer.most_loaded, options.queue_size + 1)


def open_bundles(names: Sequence[str | Path], loras: LoraOffer | None = None) -> list[Bundle]:
    """Bundles, every file checked, before anything is loaded.

    Raises:
        InputError: if one cannot be opened, two have one name, or LoRAs are offered and none can be merged into one.
    """
    bundles = [open_bundle(name) for name in names]
    called = [bundle.name for bundle in bundles]
    if twice := next((name for name in called if called.count(name) > 1), None):
        raise InputError(f"two engines have the name '{twice}'; name each once")
    if loras is not None:
        for bundle in bundles:
            loras.check(bundle)
    return bundles


def start_engine(bundle: Bundle, options: EngineOptions, metrics: Metrics) -> Engine:
    """The engine of a bundle; ``metrics`` watches it under the bundle's name."""
    pipeline = Pipeline(bundle, provider=options.provider, threads=options.threads)
    return Engine(pipeline, options.slots, options.queue_size, watcher=metrics.watch(bundle.name))


def load_engines(bundles: Sequence[Bundle], options: EngineOptions, metrics: Metrics) -> dict[str, Engine]:
    """An engine of each bundle, by its name; ``metrics`` watches them.

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
