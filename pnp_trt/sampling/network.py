"""A loaded network as a sampler uses it: its tensors, buffers to run on, and one call."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from ..bundle.profiles import Profile, Size, size_of


@dataclass(frozen=True)
class Description:
    """A loaded network: tensors by name as ``(dtype, shape)``, where it runs, and its profiles."""

    inputs: dict[str, tuple[str, tuple[int | str, ...]]]
    outputs: dict[str, tuple[str, tuple[int | str, ...]]]
    device: str
    profiles: tuple[Profile, ...] = ()


class Bound(ABC):
    """Buffers for one batch and image size, and the call that runs on them; for one thread at a time."""

    @abstractmethod
    def write(self, **inputs: np.ndarray) -> None:
        """Fill inputs by name; what is not named keeps what it held."""

    @abstractmethod
    def run(self) -> None:
        """Run once on what the inputs hold."""

    @abstractmethod
    def read(self) -> np.ndarray:
        """A copy of the first output, once the run has ended."""

    def read_all(self) -> tuple[np.ndarray, ...]:
        """Copies of all outputs in their order, once the run has ended; of the first alone where there is one."""
        return (self.read(),)

    def host_input(self, name: str) -> np.ndarray | None:
        """The memory that ``run`` reads an input from, to be written in place; None where that is on a device."""
        return None

    def output(self) -> np.ndarray:
        """The first output, once the run has ended; it may change with the next run."""
        return self.read()


class Network(ABC):
    """A loaded network; may be shared between threads."""

    @abstractmethod
    def describe(self) -> Description:
        """Its tensors and where it runs."""

    @abstractmethod
    def bind(self, batch: int, size: Size | None = None) -> contextlib.AbstractContextManager[Bound]:
        """Buffers for ``batch``, for the length of a ``with`` block.

        Args:
            size: height and width of the latents; None will do where the network has one size, or sees no latents.

        Raises:
            InputError: if the network was not made for this batch or size; the message has the legal ones.
        """

    def batches(self, most: int) -> tuple[int, ...]:
        """Batches up to ``most`` that a caller should keep to whose batch changes from call to call.

        All of them, where a network is as ready for one as for another.
        """
        return tuple(range(1, most + 1))

    def facts(self) -> dict[str, int]:
        """The runtime's figures of the compiled network: ``layers``, ``reformats`` (layers that only change a tensor's
        layout or type) and ``device_memory_bytes`` (working memory without weights); unreported ones are missing.
        """
        return {}

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        """The first output for named inputs that share their first dimension."""
        with self.bind(len(next(iter(inputs.values()))), size_of(inputs)) as bound:
            bound.write(**inputs)
            bound.run()
            return bound.read()

    def outputs(self, **inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """All outputs in their order, for named inputs that share their first dimension."""
        with self.bind(len(next(iter(inputs.values()))), size_of(inputs)) as bound:
            bound.write(**inputs)
            bound.run()
            return bound.read_all()
