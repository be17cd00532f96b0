"""How much memory a process took, and how much there is."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path


def peak() -> int | None:
    """Largest resident memory of this process so far, in bytes; None where the system does not report it."""
    with suppress(OSError):
        # not getrusage: Linux carries that figure over from the process that started this one
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8")):
            return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free() -> float:
    """Bytes that this process can still have: of the machine, and of its container where that has a limit."""
    import psutil

    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / n).read_text(encoding="utf-8").strip() for n in ("memory.max", "memory.current"))
        left = float(limit) - float(used)  # "max" is not a number
    except (OSError, ValueError):
        left = float("inf")
    return min(float(psutil.virtual_memory().available), left)
