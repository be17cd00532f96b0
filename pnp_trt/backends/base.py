"""The interface of a backend: compile a graph, check a bundle, load a network, describe it, run it on bound buffers.

Nothing here imports an inference runtime, so that command lines and checks stay cheap.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.compile_options import CompileOptions
from ..bundle.profiles import MAX_BATCH, Profile, Size
from ..io.progress import Progress
from ..precision.recipes import RECIPES
from ..sampling.network import Bound, Description, Network
from .needs import Needs

if TYPE_CHECKING:
    from ..bundle.manifest import Manifest, NetworkRecord
    from ..sampling.device_loop import DeviceLoops

__all__ = [
    "MAX_BATCH", "Backend", "Bound", "CompileJob", "CompileOptions", "Compiled", "Description", "LoadOptions",
    "Network", "Profile", "Progress", "Size",
]  # fmt: skip


@dataclass(frozen=True)
class CompileJob:
    """One network to compile.

    Attributes:
        network: its name in the bundle.
        graph: its ONNX file in the folder that becomes the bundle, external weights beside it; for a backend that
            takes modules, the description of its module (``models.rebuild``).
        inputs: ``{name: (dtype, ("batch", …))}``; ``"height"`` and ``"width"`` where the graph leaves them open.
        precision: the recipe's name; the types themselves are in the graph.
        target: GPU that it is for, as ``Backend.resolve_target`` gives it.
        tensor_float32: whether its float32 may be computed in TensorFloat-32, as it stands in for half precision.
    """

    network: str
    graph: Path
    inputs: Mapping[str, tuple[str, Sequence[int | str]]]
    precision: str
    target: str
    profiles: tuple[Profile, ...]
    options: CompileOptions = field(default_factory=CompileOptions)
    tensor_float32: bool = False


@dataclass(frozen=True)
class Compiled:
    """Result of compiling one network.

    Attributes:
        file: the file that is loaded, beside the graph (it may be the graph).
        seconds: wall time.
        peak_memory: largest resident memory of the compiling process in bytes; None where it was not one of its own.
        notes: what the backend needs remembered in the manifest.
    """

    file: str
    seconds: float
    peak_memory: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)


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
        elements: element types that it runs, by their names in torch.
        profiles: what an engine is made for where the user names nothing; empty where any batch will do.
        beside_int8: the recipe of what is not quantised in an INT8 bundle.
        int8_one_scale: whether INT8 weights have one scale each, and not one for each output channel.
        open_tokens: whether one engine takes text states of several numbers of tokens.
        takes_modules: whether it is given PyTorch modules and no ONNX graphs.
        side_by_side: whether guides are exported in their form with fewer nodes (``Guide.side_by_side``), for runtimes
            that fuse little, where every node adds overhead.
        needs: what it needs of a machine, for ``pnp-trt doctor``.
    """

    name: str
    label: str
    elements: frozenset[str]
    profiles: tuple[str, ...]
    beside_int8: str = "fp16"
    int8_one_scale: bool = False
    open_tokens: bool = False
    takes_modules: bool = False
    side_by_side: bool = False
    needs: Needs = Needs()

    @property
    def precisions(self) -> tuple[str, ...]:
        """Names of the recipes that it runs: those whose element types are all its own."""
        return tuple(name for name, recipe in RECIPES.items() if recipe.elements <= self.elements)

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

    def elements_of(self, target: str) -> frozenset[str]:
        """Element types that it runs on a target; all of ``elements`` by default."""
        return self.elements

    @abstractmethod
    def prepare(self, graph: Path) -> dict[str, tuple[str, list[dict[str, Any]]]]:
        """Rewrite an exported graph in place where this runtime needs it otherwise.

        Returns:
            New initialiser → (what it was made of, the steps), as ``WeightMap.derive`` takes it.
        """

    @abstractmethod
    def compile(self, job: CompileJob, progress: Progress) -> Compiled:
        """Make what ``load`` loads.

        Raises:
            InputError: if the job cannot work here (precision, target, memory).
            PnpError: if the compiler fails.
        """

    def replace_weights(self, job: CompileJob, engine: Path, progress: Progress) -> Compiled:
        """Make what ``load`` loads of a graph that was compiled before and has new weights since.

        Args:
            engine: what was made of the graph with the old weights, beside or elsewhere; it is not written to.

        Returns:
            As ``compile``; its notes' ``weights`` states how the new ones came in.

        Raises:
            InputError, PnpError: as ``compile``.
        """
        made = self.compile(job, progress)
        return replace(made, notes={**made.notes, "weights": "compiled again"})

    def check_files(self, manifest: Manifest) -> None:
        """Refuse a bundle whose networks' files are not of the kind that this backend loads.

        A backend that opens other files beside the one that it is given must refuse names that lead to files which no
        hash covers.

        Raises:
            BundleCorrupt: naming the network and its file.
        """
        return None

    def layers(self, graph: Path, facts: Mapping[str, int] | None) -> tuple[dict[str, int], str | None]:
        """What reports tell of one network's layers, and a note on what is not known.

        Args:
            graph: the file that it was compiled from.
            facts: ``Network.facts`` of the loaded engine; None where it is not loaded here.
        """
        if facts is None:
            return {}, "the engine is not loaded here, so that its inspector could not be asked"
        return dict(facts), None if "layers" in facts else "the engine keeps nothing of its layers"

    def remark(self, precision: str) -> str | None:
        """What a user should know of bundles of this backend in a precision, as a sentence; None for nothing."""
        return None

    @abstractmethod
    def check(self, manifest: Manifest) -> None:
        """Refuse a bundle whose engines cannot run here, before anything is loaded.

        Raises:
            InputError: naming the field, both values, and the command that rebuilds.
        """

    @abstractmethod
    def cannot_run(self, target: str, options: CompileOptions | None = None) -> str | None:
        """Why engines for ``target`` cannot run on this machine, as a clause; None if they can."""

    @abstractmethod
    def load(self, path: Path, network: NetworkRecord, options: LoadOptions) -> Network:
        """Load one network of a bundle that was checked.

        Args:
            path: the file to load.
            network: its entry in the manifest.
        """

    def device_loops(self, unet: Network, vae: Network, condition: Network | None, name: str) -> DeviceLoops | None:
        """What runs whole images on a GPU; None where the host runs the loop.

        Args:
            condition: the part of the guide that depends on w alone, where it is a separate network.
            name: of the bundle.
        """
        return None
