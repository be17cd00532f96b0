"""Networks that a runtime loads once per batch and image size: those used last are kept, with their buffers."""

from __future__ import annotations

import contextlib
import threading
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..bundle.profiles import Profile, Size, legal_sizes
from ..errors import InputError
from ..sampling.network import Bound, Network

#: batch, and the size of the latents; None leaves open what the graph leaves open
Shape = tuple[int, Size | None]


def check_shape(path: Path, profiles: tuple[Profile, ...], batch: int, size: Size | None) -> None:
    """Refuse a batch or a size of latents that a network does not run.

    Raises:
        InputError: with the legal sizes.
    """
    if batch < 1:
        raise InputError(f"the batch is {batch}; it must be at least 1")
    if size is not None and profiles and not any(p.holds_size(size) for p in profiles):
        raise InputError(
            f"the latents are {size[0]}x{size[1]}; {path.name} takes {legal_sizes(profiles)}; "
            "build with --profile b1@HEIGHTxWIDTH in pixels"
        )


class PerShapeNetwork(Network):
    """One graph, loaded for each shape that is asked for.

    Args:
        path: the graph.
        profiles: the legal sizes in latents; empty takes what the graph takes.  Their batches mean nothing here.
        kept: shapes whose loaded form is kept, those used last; each may hold the network's weights.
        buffers_kept: idle buffers that are kept for each shape.
    """

    def __init__(self, path: Path, profiles: tuple[Profile, ...], kept: int, buffers_kept: int) -> None:
        self.path, self.profiles, self.kept, self._buffers_kept = path, profiles, kept, buffers_kept
        self._loaded: dict[Shape, Any] = {}  # the one used last stands last
        # they go when what they are bound to goes
        self._idle: dict[Shape, list[Bound]] = {}
        self._lock = threading.Lock()

    @abstractmethod
    def _load(self, batch: int, size: Size | None) -> Any:
        """The network loaded for a shape."""

    @abstractmethod
    def _buffers(self, loaded: Any, batch: int) -> Bound:
        """New buffers for what ``_load`` gave."""

    def _dropped(self) -> None:
        """Called when a loaded form was dropped."""

    def loaded(self, batch: int, size: Size | None = None) -> Any:
        """The runtime's own object for a shape; None leaves open what the graph leaves open."""
        key = batch, size
        with self._lock:
            if key not in self._loaded:
                made = self._load(batch, size)
                if len(self._loaded) >= self.kept:
                    while len(self._loaded) >= self.kept:
                        oldest = next(iter(self._loaded))
                        self._loaded.pop(oldest)
                        self._idle.pop(oldest, None)
                    self._dropped()
                self._loaded[key] = made
            self._loaded[key] = found = self._loaded.pop(key)
            return found

    def batches(self, most: int) -> tuple[int, ...]:
        """As many as are kept, ``most`` halved again and again: loading one costs more than padding."""
        if most <= self.kept:
            return super().batches(most)
        return tuple(sorted({-(-most // 2**k) for k in range(self.kept)}))

    @contextlib.contextmanager
    def bind(self, batch: int, size: Size | None = None) -> Iterator[Any]:
        check_shape(self.path, self.profiles, batch, size)
        key, loaded = (batch, size), self.loaded(batch, size)
        with self._lock:
            idle = self._idle.get(key)
            bound = idle.pop() if idle else None
        bound = bound or self._buffers(loaded, batch)  # may take as long as several runs of a small network
        yield bound  # after an error it is not used again
        with self._lock:
            kept = self._idle.setdefault(key, [])
            if self._loaded.get(key) is loaded and len(kept) < self._buffers_kept:
                kept.append(bound)
