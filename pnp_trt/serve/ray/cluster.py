"""A Ray cluster: a temporary one on this machine, or a running one that ``RAY_ADDRESS`` names."""

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

#: read by Ray's processes at start: sends no usage statistics, gives a slow machine time to start, and selects Ray's
#: future defaults, which avoids its warnings about them
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TQDM_PATCH_PRINT": "0",
}
#: the same, for a cluster on this machine: its processes listen on the loopback address, as they do on macOS
_LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
#: bytes of shared memory of a cluster on this machine, for requests and images, but no tensors
_OBJECT_STORE = 200 << 20


@contextlib.contextmanager
def cluster(workers: int) -> Iterator[TextIO]:
    """Context manager that connects to Ray.  It yields standard output, and redirects Ray's messages to standard error.

    Without ``RAY_ADDRESS``, it starts a cluster that only this machine can reach, without a dashboard, and with a
    random token that is not stored in a file.  That cluster ends with the context.

    Args:
        workers: number of CPUs that a cluster on this machine declares, one per replica; they are not reserved.

    Raises:
        InputError: if ``RAY_ADDRESS`` names a cluster that cannot be reached.
        PnpError: if Ray cannot be started.
    """
    os.environ.update(_ENVIRONMENT)
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        os.environ.update(_LOCAL)
    if not address and not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else Ray writes one into the home folder
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {} if address else dict(
        address="local", num_cpus=workers, include_dashboard=False, object_store_memory=_OBJECT_STORE,
        _node_ip_address="127.0.0.1",
    )  # fmt: skip
    with _restored_signals():
        try:
            ray.init(log_to_driver=False, configure_logging=True, logging_level="error", **options)
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
        with quiet(), _restored_signals():
            ray.shutdown()


def quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """Context for Ray's shutdown: discards its messages about its own processes, which are not errors."""
    return contextlib.redirect_stdout(io.StringIO())


def placed(provider: str, replicas: int | None) -> tuple[int, dict[str, float]]:
    """Number of replicas, and the resources that Ray reserves for each: a GPU if the cluster has any, else a CPU.

    Args:
        provider: as for ``Pipeline.load``; ``cpu`` takes no GPU.
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
def _restored_signals() -> Iterator[None]:
    """Restore the handler of SIGTERM, which Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
