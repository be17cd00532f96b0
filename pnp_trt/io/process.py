"""The process of a command: its signals, its standard streams and its child processes.

SIGTERM and SIGHUP end a command as Ctrl-C does: unfinished output is removed, and the exit code is 128 plus the
signal's number.  If the reader of standard output closes it early, the exit code is 141, as for SIGPIPE.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, cast

from ..errors import PnpError

#: exit code that a shell reports for a program ended by SIGPIPE
BROKEN_PIPE = 128 + 13
#: seconds that a child process has to clean up after SIGTERM
_GRACE = 15.0
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "terminated: the terminal was closed"}


class _State:
    """The signal that arrived, and whether it is pending until the end of a :func:`deferred` block."""

    received: int | None = None
    depth = 0
    pending = False


def _handle(number: int, frame: FrameType | None) -> None:
    # timeout(1) sends SIGTERM twice; the second must not interrupt the clean-up that the first began
    if number != signal.SIGINT and _State.received is not None:
        return
    _State.received = number
    if _State.depth:
        _State.pending = True
        return
    raise KeyboardInterrupt


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Defer signals until the end of the block."""
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
        if _State.pending and not _State.depth:
            _State.pending = False
            raise KeyboardInterrupt


@contextlib.contextmanager
def _handlers() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` on signals that end a process, unless the parent process had them ignored."""
    before: dict[int, Any] = {}
    _State.received, _State.depth, _State.pending = None, 0, False
    if threading.current_thread() is threading.main_thread():
        for name in _NAMES:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, _handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(command: Callable[[], None]) -> None:
    """Run a command with the signal and stream handling of this module.

    Raises:
        SystemExit: with the command's exit code.
        PnpError: if standard output cannot be written, memory runs out, or the command raises an ``OSError``.
    """
    with _streams(), _handlers():
        try:
            try:
                command()
            except SystemExit as e:
                if e.code == 130 and _State.received is not None:  # typer turns KeyboardInterrupt into this
                    raise KeyboardInterrupt from None
                _flush()
                raise
            _flush()
        except KeyboardInterrupt:
            number = signal.Signals(_State.received or signal.SIGINT)
            print(f"pnp-trt: {_WORDS[number.name]}", file=sys.stderr)
            raise SystemExit(128 + number) from None
        except (MemoryError, RuntimeError) as e:
            if not _out_of_memory(e):
                raise
            raise PnpError(
                "there is not enough memory for this command; close other programs, or use a smaller batch, fewer "
                "images or a smaller size"
            ) from e
        except OSError as e:
            from .os_errors import advice, reason

            lines = reason(e).splitlines() or [type(e).__name__]
            raise PnpError(f"{lines[0]}; {advice(e, 'check that it exists and that you have permission')}") from e


#: phrases with which PyTorch, ONNX Runtime and C++ report a failed allocation in a ``RuntimeError``
_ALLOCATION = ("can't allocate memory", "bad_alloc", "bad allocation", "failed to allocate", "out of memory")


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(part in str(error).lower() for part in _ALLOCATION)


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Disable garbage collection within the block."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Report errors of standard output in one sentence, and ignore errors of standard error."""
    streams = sys.stdout, sys.stderr
    if sys.stdout is not None:
        sys.stdout = cast(Any, _Output(sys.stdout, _output_failed))
    if sys.stderr is not None:
        sys.stderr = cast(Any, _Output(sys.stderr, lambda error: None))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class _Output:
    """A text stream that passes errors of ``write`` and ``flush`` to the callback ``failed``."""

    def __init__(self, stream: Any, failed: Callable[[OSError], None]) -> None:
        self._stream, self._failed = stream, failed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._watched():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._watched():
            self._stream.flush()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            with contextlib.suppress(OSError, ValueError):  # write nothing more, not even at process exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            self._failed(e)


def _output_failed(error: OSError) -> None:
    if isinstance(error, BrokenPipeError):
        raise SystemExit(BROKEN_PIPE) from None
    raise PnpError(f"standard output cannot be written ({error.strerror or error})") from error


def run_child(
    command: Sequence[str], *, input: str | None = None, timeout: float | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a child process as ``subprocess.run`` does; if this process is interrupted, :func:`stop` the child first.

    Raises:
        PnpError: if the child cannot be started.
        subprocess.TimeoutExpired: after ``timeout`` seconds; the child has been stopped.
    """
    if input is not None:
        options["stdin"] = subprocess.PIPE
    try:
        child = subprocess.Popen(command, **options)
    except OSError as e:
        raise PnpError(f"the process {command[0]} cannot be started ({e.strerror or e})") from e
    with child:
        try:
            out, err = child.communicate(input, timeout)
        except BaseException:
            stop(child)
            raise
    return subprocess.CompletedProcess(list(command), child.returncode, out, err)


def stop(child: subprocess.Popen[Any]) -> None:
    """End a process and wait for it: SIGTERM first, so that it removes unfinished output, then SIGKILL if needed."""
    child.terminate()
    try:
        child.wait(_GRACE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
