"""The process of a server: engines, application, and uvicorn until a signal."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import uvicorn

from ...errors import InputError
from ...runtime.pipeline import Pipeline
from ..engine import QUEUE, SLOTS, Engine
from .app import create
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
        listener = self._listen()
        engines: dict[str, Engine] = {}
        metrics = Metrics()
        try:
            for name in self.names:
                pipeline = Pipeline.load(name, provider=self.provider, threads=self.threads)
                if pipeline.name in engines:
                    raise InputError(f"two engines have the name '{pipeline.name}'; name each once")
                engines[pipeline.name] = Engine(
                    pipeline, self.slots, self.queue_size, watcher=metrics.watch(pipeline.name)
                )
            app = create(engines, metrics, self.settings)
            config = uvicorn.Config(
                app, log_level="warning", access_log=False, limit_concurrency=MAX_CONNECTIONS, timeout_keep_alive=30,
                h11_max_incomplete_event_size=64 << 10, server_header=False, lifespan="on", ws="none",
            )  # fmt: skip
            server = uvicorn.Server(config)
            host = f"[{self.host}]" if ":" in self.host else self.host
            self.ready(f"http://{host}:{listener.getsockname()[1]}")
            server.run(sockets=[listener])
        finally:
            for engine in engines.values():
                engine.stop(drain=False)
            listener.close()

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self.host, self.port))
        except (OSError, OverflowError) as e:
            listener.close()
            raise InputError(
                f"cannot listen at {self.host}, port {self.port} ({getattr(e, 'strerror', None) or e}); name another "
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
