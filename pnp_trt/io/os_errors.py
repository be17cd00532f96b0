"""Operating-system errors in words: what went wrong, and what to do."""

from __future__ import annotations

import errno
import os

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def reason(error: OSError) -> str:
    """The system's error message, with the file if it is known."""
    said = error.strerror or str(error)
    return f"{os.fsdecode(error.filename)}: {said}" if isinstance(error.filename, str | bytes) else said


def advice(error: OSError, otherwise: str = "name another place") -> str:
    """Advice on an error of the file system."""
    return "free some space" if error.errno in FULL_DISK else otherwise
