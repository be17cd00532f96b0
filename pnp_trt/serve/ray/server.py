"""The process of a server with replicas: Ray, the replicas, and uvicorn in front of them, until a signal."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...errors import InputError, PnpError
from ...io.text import printable
from ..http.guard import Guard
from ..http.server import LoraOffer, Site, listen, open_bundles, serve_app
from ..http.settings import MAX_CONNECTIONS
from .cluster import cluster, placed, quiet
from .front import Front
from .replica import NAME, Spec, application

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

#: matches an error of this package in a replica's traceback
_ERROR = re.compile(r"pnp_trt\.errors\.\w+: (.*)")


def serve(
    site: Site, replicas: int | None = None, fewest: int | None = None, loras: LoraOffer | None = None
) -> None:  # fmt: skip
    """Serve until SIGINT or SIGTERM.  Waiting and running requests are completed; a second signal ends them at once.

    Args:
        site: what to serve, with the options of each replica's engines.
        replicas: maximum number; None takes the cluster's GPUs, or 1.
        fewest: minimum number; None takes ``replicas``.
        loras: LoRAs that requests may name; None offers none.

    Raises:
        InputError: as for ``open_bundles``, or if the address is not available or a number of replicas is invalid.
        PnpError: if no replica starts.
    """
    bundles = [bundle.folder.resolve() for bundle in open_bundles(site.names, loras)]
    if replicas is not None and fewest is not None and fewest > replicas:
        raise InputError(f"--min-replicas is {fewest} and --replicas is {replicas}; give at most as many")
    listener = listen(site.host, site.port)
    try:
        with cluster(replicas or fewest or 1) as output:
            most, resources = placed(site.options.provider, replicas)
            most = max(most, fewest or 1)
            spec = Spec(bundles, site.settings, site.options, resources, (fewest or most, most), loras)

            def ready(address: str) -> None:
                with contextlib.redirect_stdout(output):
                    site.ready(address)

            with _deployed(spec) as handle:
                guard = Guard(Front(handle, site.settings.deadline), site.settings)
                serve_app(guard, listener, site.host, ready, "off", MAX_CONNECTIONS * most)
    finally:
        listener.close()


@contextlib.contextmanager
def _deployed(spec: Spec) -> Iterator[DeploymentHandle[Any]]:
    """Context manager that yields the application's handle once its replicas take requests, and stops them at the end.

    Raises:
        PnpError: if they do not start.
    """
    from ray import serve  # imported after Ray's environment is set

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    name = f"{NAME}-{secrets.token_hex(4)}"
    try:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
        try:
            handle = serve.run(application(spec), name=name, route_prefix=None, logging_config={"log_level": "ERROR"})
        except RuntimeError as e:
            deployments = serve.status().applications[name].deployments.values()
            reasons = [match[1] for each in deployments if (match := _ERROR.search(each.message))]
            reason = printable(reasons[0] if reasons else e, limit=500)
            raise PnpError(f"no replica started: {reason}") from None
        yield handle
    finally:
        with quiet():
            if os.environ.get("RAY_ADDRESS"):
                serve.delete(name)  # the cluster may run other applications
            else:
                serve.shutdown()
