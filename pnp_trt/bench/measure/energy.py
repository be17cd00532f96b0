"""Energy per image, from the GPU's own counter through NVML; unavailable without such a counter.

The counter covers all use of the GPU since its driver was loaded, and is updated some tens of times per second, which
is too coarse for single images. A case is therefore repeated for seconds, and the difference is divided by the images.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

#: returns joules since a fixed moment
Counter = Callable[[], float]
#: minimum duration of a case's repetitions; the counter's resolution is then a few percent of it at most
SECONDS = 2.0


def nvml_counter(index: int = 0, nvml: Any = None) -> tuple[Counter | None, str | None]:
    """Return the energy counter of GPU `index`, or None and the reason.

    nvml: a module with NVML's functions; None imports `pynvml` of the package nvidia-ml-py.  The counter needs a GPU of
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
    except Exception as e:  # the binding has an exception class per error code; without a driver the library is missing
        return None, f"GPU {index} has no energy counter that can be read ({e})"
    return (lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)) / 1e3), None  # millijoules


def joules_per_image(
    draw: Callable[[], object], images: int, counter: Counter, clock: Callable[[], float], seconds: float = SECONDS
) -> float | None:
    """Return joules per image, repeating `draw` for at least `seconds`; None if the counter did not advance.

    images: number of images per call of `draw`.  clock: returns seconds.
    """
    before, start, calls = counter(), clock(), 0
    while calls == 0 or clock() - start < seconds:
        draw()
        calls += 1
    used = counter() - before
    return used / (calls * images) if used > 0 else None
