"""A replica: the engines of one GPU with the application of :mod:`pnp_trt.serve.http`, in a Ray actor."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import PnpError
from ..engine import EngineOptions

if TYPE_CHECKING:
    from ray.serve import Application

    from ..http.server import LoraOffer
    from ..http.settings import Settings

#: name of the deployment, and prefix of the application's name
NAME = "pnp-trt"
#: seconds between health checks of a replica; a failed one is replaced
_HEALTH_PERIOD = 2.0
#: seconds of load above, or below, the replicas' slots before a replica is added, or removed
_UPSCALE, _DOWNSCALE = 10.0, 300.0


@dataclass(frozen=True)
class Spec:
    """Specification of the replicas.

    Attributes:
        bundles: folders, which must have the same path on every node of the cluster.
        options: of every engine of a replica.
        resources: reserved by Ray for a replica, by Ray's names.
        replicas: minimum and maximum; Ray scales their number with the load.
        loras: LoRAs that requests may name, with separate engines in each replica; None offers none.
    """

    bundles: Sequence[Path]
    settings: Settings
    options: EngineOptions
    resources: Mapping[str, float] = field(default_factory=dict)
    replicas: tuple[int, int] = (1, 1)
    loras: LoraOffer | None = None


@dataclass(frozen=True)
class Answer:
    """An HTTP response from a replica."""

    status: int
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""


class Replica:
    """The class of the Ray actor.

    Raises:
        InputError: if a bundle cannot be loaded.
    """

    def __init__(self, spec: Spec) -> None:
        import warnings

        from ..http.app import create
        from ..http.metrics import Metrics
        from ..http.server import load_engines, lora_engines, open_bundles

        warnings.filterwarnings("ignore", category=UserWarning)
        self._metrics = Metrics()
        bundles = open_bundles(spec.bundles, spec.loras)
        self._loras = lora_engines(spec.loras, spec.options, self._metrics)
        self._engines = load_engines(bundles, spec.options, self._metrics)
        self._app = create(self._engines, self._metrics, spec.settings, self._loras)

    async def respond(self, scope: dict[str, Any], body: bytes) -> Answer:
        """The application's response to a request.

        If the caller cancels the request, it leaves its engine.

        Args:
            scope: ASGI scope.
            body: the complete body of the request.
        """
        start: dict[str, Any] = {}
        parts: list[bytes] = []
        unread = [body]

        async def receive() -> MutableMapping[str, Any]:
            if not unread:
                await asyncio.Event().wait()  # the front detects that a client disconnects, and cancels this call
            return {"type": "http.request", "body": unread.pop(), "more_body": False}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                parts.append(message.get("body", b""))

        try:
            await self._app(scope, receive, send)
        except Exception:
            if not start:  # else the application has answered with 500, and raises the error for a server's log
                raise
        return Answer(start["status"], [(bytes(k), bytes(v)) for k, v in start["headers"]], b"".join(parts))

    async def figures(self) -> tuple[str, bytes]:
        """The replica's id and its metrics in Prometheus' format."""
        from ray import serve

        return str(serve.get_replica_context().replica_id.unique_id), self._metrics.text()

    def check_health(self) -> None:
        """Called by Ray Serve.

        Raises:
            PnpError: if an engine's thread has ended; Ray then replaces the replica.
        """
        for name, engine in self._engines.items():
            if not engine.alive:
                raise PnpError(f"engine '{name}' has ended; the replica must be replaced")

    def __del__(self) -> None:  # also called by Ray Serve, once the replica has no requests left
        if (loras := getattr(self, "_loras", None)) is not None:
            loras.stop(drain=False)
        for engine in getattr(self, "_engines", {}).values():
            engine.stop(drain=False)


def application(spec: Spec) -> Application:
    """The Ray Serve application; its handle has the methods of :class:`Replica`.

    A replica accepts as many requests as its engines have slots and places in their queues.  Replicas are added while
    they have more requests than slots.
    """
    from ray import serve

    fewest, most = spec.replicas
    slots, room = spec.options.slots, spec.options.slots + spec.options.queue_size
    deployment = serve.deployment(
        Replica,
        name=NAME,
        ray_actor_options=dict(spec.resources),
        max_ongoing_requests=room,
        max_queued_requests=room,
        autoscaling_config={
            "min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": slots,
            "upscale_delay_s": _UPSCALE, "downscale_delay_s": _DOWNSCALE,
        },
        health_check_period_s=_HEALTH_PERIOD,
        graceful_shutdown_timeout_s=spec.settings.deadline + 10,
        graceful_shutdown_wait_loop_s=0.5,
    )  # fmt: skip
    return deployment.bind(spec)
