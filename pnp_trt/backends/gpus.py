"""Detection of NVIDIA GPUs through the driver library alone, without a CUDA toolkit or Python package."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

#: CUdevice_attribute, cuda.h
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """One GPU: its ``name`` and its compute capability, written as in ``sm_89``."""

    name: str
    sm: str


def _driver() -> Any | None:
    for library in ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so"):
        try:
            return ctypes.CDLL(library)
        except OSError:
            continue
    return None


def driver_present() -> bool:
    """Whether the NVIDIA driver library loads."""
    return _driver() is not None


def present_gpus() -> list[Gpu]:
    """Return all usable GPUs in device order; empty without a driver or device."""
    driver = _driver()
    count = ctypes.c_int(0)
    if driver is None or driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    gpus = []
    for number in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(128)
        major, minor = ctypes.c_int(), ctypes.c_int()
        if driver.cuDeviceGet(ctypes.byref(device), number) != 0:
            continue
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        gpus.append(Gpu(name.value.decode(errors="replace"), f"sm_{major.value}{minor.value}"))
    return gpus
