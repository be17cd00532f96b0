"""The process of a server with replicas: Ray, the replicas, and uvicorn in front of them until a signal."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bundle.store import open_bundle
from ...errors import InputError, PnpError
from ...io.text import printable
from ..engine import QUEUE, SLOTS
from ..http.guard import Guard
from ..http.server import listen, serve_app
from ..http.settings import MAX_CONNECTIONS, Settings
from .cluster import cluster, placed, quiet
from .front import Front
from .replica import NAME, Spec, application

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

#: an error of this package in the traceback of a replica
_ERROR = re.compile(r"pnp_trt\.errors\.\w+: (.*)")


@dataclass(frozen=True)
class Server:
    """What is served by how many replicas, and where.

    Attributes:
        names: bundles, by name or folder.
        port: 0 takes a free one.
        slots, queue_size, provider, threads: of each replica.
        replicas: at most; None takes the cluster's GPUs, or 1.
        fewest: replicas that stay without load; None takes ``replicas``.
        ready: called with the server's address when a replica takes requests.
    """

    names: Sequence[str]
    host: str = "127.0.0.1"
    port: int = 7860
    slots: int = SLOTS
    queue_size: int = QUEUE
    provider: str = "auto"
    threads: int | None = None
    settings: Settings = field(default_factory=Settings)
    replicas: int | None = None
    fewest: int | None = None
    ready: Callable[[str], object] = print

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM; what runs or waits then is finished, and a second signal ends it at once.

        Raises:
            InputError: if a bundle cannot be opened, two have one name, the address cannot be listened at, or a number
                of replicas is wrong.
            PnpError: if no replica starts.
        """
        bundles = _opened(self.names)
        _check(self.replicas, self.fewest)
        listener = listen(self.host, self.port)
        try:
            with cluster(self.replicas or self.fewest or 1) as output:
                from ray import serve  # once Ray's environment is set

                most, resources = placed(self.provider, self.replicas)
                most = max(most, self.fewest or 1)
                spec = Spec(
                    bundles, self.settings, self.slots, self.queue_size, self.provider, self.threads, resources,
                    (self.fewest or most, most),
                )  # fmt: skip

                def ready(address: str) -> None:
                    with contextlib.redirect_stdout(output):
                        self.ready(address)

                name = f"{NAME}-{secrets.token_hex(4)}"
                try:
                    front = Front(_deployed(spec, name), self.settings.deadline)
                    guard = Guard(front, self.settings)
                    serve_app(guard, listener, self.host, ready, "off", MAX_CONNECTIONS * most)
                finally:
                    with quiet():
                        if os.environ.get("RAY_ADDRESS"):
                            serve.delete(name)  # the cluster may serve other applications
                        else:
                            serve.shutdown()
        finally:
            listener.close()


def _opened(names: Sequence[str]) -> list[Path]:
    """The folders of bundles, every file checked before Ray is started."""
    bundles = [open_bundle(name) for name in names]
    called = [bundle.name for bundle in bundles]
    if twice := next((name for name in called if called.count(name) > 1), None):
        raise InputError(f"two engines have the name '{twice}'; name each once")
    return [bundle.folder.resolve() for bundle in bundles]


def _check(replicas: int | None, fewest: int | None) -> None:
    if replicas is not None and fewest is not None and fewest > replicas:
        raise InputError(f"--min-replicas is {fewest} and --replicas is {replicas}; give at most as many")


def _deployed(spec: Spec, name: str) -> DeploymentHandle[Any]:
    """The handle of the application, once its replicas take requests.

    Raises:
        PnpError: if they do not start.
    """
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    try:
        return serve.run(application(spec), name=name, route_prefix=None, logging_config={"log_level": "ERROR"})
    except RuntimeError as e:
        deployments = serve.status().applications[name].deployments.values()
        reasons = [found[1] for each in deployments if (found := _ERROR.search(each.message))]
        reason = printable(reasons[0] if reasons else e, limit=500)
        raise PnpError(f"no replica started: {reason}") from None
