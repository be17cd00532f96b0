"""Energy per image by the GPU's own counter, through NVML; none where there is no such counter.

The counter is the whole GPU's since its driver was loaded, whoever used it, and is updated some tens of times a second,
so that single images cannot be told apart: a case is repeated for seconds and the difference is divided.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

#: returns joules since some moment
Counter = Callable[[], float]
#: that a case is repeated at least; the counter's steps are then a few percent of the whole at most
SECONDS = 2.0


def nvml_counter(index: int = 0, nvml: Any = None) -> tuple[Counter | None, str | None]:
    """The energy counter of GPU `index`, or None and why there is none.

    nvml: what offers NVML's functions; None imports `pynvml` of the package nvidia-ml-py.  The counter needs a GPU of
    the Volta generation or later.
    """
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return None, "energy needs NVIDIA's management library; install with: pip install 'pnp-trt[energy]'"
    try:
        nvml.nvmlInit()
        gpu = nvml.nvmlDeviceGetHandleByIndex(index)
        nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
    except Exception as e:  # the binding raises a class for every code; without a driver the library itself is missing
        return None, f"GPU {index} has no energy counter that can be read ({e})"
    return (lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)) / 1e3), None  # millijoules


def joules_per_image(
    draw: Callable[[], object], images: int, counter: Counter, clock: Callable[[], float], seconds: float = SECONDS
) -> float | None:
    """Joules an image, of `draw` repeated for at least `seconds`; None where the counter did not move.

    images: how many one call of `draw` makes.  clock: returns seconds.
    """
    before, start, calls = counter(), clock(), 0
    while calls == 0 or clock() - start < seconds:
        draw()
        calls += 1
    used = counter() - before
    return used / (calls * images) if used > 0 else None
