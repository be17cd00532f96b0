"""Messages for operating-system errors: the reason, and advice."""

from __future__ import annotations

import errno
import os

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def reason(error: OSError) -> str:
    """Return the system's error message, prefixed with the file's name if it is known."""
    message = error.strerror or str(error)
    return f"{os.fsdecode(error.filename)}: {message}" if isinstance(error.filename, str | bytes) else message


def advice(error: OSError, otherwise: str = "name another place") -> str:
    """Return advice on an error of the file system."""
    return "free some space" if error.errno in FULL_DISK else otherwise
