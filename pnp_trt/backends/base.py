"""What every backend offers: compile a graph, check a bundle, load a network, describe it, run it on bound buffers.

Nothing here imports an inference runtime, so that command lines and checks stay cheap.
"""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError

#: most pictures at once
MAX_BATCH = 32
#: called with (what is being done, steps done, steps in all) while a network is compiled
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Profile:
    """A named range of batch sizes that an engine is made for.

    Attributes:
        name: ``b1``, ``b2-8`` …
        minimum, optimum, maximum: pictures at once; kernels are chosen for the optimum.
    """

    name: str
    minimum: int
    optimum: int
    maximum: int

    @classmethod
    def parse(cls, text: str) -> Profile:
        """``b4`` is a batch of just four; ``b2-8`` is two to eight, fastest at eight.

        Raises:
            InputError: with the form and the legal range.
        """
        found = re.fullmatch(r"b(\d+)(?:-(\d+))?", text)
        low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= low <= high <= MAX_BATCH:
            raise InputError(
                f"profile is '{text}'; write b1 for one picture at once, b2-8 for two to eight; at most {MAX_BATCH}"
            )
        return cls(text, low, high, high)

    def doubled(self) -> Profile:
        """The same for a network that sees every picture twice: with its prompt and without."""
        return Profile(self.name, self.minimum, 2 * self.optimum, 2 * self.maximum)

    def holds(self, batch: int) -> bool:
        """Whether ``batch`` is inside."""
        return self.minimum <= batch <= self.maximum


@dataclass(frozen=True)
class CompileOptions:
    """How to compile; a backend ignores what it has no use for.

    Attributes:
        workspace: bytes that the compiler may plan as scratch memory on the GPU; None leaves it to the compiler.
        refittable: whether weights can be replaced inside the engine.
        version_compatible: whether later versions of the runtime may load the engine (``tensorrt`` only).
        hardware_compatible: whether other GPUs of the same or a later architecture may (``tensorrt`` only).
        check_memory: refuse to start where the host's memory will not do.
    """

    workspace: int | None = None
    refittable: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    check_memory: bool = True


@dataclass(frozen=True)
class CompileJob:
    """One network to compile.

    Attributes:
        network: its name in the bundle.
        graph: its ONNX file in the folder that becomes the bundle, external weights beside it; for a backend that
            takes modules, the description of its module (``models.rebuild``).
        inputs: ``{name: (dtype, ("batch", …))}``.
        precision: the recipe's name; the types themselves are in the graph.
        target: GPU that it is for, as ``Backend.resolve_target`` gives it.
    """

    network: str
    graph: Path
    inputs: Mapping[str, tuple[str, Sequence[int | str]]]
    precision: str
    target: str
    profiles: tuple[Profile, ...]
    options: CompileOptions = field(default_factory=CompileOptions)


@dataclass(frozen=True)
class Compiled:
    """What became of a network.

    Attributes:
        file: the file that is loaded, beside the graph (it may be the graph).
        seconds: wall time.
        peak_memory: largest resident memory of the compiling process in bytes; None where it was not one of its own.
        notes: what the backend wants remembered in the manifest.
    """

    file: str
    seconds: float
    peak_memory: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Description:
    """A loaded network: tensors by name as ``(dtype, shape)``, where it runs, and its profiles."""

    inputs: dict[str, tuple[str, tuple[int | str, ...]]]
    outputs: dict[str, tuple[str, tuple[int | str, ...]]]
    device: str
    profiles: tuple[Profile, ...] = ()


class Bound(ABC):
    """Buffers for one batch size, and the call that runs on them; for one thread at a time."""

    @abstractmethod
    def write(self, **inputs: np.ndarray) -> None:
        """Fill inputs by name; what is not named keeps what it held."""

    @abstractmethod
    def run(self) -> None:
        """Run once on what the inputs hold."""

    @abstractmethod
    def read(self) -> np.ndarray:
        """A copy of the first output, once the run has ended."""


class Network(ABC):
    """A loaded network; may be shared between threads."""

    @abstractmethod
    def describe(self) -> Description:
        """Its tensors and where it runs."""

    @abstractmethod
    def bind(self, batch: int) -> contextlib.AbstractContextManager[Bound]:
        """Buffers for ``batch``, for the length of a ``with`` block.

        Raises:
            InputError: if the network was not made for this batch size; the message has the legal ones.
        """

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        """The first output for named inputs that share their first dimension."""
        with self.bind(len(next(iter(inputs.values())))) as bound:
            bound.write(**inputs)
            bound.run()
            return bound.read()


@dataclass(frozen=True)
class LoadOptions:
    """How to load.

    Attributes:
        provider: ``auto``, ``cpu`` or ``cuda``.
        threads: of the CPU; None takes all that are usable.
    """

    provider: str = "auto"
    threads: int | None = None


class Backend(ABC):
    """One inference runtime.

    Attributes:
        name: as the command line and the manifest spell it.
        label: a short form of the name for the folders of bundles; empty for the default backend.
        precisions: names of the recipes that it can run.
        profiles: what an engine is made for where the user names nothing; empty where any batch will do.
        takes_modules: whether it is given PyTorch modules and no ONNX graphs.
    """

    name: str
    label: str
    precisions: tuple[str, ...]
    profiles: tuple[str, ...]
    takes_modules: bool = False

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Packages whose version an engine is tied to, ``{distribution: version}``; imports nothing.

        Raises:
            InputError: if one is missing, with the command that installs it.
        """

    @abstractmethod
    def resolve_target(self, target: str | None, precision: str, options: CompileOptions) -> str:
        """What ``--target`` means here, the default for None.

        Raises:
            InputError: if this machine cannot compile for it, or options or precision do not go with it.
        """

    @abstractmethod
    def prepare(self, graph: Path) -> dict[str, tuple[str, dict[str, Any]]]:
        """Rewrite an exported graph in place where this runtime wants it otherwise.

        Returns:
            New initialiser → (what it was made of, the step), as ``WeightMap.derive`` takes it.
        """

    @abstractmethod
    def compile(self, job: CompileJob, progress: Progress) -> Compiled:
        """Make what ``load`` loads.

        Raises:
            InputError: if the job cannot work here (precision, target, memory).
            PnpError: if the compiler fails.
        """

    @abstractmethod
    def check(self, manifest: Mapping[str, Any]) -> None:
        """Refuse a bundle whose engines cannot run here, before anything is loaded.

        Raises:
            InputError: naming the field, both values, and the command that rebuilds.
        """

    @abstractmethod
    def cannot_run(self, target: str, options: Mapping[str, Any] | None = None) -> str | None:
        """Why engines for ``target`` cannot run on this machine, as a clause; None if they can."""

    @abstractmethod
    def load(self, path: Path, network: Mapping[str, Any], options: LoadOptions) -> Network:
        """Load one network of a bundle that was checked.

        Args:
            path: the file to load.
            network: its entry in the manifest.
        """
