"""How many cores of this machine may be used, and which half-precision types they multiply in hardware.

Other types are emulated: each product is widened and each sum rounded, which costs ten times float32 and more.
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

#: flags of ``/proc/cpuinfo`` (x86, Arm) of instructions that multiply matrices or vectors of a type
_FLAGS = {
    "bfloat16": frozenset({"amx_bf16", "avx512_bf16", "bf16"}),
    "float16": frozenset({"amx_fp16", "avx512_fp16", "asimdhp"}),
}
_CPUINFO = Path("/proc/cpuinfo")


def usable_cores() -> int:
    """The cores that this process may run on; all of them where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def flags(cpuinfo: str) -> frozenset[str]:
    """The processor's feature flags from the text of ``/proc/cpuinfo``: ``flags`` on x86, ``Features`` on Arm."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


@cache
def multiplies(dtype: str) -> bool:
    """Whether the processor multiplies ``bfloat16`` or ``float16`` in hardware.

    Where neither the system nor PyTorch states this, the answer is no: float32 is then the fast type.
    """
    try:
        return bool(_FLAGS[dtype] & flags(_CPUINFO.read_text(encoding="utf-8")))
    except OSError:
        return _torch_knows(dtype)


def _torch_knows(dtype: str) -> bool:
    """What PyTorch detects, on systems without ``/proc/cpuinfo``."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return dtype == "float16"  # every Apple M has it; bfloat16 came with the M2
    try:
        import torch

        known = torch.cpu.get_capabilities()
    except (ImportError, AttributeError):
        return False
    return any(known.get(name, False) for name in _FLAGS[dtype])


@cache
def slowdown(dtype: str) -> float:
    """Time of a convolution in ``bfloat16`` or ``float16`` over its time in float32, measured on this processor."""
    import torch

    x, weight = torch.ones(1, 64, 16, 16), torch.ones(64, 64, 3, 3)

    def seconds(kind: Any) -> float:
        a, b = x.to(kind), weight.to(kind)
        return least_seconds(lambda: torch.conv2d(a, b, padding=1))

    with torch.inference_mode():
        return seconds(getattr(torch, dtype)) / seconds(torch.float32)


def least_seconds(call: Callable[[], Any], repeats: int = 5, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of the fastest of some calls, after one that is not counted; others were interrupted."""
    call()
    taken = []
    for _ in range(repeats):
        begin = clock()
        call()
        taken.append(clock() - begin)
    return min(taken)


def mixed_precision(word: str, gpu: bool) -> str:
    """``no``, ``bf16`` or ``fp16`` for a ``--mixed-precision`` of ``auto``; other words stay as they are.

    ``auto`` takes bfloat16 where the device that trains multiplies it, float16 on GPUs that only have that, and
    float32 on other processors.  A bf16 that was requested on a processor without it is warned of and kept.

    Args:
        gpu: whether a GPU trains.
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
    """Warn, with the measured factor, where ``dtype`` is slower than float32 because the processor emulates it."""
    if multiplies(dtype):
        return
    factor = slowdown(dtype)
    if factor >= 1.5:
        warnings.warn(
            f"this processor does not multiply {dtype}; it is emulated, about {factor:.0f} times slower than float32; "
            "use --mixed-precision no, or auto",
            stacklevel=3,
        )
