"""Run one command line in a forked child or a new interpreter, with time limits."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import resource
import signal
import struct
import sys
import termios
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import audit
from .case import Outcome, Place, Surroundings

SITE = Path(__file__).parent / "site"
TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Kill:
    """Send a signal after ``cpu`` seconds of CPU time, or SIGKILL before the ``operation``-th file change."""

    signal: int = signal.SIGKILL
    cpu: float | None = None
    operation: int | None = None


def run(words: list[str], place: Place, surroundings: Surroundings | None = None, kill: Kill | None = None) -> Outcome:
    """Run ``pnp-trt WORDS`` and wait for it.

    Remaining processes of its session are killed afterwards.
    """
    surroundings = surroundings or Surroundings()
    scratch = place.fixtures.parent
    log = scratch / f"events.{os.getpid()}"
    log.write_bytes(b"")
    log.chmod(0o666)
    # pipes, so that a limit on file sizes does not affect the campaign's own records
    ends = [pty.openpty()] if surroundings.terminal else [os.pipe(), os.pipe()]
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        for read, _ in ends:
            os.close(read)
        _child(words, place, surroundings, kill, log, [write for _, write in ends])
    for _, write in ends:
        os.close(write)
    readers = [_Reader(read) for read, _ in ends]
    code, cpu, hung = _wait(child, surroundings, kill, readers)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    out, err = [reader.text() for reader in readers] if len(readers) == 2 else (readers[0].text(), "")
    events = log.read_bytes().decode("utf-8", "replace")
    return Outcome(code, out, err, cpu, time.monotonic() - begun, hung, tuple(_events(events)))


class _Reader:
    """Collects the output of a pipe or a pseudo-terminal."""

    def __init__(self, end: int) -> None:
        os.set_blocking(end, False)
        self._end = end
        self._parts: list[bytes] = []

    def read(self) -> None:
        """Read the available output."""
        with contextlib.suppress(OSError):  # no output is available, or the other end of a pseudo-terminal is closed
            while part := os.read(self._end, 65536):
                self._parts.append(part)

    def text(self) -> str:
        """Return the whole output and close the pipe."""
        self.read()
        os.close(self._end)
        return b"".join(self._parts).decode("utf-8", "replace")


def _events(text: str) -> list[str]:
    import ast

    return [ast.literal_eval(line) for line in text.splitlines() if line.endswith(("'", '"'))]


def _wait(child: int, limits: Surroundings, kill: Kill | None, readers: list[_Reader]) -> tuple[int, float, bool]:
    begun, hung = time.monotonic(), False
    moment = kill.cpu if kill is not None else None
    while True:
        for reader in readers:
            reader.read()
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            cpu = usage.ru_utime + usage.ru_stime
            return code, cpu, hung or code == -signal.SIGXCPU
        if moment is not None and kill is not None and _cpu(child) >= moment:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, kill.signal)
            moment = None
        if time.monotonic() - begun > limits.wall:
            hung = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.002 if moment is not None else 0.01)


def _cpu(process: int) -> float:
    """CPU seconds that a process has used."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK
    return 0.0


def _child(
    words: list[str], place: Place, surroundings: Surroundings, kill: Kill | None, log: Path, ends: list[int]
) -> None:
    """Run the command in this child process; never returns."""
    code = 99
    try:
        os.setsid()
        _streams(place, surroundings, ends)
        _variables(surroundings, kill, log)
        os.chdir(place.path(surroundings.cwd) if surroundings.cwd else place.here)
        resource.setrlimit(resource.RLIMIT_CPU, (int(surroundings.cpu), int(surroundings.cpu) + 5))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not surroundings.fresh:  # in a new interpreter, sitecustomize starts the audit
            audit.watch(str(log), kill.operation if kill else None)
        if surroundings.before:
            surroundings.before(place)
        for limit, value in surroundings.limits:
            resource.setrlimit(limit, (value, value))
        if surroundings.fresh:
            os.execv(sys.executable, [sys.executable, "-m", "pnp_trt", *words])
        code = call(words)
    except BaseException:
        traceback.print_exc()
        with contextlib.suppress(Exception):
            sys.stderr.flush()
    finally:
        os._exit(code)


def call(words: list[str]) -> int:
    """Call ``main`` and flush the streams as the interpreter does; return the exit code."""
    from ..commands import exit_code

    code = exit_code(words)
    for stream, failed in ((sys.stdout, 120), (sys.stderr, 0)):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            code = code or failed
    return code


def _streams(place: Place, surroundings: Surroundings, ends: list[int]) -> None:
    """Connect the three standard streams."""
    if surroundings.terminal:
        (line,) = ends
        fcntl.ioctl(line, termios.TIOCSCTTY, 0)
        fcntl.ioctl(line, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        for stream in (0, 1, 2):
            os.dup2(line, stream)
        _reopen()
        return
    content = surroundings.stdin
    source = place.fixtures.parent / f"stdin.{os.getpid()}"
    if isinstance(content, bytes):
        source.write_bytes(content)
        path = source
    else:
        path = Path(os.devnull) if content is None else place.path(content)
    os.dup2(os.open(path, os.O_RDONLY), 0)
    for stream, end in enumerate(ends, 1):
        os.dup2(end, stream)
        os.close(end)
    source.unlink(missing_ok=True)
    _reopen()


def _reopen() -> None:
    """Reopen Python's streams, because those of the zygote remember whether its own files were seekable."""
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        old = getattr(sys, f"__{name}__")
        buffering = 1 if os.isatty(number) or number == 2 else -1
        stream = open(number, mode, buffering, old.encoding, old.errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _variables(surroundings: Surroundings, kill: Kill | None, log: Path) -> None:
    """Set the environment; processes that the command starts are audited too."""
    os.environ[audit.LOG] = str(log)
    if kill is not None and kill.operation is not None and surroundings.fresh:
        os.environ[audit.KILL_AT] = str(kill.operation)
    for name, value in surroundings.environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def unprivileged(place: Place) -> None:
    """Drop root's right to bypass permissions; does nothing for other users."""
    import ctypes

    if os.geteuid() != 0:
        return

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    class Data(ctypes.Structure):
        _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(ctypes.byref(Header(0x20080522, 0)), ctypes.byref((Data * 2)())):
        raise OSError(ctypes.get_errno(), "capset")


Runner = Callable[..., Outcome]
