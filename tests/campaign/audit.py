"""Record a process's file changes, network accesses and started programs with Python's audit events.

It imports nothing from the package: ``site/sitecustomize.py`` loads it by its path in every process that a case starts.
Files written by native code (safetensors, ONNX) are not recorded; ``case.signature`` compares the files themselves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any

#: Environment variables: the log file, and the number of the file change before which the process is killed.
LOG, KILL_AT = "PNP_TRT_CAMPAIGN_LOG", "PNP_TRT_CAMPAIGN_KILL_AT"
#: Events that change files → the positions of the changed paths, and of the folder that they are relative to.
CHANGES = {
    "os.mkdir": ((0,), 2),
    "os.remove": ((0,), 1),
    "os.rmdir": ((0,), 1),
    "os.rename": ((0, 1), 2),
    "os.link": ((1,), 3),
    "os.symlink": ((1,), 2),
    "os.truncate": ((0,), None),
    "os.chmod": ((0,), 2),
    "shutil.rmtree": ((0,), 1),
}
#: Events that look up a name or connect to another machine → the position of the host.
LOOKUPS = {"socket.getaddrinfo": 0, "socket.gethostbyname": 0, "socket.gethostbyaddr": 0, "socket.connect": 1}
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def watch(log: str, kill_at: int | None = None) -> None:
    """Append this process's events to ``log``; send SIGKILL before its ``kill_at``-th file change, from 1."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        lines = [*_changed(event, arguments), *_reached(event, arguments)]
        if not lines:
            return
        if kill_at is not None and any(line.startswith("write ") for line in lines):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        _append(log, lines)

    sys.addaudithook(hook)


def _append(log: str, lines: list[str]) -> None:
    with contextlib.suppress(OSError):
        handle = _raw_open(log)
        os.write(handle, "".join(f"{line!r}\n" for line in lines).encode())
        os.close(handle)


_busy = False


def _raw_open(path: str) -> int:
    global _busy
    _busy = True
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    finally:
        _busy = False


def _changed(event: str, arguments: tuple[Any, ...]) -> list[str]:
    if event == "open":
        path, _, flags = arguments
        if _busy or not isinstance(flags, int) or not flags & WRITING:
            return []
        if not isinstance(path, int) and os.path.isdir(path):  # noqa: PTH112
            return []  # an unnamed file (O_TMPFILE), which probes a folder and changes nothing visible
        return _write_lines([path], None)
    if event not in CHANGES:
        return []
    positions, folder = CHANGES[event]
    if event == "os.mkdir" and os.path.isdir(arguments[0]):  # noqa: PTH112
        return []  # it exists already, so nothing changes
    where = arguments[folder] if folder is not None and folder < len(arguments) else None
    return _write_lines([arguments[i] for i in positions], where)


def _write_lines(paths: list[Any], folder: int | None) -> list[str]:
    lines = []
    for path in paths:
        with contextlib.suppress(OSError, TypeError, ValueError):
            if isinstance(path, int):
                continue
            text = os.fsdecode(path)
            if isinstance(folder, int) and folder >= 0 and not os.path.isabs(text):  # noqa: PTH117
                text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)  # noqa: PTH115, PTH118
            head, tail = os.path.split(os.path.abspath(text))  # noqa: PTH100
            text = os.path.join(os.path.realpath(head), tail)  # noqa: PTH118
            if not f"{text}/".startswith(("/dev/", "/proc/")):
                lines.append(f"write {text}")
    return lines


def _reached(event: str, arguments: tuple[Any, ...]) -> list[str]:
    if event in PROGRAMS:
        return [f"program {arguments[1] if event == 'subprocess.Popen' else arguments[0]}"]
    if event not in LOOKUPS:
        return []
    host = arguments[LOOKUPS[event]]
    if event == "socket.connect" and not isinstance(host, tuple):
        return []  # a Unix socket
    return [f"lookup {host} by {_callers()}"]


def _callers() -> str:
    """The packages on the stack, innermost first."""
    frame, names = sys._getframe(3), []
    while frame is not None:
        name = frame.f_globals.get("__name__", "?").partition(".")[0]
        names += [name] if name not in (*names, "socket", "threading", "_campaign_audit", "tests") else []
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(names[:8])


def watch_if_asked() -> None:
    """Call ``watch`` if the environment requests it, in processes that a case starts."""
    if log := os.environ.get(LOG):
        at = os.environ.get(KILL_AT)
        watch(log, int(at) if at else None)
