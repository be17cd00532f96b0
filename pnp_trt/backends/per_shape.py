"""Networks that a runtime loads once per shape or part of a shape; those used last stay loaded, with buffers."""

from __future__ import annotations

import contextlib
import threading
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..bundle.manifest import TOKENS, NetworkRecord
from ..bundle.profiles import Profile, Size, legal_sizes
from ..errors import InputError
from ..sampling.network import Bound, TokenNetwork

#: batch size, size of the latents, and tokens of the text states; None keeps a dimension open as in the graph
Shape = tuple[int | None, Size | None, int | None]


def check_shape(path: Path, profiles: tuple[Profile, ...], batch: int, size: Size | None) -> None:
    """Refuse a batch size or a size of latents that a network does not support.

    Raises:
        InputError: if it is unsupported; the message lists the legal sizes.
    """
    if batch < 1:
        raise InputError(f"the batch is {batch}; it must be at least 1")
    if size is not None and profiles and not any(p.holds_size(size) for p in profiles):
        raise InputError(
            f"the latents are {size[0]}x{size[1]}; {path.name} takes {legal_sizes(profiles)}; "
            "build with --profile b1@HEIGHTxWIDTH in pixels"
        )


def has_open_tokens(network: NetworkRecord) -> bool:
    """Whether a network of the manifest leaves the number of tokens of its text states open."""
    return any(TOKENS in shape for _, shape in network.inputs.values())


class PerShapeNetwork(TokenNetwork):
    """One graph, loaded separately for each requested shape.

    Args:
        path: the graph.
        profiles: the legal sizes in latents; if empty, any size that the graph takes.  Their batch sizes are ignored.
        max_loaded: number of shapes that stay loaded, those used last; each may hold a copy of the weights.
        max_idle: number of idle buffers to keep for each shape.
        open_tokens: whether the graph leaves the number of tokens of the text states open.
    """

    def __init__(
        self, path: Path, profiles: tuple[Profile, ...], max_loaded: int, max_idle: int, open_tokens: bool = False
    ) -> None:
        self.path, self.profiles, self.max_loaded, self._max_idle = path, profiles, max_loaded, max_idle
        self.open_tokens = open_tokens
        self._loaded: dict[Shape, Any] = {}  # least recently used first
        # dropped together with the loaded form that they are bound to
        self._idle: dict[Shape, list[Bound]] = {}
        self._lock = threading.Lock()

    @abstractmethod
    def _load(self, batch: int | None, size: Size | None, tokens: int | None) -> Any:
        """Load the network for a shape returned by :meth:`_key`."""

    @abstractmethod
    def _buffers(self, loaded: Any, batch: int, tokens: int | None) -> Bound:
        """Create buffers for an object returned by ``_load``."""

    def _dropped(self) -> None:
        """Called after a loaded form was dropped."""

    def loaded(self, batch: int, size: Size | None = None, tokens: int | None = None) -> Any:
        """Return the runtime's object for a shape; None keeps a dimension open that the graph leaves open."""
        key = self._key(batch, size, tokens)
        with self._lock:
            if key not in self._loaded:
                new = self._load(*key)
                if len(self._loaded) >= self.max_loaded:
                    while len(self._loaded) >= self.max_loaded:
                        oldest = next(iter(self._loaded))
                        self._loaded.pop(oldest)
                        self._idle = {shape: idle for shape, idle in self._idle.items() if self._key(*shape) != oldest}
                    self._dropped()
                self._loaded[key] = new
            self._loaded[key] = loaded = self._loaded.pop(key)
            return loaded

    def _key(self, batch: int | None, size: Size | None, tokens: int | None) -> Shape:
        """Return the shape to load in order to run the given one; None where one loaded form runs any value."""
        return batch, size, tokens

    def batches(self, most: int) -> tuple[int, ...]:
        """Return at most ``max_loaded`` batch sizes, by halving ``most``: loading another costs more than padding."""
        if most <= self.max_loaded:
            return super().batches(most)
        return tuple(sorted({-(-most // 2**k) for k in range(self.max_loaded)}))

    @contextlib.contextmanager
    def bind_tokens(self, batch: int, size: Size | None, tokens: int | None) -> Iterator[Any]:
        check_shape(self.path, self.profiles, batch, size)
        shape, loaded = (batch, size, tokens), self.loaded(batch, size, tokens)
        with self._lock:
            idle = self._idle.get(shape)
            bound = idle.pop() if idle else None
        bound = bound or self._buffers(loaded, batch, tokens)  # may take as long as several runs of a small network
        yield bound  # not reused after an error
        with self._lock:
            spare = self._idle.setdefault(shape, [])
            if self._loaded.get(self._key(*shape)) is loaded and len(spare) < self._max_idle:
                spare.append(bound)
