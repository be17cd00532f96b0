"""Interface between a sampler and a loaded network: its tensors, its buffers and one call."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bundle.profiles import Profile, Size, size_of
from ..errors import InputError

#: the U-Net's name of the text states, ``[B, tokens, D]``
STATES = "encoder_hidden_states"


@dataclass(frozen=True)
class Description:
    """A loaded network: tensors by name as ``(dtype, shape)``, where it runs, and its profiles."""

    inputs: dict[str, tuple[str, tuple[int | str, ...]]]
    outputs: dict[str, tuple[str, tuple[int | str, ...]]]
    device: str
    profiles: tuple[Profile, ...] = ()


class Bound(ABC):
    """Buffers for one batch and image size, and the call that runs on them; not thread-safe."""

    @abstractmethod
    def write(self, **inputs: np.ndarray) -> None:
        """Fill inputs by name; the others keep their values."""

    @abstractmethod
    def run(self) -> None:
        """Run once on the present inputs."""

    @abstractmethod
    def read(self) -> np.ndarray:
        """Wait for the run and copy the first output."""

    def read_all(self) -> tuple[np.ndarray, ...]:
        """Wait for the run and copy all outputs in their order; by default, only the first."""
        return (self.read(),)

    def host_input(self, name: str) -> np.ndarray | None:
        """The memory of an input, to be written in place; None if it is on a device."""
        return None

    def output(self) -> np.ndarray:
        """The first output after the run; the next run may overwrite it."""
        return self.read()


def check_input(name: str, array: np.ndarray, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an array for an input that does not exist or has another shape.

    Args:
        shapes: shapes of the buffers' inputs by name.

    Raises:
        InputError: with the names of the inputs, or both shapes.
    """
    if name not in shapes:
        raise InputError(f"the network has no input '{name}'; its inputs: {', '.join(shapes)}")
    if array.shape != shapes[name]:
        raise InputError(f"input '{name}' has shape {list(array.shape)}; the network takes {list(shapes[name])}")


class Network(ABC):
    """A loaded network; may be shared between threads."""

    @abstractmethod
    def describe(self) -> Description:
        """Its tensors and where it runs."""

    @abstractmethod
    def bind(self, batch: int, size: Size | None = None) -> contextlib.AbstractContextManager[Bound]:
        """Context manager with buffers for ``batch``.

        Args:
            size: height and width of the latents; may be None if the network has one size only, or no latents as input.

        Raises:
            InputError: if the network does not support this batch or size; the message lists the supported ones.
        """

    def at_tokens(self, tokens: int) -> Network:
        """This network for text states of ``tokens`` tokens; itself if it supports one number only."""
        return self

    def for_states(self, inputs: Mapping[str, np.ndarray]) -> Network:
        """This network for the number of tokens of the text states in ``inputs``, batched or not."""
        states = inputs.get(STATES)
        return self if states is None else self.at_tokens(states.shape[-2])

    def batches(self, most: int) -> tuple[int, ...]:
        """Batches up to ``most`` to which a caller with varying batches should pad.

        By default all of them, for networks that run each equally well.
        """
        return tuple(range(1, most + 1))

    def facts(self) -> dict[str, int]:
        """The runtime's figures of the compiled network; figures that it does not report are missing.

        They are ``layers``, ``reformats`` (layers that only change a tensor's layout or type) and
        ``device_memory_bytes`` (working memory without weights).
        """
        return {}

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        """The first output for named inputs that share their first dimension."""
        return self.outputs(**inputs)[0]

    def outputs(self, **inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """All outputs in their order, for named inputs that share their first dimension."""
        with self.for_states(inputs).bind(len(next(iter(inputs.values()))), size_of(inputs)) as bound:
            bound.write(**inputs)
            bound.run()
            return bound.read_all()


class TokenNetwork(Network):
    """A network that may support several numbers of tokens of the text states.

    Attributes:
        open_tokens: whether the number of tokens is a dynamic dimension of its graph.
    """

    open_tokens: bool

    @abstractmethod
    def bind_tokens(self, batch: int, size: Size | None, tokens: int | None) -> contextlib.AbstractContextManager[Any]:
        """Same as :meth:`bind`, for text states of ``tokens`` tokens."""

    def bind(self, batch: int, size: Size | None = None) -> contextlib.AbstractContextManager[Any]:
        return self.bind_tokens(batch, size, None)

    def at_tokens(self, tokens: int) -> Network:
        return AtTokens(self, tokens) if self.open_tokens else self


class AtTokens(Network):
    """A network for text states of a fixed number of tokens."""

    def __init__(self, network: TokenNetwork, tokens: int) -> None:
        self._network, self._tokens = network, tokens

    def describe(self) -> Description:
        return self._network.describe()

    def bind(self, batch: int, size: Size | None = None) -> contextlib.AbstractContextManager[Bound]:
        return self._network.bind_tokens(batch, size, self._tokens)

    def at_tokens(self, tokens: int) -> Network:
        return AtTokens(self._network, tokens)

    def batches(self, most: int) -> tuple[int, ...]:
        return self._network.batches(most)

    def facts(self) -> dict[str, int]:
        return self._network.facts()
