"""Peak memory of this process, and available memory."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path


def peak() -> int | None:
    """Largest resident memory of this process so far, in bytes; None if the system does not report it."""
    with suppress(OSError):
        # not getrusage: Linux lets a process inherit that figure from its parent
        if match := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8")):
            return int(match[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free() -> float:
    """Bytes that this process can still allocate, limited by the machine and by its container's limit, if any."""
    import psutil

    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / n).read_text(encoding="utf-8").strip() for n in ("memory.max", "memory.current"))
        left = float(limit) - float(used)  # "max" is not a number
    except (OSError, ValueError):
        left = float("inf")
    return min(float(psutil.virtual_memory().available), left)
