"""LoRAs in requests: the files that a server offers, and an engine for each set of LoRAs and scales in use.

An engine with LoRAs is a plugged bundle.  A single thread makes these engines one after the other, while other engines
continue and requests for the new one wait.  At most ``most`` are loaded.  To make room, the least recently used one is
unloaded, with preference for engines without requests; requests of the unloaded engine are completed first.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from ..bundle.store import Bundle, cached_sha256
from ..errors import InputError, PnpError
from ..io.inputs import excerpt, shortened
from ..io.text import printable
from .engine import Busy, Engine, Stopping

SUFFIX = ".safetensors"
#: maximum number of loaded engines with LoRAs
MOST_LOADED = 4
#: maximum number of LoRAs in a request
MOST_IN_REQUEST = 4
#: largest magnitude of a scale; trainers intend -2 … 2
LARGEST_SCALE = 100.0
#: maximum number of names in a message
_NAMES_SHOWN = 10
#: characters that delimit a LoRA's tag in a prompt
_RESERVED = ":<>"
#: errors for an unreadable path: ValueError for a NUL in it, RuntimeError for a cycle of links
_UNREADABLE = (OSError, ValueError, RuntimeError)
#: Retry-After, in seconds, when too many requests wait
_RETRY_AFTER = 10

#: LoRAs of a request in the order of merging: name and scale
Loras = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class LoraFile:
    """A file that a server offers.

    Attributes:
        path: with links resolved.
        sha256: hash of the file when the folder was read.
    """

    path: Path
    sha256: str


class Plugged(Protocol):
    """A bundle with LoRAs merged, kept on disk until it is closed."""

    @property
    def bundle(self) -> Bundle:
        """The bundle, with every file verified."""

    def close(self) -> None:
        """Release the bundle, whose networks must no longer be in use."""


#: merges files with their scales, in this order, into a bundle; raises ``PnpError``
Plug = Callable[[Bundle, Sequence[tuple[Path, float]]], Plugged]


def read_loras(folder: Path) -> dict[str, LoraFile]:
    """The .safetensors files of a folder by their names without the suffix; hidden files and subfolders are ignored.

    Raises:
        InputError: if it is not a folder or has no such file; or for a file that is a link out of the folder, is not a
            regular file, cannot be read, or has a name that cannot be written in a prompt.
    """
    try:
        root = folder.resolve(strict=True)
        paths = sorted(p for p in root.iterdir() if p.name.endswith(SUFFIX) and not p.name.startswith("."))
    except _UNREADABLE as e:
        raise InputError(f"--loras {printable(folder)} cannot be read ({_why(e)}); name a folder of LoRAs") from None
    if not paths:
        raise InputError(f"--loras {printable(folder)} has no {SUFFIX} file; name a folder of LoRAs")
    return {path.name.removesuffix(SUFFIX): _read(path, root) for path in paths}


def _read(path: Path, root: Path) -> LoraFile:
    name = path.name.removesuffix(SUFFIX)
    if not name.isprintable() or name != name.strip() or name.endswith(SUFFIX) or set(name) & set(_RESERVED):
        raise InputError(
            f"the LoRA {excerpt(path.name)} has a name that a prompt cannot state (control characters, blanks at an "
            f"end, {' '.join(_RESERVED)} or a second {SUFFIX}); rename it"
        )
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(root):
            raise InputError(f"the LoRA {excerpt(path.name)} is a link out of its folder; copy the file into it")
        if not real.is_file():
            raise InputError(f"the LoRA {excerpt(path.name)} is not a file; remove it from the folder")
        return LoraFile(real, cached_sha256(real))
    except _UNREADABLE as e:
        raise InputError(f"the LoRA {excerpt(path.name)} cannot be read ({_why(e)}); remove or replace it") from None


def _why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


@dataclass(eq=False)
class _Entry:
    """One engine: being made, loaded or being unloaded."""

    key: tuple[str, Loras]
    users: int = 0
    future: Future[Engine] = field(default_factory=Future)
    plugged: Plugged | None = None

    @property
    def loaded(self) -> bool:
        return self.future.done()


@dataclass(frozen=True)
class Lease:
    """An engine that stays loaded until :meth:`release`, which must be called once.

    Attributes:
        future: the engine, or the error from making it.
    """

    future: Future[Engine]
    release: Callable[[], None]


class LoraEngines:
    """Engines with LoRAs, made when requests name them; thread-safe.

    Args:
        files: from :func:`read_loras`.
        plug: called from one thread, one call after the other.
        start: makes the engine of a bundle, on the same thread.
        most: maximum number of loaded engines, at least 1.
        waiting: maximum number of requests that wait for an engine to be made.

    Raises:
        InputError: for ``most`` below 1.
    """

    def __init__(
        self,
        files: Mapping[str, LoraFile],
        plug: Plug,
        start: Callable[[Bundle], Engine],
        most: int = MOST_LOADED,
        waiting: int = 64,
    ) -> None:
        if most < 1:
            raise InputError(f"max-loras is {most}; it must be at least 1")
        self.files = dict(files)
        self._plug, self._start, self._most, self._waiting = plug, start, most, waiting
        self._changed = threading.Condition()
        self._entries: dict[tuple[str, Loras], _Entry] = {}  # the least recently used first
        self._leaving: list[_Entry] = []
        self._stopping = False
        self._worker = ThreadPoolExecutor(1, "pnp-trt loras")

    def check(self, loras: Loras) -> Loras:
        """The LoRAs of a request as part of an engine's key.

        Raises:
            InputError: for a name that is not offered or stated twice, a scale that is not finite or beyond
                ±``LARGEST_SCALE``, or more than ``MOST_IN_REQUEST``.
        """
        if len(loras) > MOST_IN_REQUEST:
            raise InputError(f"{len(loras)} LoRAs were named; at most {MOST_IN_REQUEST} are merged at once")
        for i, (name, scale) in enumerate(loras):
            if name not in self.files:
                raise InputError(f"no LoRA has the name {excerpt(name)}; this server has: {self._names()}")
            if name in [other for other, _ in loras[:i]]:
                raise InputError(f"the LoRA {excerpt(name)} is named twice; name it once, with the sum of the scales")
            if not abs(scale) <= LARGEST_SCALE:  # NaN too
                raise InputError(
                    f"the scale of the LoRA {excerpt(name)} is {scale:g}; it must be between {-LARGEST_SCALE:g} and "
                    f"{LARGEST_SCALE:g}"
                )
        return tuple((name, scale + 0.0) for name, scale in loras)  # -0.0 is 0.0

    def _names(self) -> str:
        names = [shortened(name) for name in self.files]
        more = len(names) - _NAMES_SHOWN
        return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more (GET /sdapi/v1/loras)" if more > 0 else "")

    def acquire(self, base: Engine, loras: Loras) -> Lease:
        """Lease the engine of a bundle with LoRAs, which is made if it is not loaded.

        Args:
            base: the engine without LoRAs.
            loras: from :meth:`check`.

        Raises:
            Busy: if too many requests wait for engines that are being made.
            Stopping: if the server is stopping.
        """
        key = base.pipeline.name, loras
        with self._changed:
            if self._stopping:
                raise Stopping("the server is being stopped; use another server, or retry later")
            entry = self._entries.pop(key, None)
            try:
                if (entry is None or not entry.loaded) and self._pending(entry) >= self._waiting:
                    raise Busy("too many requests wait for engines with LoRAs; try again later", _RETRY_AFTER)
                if entry is None:
                    entry = _Entry(key)
                    self._worker.submit(self._make, base, entry)
                entry.users += 1
            finally:
                if entry is not None:
                    self._entries[key] = entry
        return Lease(entry.future, lambda: self._release(entry))

    def _pending(self, entry: _Entry | None) -> int:
        """Number of requests that wait for an engine to be made, including ``entry``."""
        entries = [*self._entries.values(), *([] if entry is None else [entry])]
        return sum(each.users for each in entries if not each.loaded)

    def _release(self, entry: _Entry) -> None:
        with self._changed:
            entry.users -= 1
            self._changed.notify_all()

    def engines(self) -> list[tuple[str, Engine]]:
        """Loaded engines with LoRAs, each with the name of the engine without LoRAs."""
        with self._changed:
            entries = [e for e in (*self._entries.values(), *self._leaving) if e.loaded and not e.future.exception()]
        return [(entry.key[0], entry.future.result()) for entry in entries]

    def loading(self, name: str) -> int:
        """Number of requests for the engine ``name`` that wait for its LoRAs to be merged."""
        with self._changed:
            return sum(entry.users for entry in self._entries.values() if entry.key[0] == name and not entry.loaded)

    def stop(self, drain: bool = True) -> None:
        """Make no more engines, and stop the loaded ones; see ``Engine.stop``."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._worker.shutdown(wait=True)  # queued engines end at once, with Stopping
        with self._changed:
            entries = list(self._entries.values())
            self._entries.clear()
        for entry in entries:
            self._unload(entry, drain)

    # -- for the worker's thread ---------------------------------------------------------------------------------------
    def _make(self, base: Engine, entry: _Entry) -> None:
        try:
            engine = self._build(base, entry)
        except Exception as e:
            with self._changed:
                if self._entries.get(entry.key) is entry:
                    del self._entries[entry.key]
            entry.future.set_exception(self._in_words(e, base, entry.key[1]))
            return
        entry.future.set_result(engine)

    def _build(self, base: Engine, entry: _Entry) -> Engine:
        self._check_needed(entry)
        loras = entry.key[1]
        for name, _ in loras:
            file = self.files[name]
            if not file.path.is_file() or cached_sha256(file.path) != file.sha256:
                raise InputError(f"the LoRA {excerpt(name)} was changed after the server started; restart the server")
        entry.plugged = self._plug(base.pipeline.bundle, [(self.files[name].path, scale) for name, scale in loras])
        try:
            self._make_room(entry)
            bundle = entry.plugged.bundle  # served under the base engine's name
            return self._start(replace(bundle, manifest=replace(bundle.manifest, name=base.pipeline.name)))
        except BaseException:
            entry.plugged.close()
            raise

    def _check_needed(self, entry: _Entry) -> None:
        with self._changed:
            if self._stopping:
                raise Stopping("the server is being stopped; use another server, or retry later")
            if not entry.users:
                self._entries.pop(entry.key, None)  # under the lock, so that no request starts to wait for it
                raise PnpError("no request waits for the LoRA any more; send it again")

    def _make_room(self, entry: _Entry) -> None:
        """Unload engines until one more may be loaded."""
        while True:
            self._check_needed(entry)
            with self._changed:
                loaded = [each for each in self._entries.values() if each.loaded]
                if len(loaded) < self._most:
                    return
                victim = next((each for each in loaded if not each.users), loaded[0])
                del self._entries[victim.key]  # new requests for it are served after this one
                self._leaving.append(victim)
                while victim.users and not self._stopping:
                    self._changed.wait()
            self._unload(victim, drain=True)
            with self._changed:
                self._leaving.remove(victim)

    def _unload(self, entry: _Entry, drain: bool) -> None:
        if entry.loaded and not entry.future.exception():
            entry.future.result().stop(drain)
            if entry.plugged is not None:
                entry.plugged.close()

    def _in_words(self, error: Exception, base: Engine, loras: Loras) -> PnpError:
        """An error for clients, without this machine's paths."""
        if isinstance(error, Stopping):
            return error
        if not isinstance(error, PnpError):
            traceback.print_exception(error, file=sys.stderr)
            return PnpError(f"unexpected {type(error).__name__}; the server's output has the details")
        print(f"pnp-trt: {printable(error, limit=2000)}", file=sys.stderr, flush=True)
        text = str(error)
        for name, _ in loras:
            text = text.replace(str(self.files[name].path), f"'{name}'")
        text = text.replace(str(base.pipeline.bundle.folder.resolve()), f"'{base.pipeline.name}'")
        kind = InputError if isinstance(error, InputError) else PnpError
        names = ", ".join(excerpt(name) for name, _ in loras)
        return kind(f"engine '{base.pipeline.name}' cannot use the LoRA {names}: {text}")
