"""The usable cores of this machine, and the half-precision types that its processor multiplies in hardware.

Other types are emulated: each product is widened and each sum rounded, which is ten or more times slower than float32.
"""

from __future__ import annotations

import os
import platform
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

#: flags in ``/proc/cpuinfo`` (x86, Arm) for instructions that multiply matrices or vectors of a type
_FLAGS = {
    "bfloat16": frozenset({"amx_bf16", "avx512_bf16", "bf16"}),
    "float16": frozenset({"amx_fp16", "avx512_fp16", "asimdhp"}),
}
_CPUINFO = Path("/proc/cpuinfo")


def usable_cores() -> int:
    """Return the number of cores on which this process may run, or of all cores if the system does not report that."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def flags(cpuinfo: str) -> frozenset[str]:
    """Return the processor's features from the text of ``/proc/cpuinfo``: ``flags`` on x86, ``Features`` on Arm."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


@cache
def multiplies(dtype: str) -> bool:
    """Whether the processor multiplies ``bfloat16`` or ``float16`` in hardware.

    If neither the system nor PyTorch reports this, the result is False: float32 is then assumed to be faster.
    """
    try:
        return bool(_FLAGS[dtype] & flags(_CPUINFO.read_text(encoding="utf-8")))
    except OSError:
        return _torch_supports(dtype)


def _torch_supports(dtype: str) -> bool:
    """Whether PyTorch detects the type, for systems without ``/proc/cpuinfo``."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return dtype == "float16"  # all Apple M processors have it; bfloat16 came with the M2
    try:
        import torch

        capabilities = torch.cpu.get_capabilities()
    except (ImportError, AttributeError):
        return False
    return any(capabilities.get(name, False) for name in _FLAGS[dtype])


@cache
def slowdown(dtype: str) -> float:
    """Measure the time of a convolution in ``bfloat16`` or ``float16``, relative to float32, on this processor."""
    import torch

    x, weight = torch.ones(1, 64, 16, 16), torch.ones(64, 64, 3, 3)

    def seconds(kind: Any) -> float:
        a, b = x.to(kind), weight.to(kind)
        return least_seconds(lambda: torch.conv2d(a, b, padding=1))

    with torch.inference_mode():
        return seconds(getattr(torch, dtype)) / seconds(torch.float32)


def least_seconds(call: Callable[[], Any], repeats: int = 5, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds of the fastest of ``repeats`` calls, after a warm-up call; slower ones were disturbed."""
    call()
    durations = []
    for _ in range(repeats):
        start = clock()
        call()
        durations.append(clock() - start)
    return min(durations)


def mixed_precision(word: str, gpu: bool) -> str:
    """Resolve a ``--mixed-precision`` of ``auto`` to ``no``, ``bf16`` or ``fp16``; other values are returned unchanged.

    ``auto`` means bfloat16 if the training device multiplies it in hardware, float16 on GPUs without bfloat16, and
    float32 on other processors.  bf16 requested on a processor that emulates it is used, with a warning.

    Args:
        gpu: whether training runs on a GPU.
    """
    if word == "bf16" and not gpu:
        warn_if_emulated("bfloat16")
    if word != "auto":
        return word
    if not gpu:
        return "bf16" if multiplies("bfloat16") else "no"
    import torch

    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def warn_if_emulated(dtype: str) -> None:
    """Warn, with the measured factor, if ``dtype`` is slower than float32 because the processor emulates it."""
    if multiplies(dtype):
        return
    factor = slowdown(dtype)
    if factor >= 1.5:
        warnings.warn(
            f"this processor emulates {dtype}, which is about {factor:.0f} times slower than float32; "
            "use --mixed-precision no or auto",
            stacklevel=3,
        )
