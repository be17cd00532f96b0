"""A Ray cluster: one of this machine alone that ends with the block, or a running one that ``RAY_ADDRESS`` names."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

from ...errors import InputError, PnpError
from ...io.text import printable

#: read by Ray's processes when they start: no statistics leave the machine, a slow machine has time to start, and
#: Ray's later defaults are taken now, so that it warns of none
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TQDM_PATCH_PRINT": "0",
}
#: the same, for a cluster of this machine: its processes listen at the loopback address, as they do on macOS
_LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
#: bytes of shared memory of a cluster of this machine; requests and images pass through it, and no tensors
_OBJECT_STORE = 200 << 20


@contextlib.contextmanager
def cluster(workers: int) -> Iterator[TextIO]:
    """Ray for the length of the block; gives standard output, in whose place Ray's messages go to standard error.

    Without ``RAY_ADDRESS`` a cluster is started that only this machine reaches, without a dashboard, with a token of
    its own that no file holds; it ends with the block.

    Args:
        workers: replicas that a cluster of this machine has CPUs for; Ray counts them and reserves none.

    Raises:
        InputError: if ``RAY_ADDRESS`` names a cluster that cannot be reached.
        PnpError: if Ray cannot be started.
    """
    os.environ.update(_ENVIRONMENT)
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        os.environ.update(_LOCAL)
    if not address and not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # Ray would write one into the home folder
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    own: dict[str, Any] = {} if address else dict(
        address="local", num_cpus=workers, include_dashboard=False, object_store_memory=_OBJECT_STORE,
        _node_ip_address="127.0.0.1",
    )  # fmt: skip
    with _signals_kept():
        try:
            ray.init(log_to_driver=False, configure_logging=True, logging_level="error", **own)
        except ConnectionError as e:
            raise InputError(
                f"RAY_ADDRESS is {printable(address or '', limit=100)} and no Ray cluster answers there "
                f"({printable(e, limit=200)}); start it, or unset RAY_ADDRESS"
            ) from None
        except Exception as e:
            raise PnpError(f"Ray cannot be started ({printable(e, limit=300)}); see its logs in /tmp/ray") from e
    try:
        output = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):
            yield output
    finally:
        with quiet(), _signals_kept():
            ray.shutdown()


def quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """A block in which Ray ends: what it reports of its own processes then is not an error."""
    return contextlib.redirect_stdout(io.StringIO())


def placed(provider: str, replicas: int | None) -> tuple[int, dict[str, float]]:
    """Replicas, and the resources that Ray reserves for each: a GPU where the cluster has any, else a CPU.

    Args:
        provider: as of ``Pipeline.load``; ``cpu`` takes no GPU.
        replicas: None takes one per GPU, or 1.

    Raises:
        InputError: if this machine has fewer GPUs; a running cluster may add nodes.
    """
    import ray

    gpus = 0 if provider == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    if not gpus:
        return replicas or 1, {"num_gpus": 0.0, "num_cpus": 1.0}
    if replicas is not None and replicas > gpus and not os.environ.get("RAY_ADDRESS"):
        raise InputError(f"--replicas is {replicas} and this machine has {gpus} GPUs; give at most as many")
    return replicas or gpus, {"num_gpus": 1.0, "num_cpus": 0.0}


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM over; the command's own handler is put back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, held)
