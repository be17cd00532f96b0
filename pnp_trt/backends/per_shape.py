"""Networks that a runtime loads once per shape, or per part of it: those used last are kept, with their buffers."""

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

#: batch, size of the latents, and tokens of the text states; None leaves open what the graph leaves open
Shape = tuple[int | None, Size | None, int | None]


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


def has_open_tokens(network: NetworkRecord) -> bool:
    """Whether a network of the manifest leaves the tokens of its text states open."""
    return any(TOKENS in shape for _, shape in network.inputs.values())


class PerShapeNetwork(TokenNetwork):
    """One graph, loaded for each shape that is asked for.

    Args:
        path: the graph.
        profiles: the legal sizes in latents; empty takes what the graph takes.  Their batches mean nothing here.
        max_loaded: shapes whose loaded form is kept, those used last; each may hold the network's weights.
        max_idle: idle buffers that are kept for each shape.
        open_tokens: whether the graph leaves the tokens of the text states open.
    """

    def __init__(
        self, path: Path, profiles: tuple[Profile, ...], max_loaded: int, max_idle: int, open_tokens: bool = False
    ) -> None:
        self.path, self.profiles, self.max_loaded, self._max_idle = path, profiles, max_loaded, max_idle
        self.open_tokens = open_tokens
        self._loaded: dict[Shape, Any] = {}  # the one used last stands last
        # they go when what they are bound to goes
        self._idle: dict[Shape, list[Bound]] = {}
        self._lock = threading.Lock()

    @abstractmethod
    def _load(self, batch: int | None, size: Size | None, tokens: int | None) -> Any:
        """The network loaded for a shape that :meth:`_key` gave."""

    @abstractmethod
    def _buffers(self, loaded: Any, batch: int, tokens: int | None) -> Bound:
        """New buffers for what ``_load`` gave."""

    def _dropped(self) -> None:
        """Called when a loaded form was dropped."""

    def loaded(self, batch: int, size: Size | None = None, tokens: int | None = None) -> Any:
        """The runtime's own object for a shape; None leaves open what the graph leaves open."""
        key = self._key(batch, size, tokens)
        with self._lock:
            if key not in self._loaded:
                made = self._load(*key)
                if len(self._loaded) >= self.max_loaded:
                    while len(self._loaded) >= self.max_loaded:
                        oldest = next(iter(self._loaded))
                        self._loaded.pop(oldest)
                        self._idle = {shape: idle for shape, idle in self._idle.items() if self._key(*shape) != oldest}
                    self._dropped()
                self._loaded[key] = made
            self._loaded[key] = found = self._loaded.pop(key)
            return found

    def _key(self, batch: int | None, size: Size | None, tokens: int | None) -> Shape:
        """The shape that is loaded to run another one: None in it stands for what one loaded form runs any of."""
        return batch, size, tokens

    def batches(self, most: int) -> tuple[int, ...]:
        """As many as are kept, ``most`` halved again and again: loading one costs more than padding."""
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
        yield bound  # after an error it is not used again
        with self._lock:
            kept = self._idle.setdefault(shape, [])
            if self._loaded.get(self._key(*shape)) is loaded and len(kept) < self._max_idle:
                kept.append(bound)
