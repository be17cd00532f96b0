"""The interface of a backend: compile a graph, check a bundle, load a network, describe it, run it on bound buffers.

Nothing here imports an inference runtime, which keeps the command line and the checks fast.
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
        network: name of the network in the bundle.
        graph: ONNX file in the folder that becomes the bundle, with external weights beside it; for a backend that
            takes modules, the description of the module (``models.rebuild``).
        inputs: ``{name: (dtype, ("batch", …))}``; ``"height"`` and ``"width"`` where the graph leaves them open.
        precision: name of the recipe; the element types themselves are in the graph.
        target: GPU to compile for, as ``Backend.resolve_target`` returns it.
        tensor_float32: whether float32 may be computed in TensorFloat-32, for networks that replace half precision by
            float32 only for its range.
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
        file: name of the file to load, beside the graph; it may be the graph itself.
        seconds: wall time.
        peak_memory: largest resident memory of the compiling process in bytes; None without a separate process.
        notes: backend-specific entries for the manifest.
    """

    file: str
    seconds: float
    peak_memory: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadOptions:
    """Options for loading a network.

    Attributes:
        provider: ``auto``, ``cpu`` or ``cuda``.
        threads: number of CPU threads; None takes all usable cores.
    """

    provider: str = "auto"
    threads: int | None = None


class Backend(ABC):
    """One inference runtime.

    Attributes:
        name: name on the command line and in the manifest.
        label: short form of the name for the folders of bundles; empty for the default backend.
        elements: supported element types, by their names in torch.
        profiles: default profiles of an engine; empty if an engine runs any batch size.
        beside_int8: recipe of the networks and layers of an INT8 bundle that are not quantised.
        int8_one_scale: whether an INT8 weight has one scale rather than one per output channel.
        open_tokens: whether one engine accepts text states with different numbers of tokens.
        takes_modules: whether it takes PyTorch modules instead of ONNX graphs.
        side_by_side: whether guides are exported in their form with fewer nodes (``Guide.side_by_side``), for runtimes
            that fuse little, where every node adds overhead.
        needs: requirements on the machine, for ``pnp-trt doctor``.
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
        """Names of the supported recipes: those whose element types are all among ``elements``."""
        return tuple(name for name, recipe in RECIPES.items() if recipe.elements <= self.elements)

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Return the packages whose version an engine is tied to, ``{distribution: version}``, without importing them.

        Raises:
            InputError: if one is missing; the message has the command that installs it.
        """

    @abstractmethod
    def resolve_target(self, target: str | None, precision: str, options: CompileOptions) -> str:
        """Resolve ``--target``; None gives the default target.

        Raises:
            InputError: if this machine cannot compile for it, or it is incompatible with the options or precision.
        """

    def elements_of(self, target: str) -> frozenset[str]:
        """Return the element types supported on a target; all of ``elements`` by default."""
        return self.elements

    @abstractmethod
    def prepare(self, graph: Path) -> dict[str, tuple[str, list[dict[str, Any]]]]:
        """Rewrite an exported graph in place where this runtime needs a different form.

        Returns:
            New initialiser → (source initialiser, transform steps), as ``WeightMap.derive`` takes it.
        """

    @abstractmethod
    def compile(self, job: CompileJob, progress: Progress) -> Compiled:
        """Compile a graph into the file that ``load`` loads.

        Raises:
            InputError: if the job is impossible on this machine (precision, target, memory).
            PnpError: if the compiler fails.
        """

    def replace_weights(self, job: CompileJob, engine: Path, progress: Progress) -> Compiled:
        """Update the compiled form of a graph whose weights have changed; the default compiles it again.

        Args:
            engine: the file compiled from the graph with the old weights; it is not modified.

        Returns:
            Same as ``compile``; ``weights`` in its notes states how the new weights were applied.

        Raises:
            InputError, PnpError: same as ``compile``.
        """
        compiled = self.compile(job, progress)
        return replace(compiled, notes={**compiled.notes, "weights": "compiled again"})

    def check_files(self, manifest: Manifest) -> None:
        """Refuse a bundle with network files of a kind that this backend does not load.

        A backend that also opens files beside the given one must refuse names for which those files would not be
        covered by a hash.

        Raises:
            BundleCorrupt: if there is such a file; the message names the network and the file.
        """
        return None

    def layers(self, graph: Path, facts: Mapping[str, int] | None) -> tuple[dict[str, int], str | None]:
        """Return layer counts of one network for reports, and a note on what is unknown.

        Args:
            graph: the file that the network was compiled from.
            facts: ``Network.facts`` of the loaded engine; None if it is not loaded.
        """
        if facts is None:
            return {}, "the engine is not loaded here, so its inspector was not queried"
        return dict(facts), None if "layers" in facts else "the engine holds no information about its layers"

    def remark(self, precision: str) -> str | None:
        """Return advice for users of this backend in a precision, as a sentence; None if there is none."""
        return None

    @abstractmethod
    def check(self, manifest: Manifest) -> None:
        """Refuse a bundle whose engines cannot run here, before anything is loaded.

        Raises:
            InputError: if one cannot; the message names the field, both values, and the command that rebuilds.
        """

    @abstractmethod
    def cannot_run(self, target: str, options: CompileOptions | None = None) -> str | None:
        """Return why engines for ``target`` cannot run on this machine, as a clause; None if they can."""

    @abstractmethod
    def load(self, path: Path, network: NetworkRecord, options: LoadOptions) -> Network:
        """Load one network of a checked bundle.

        Args:
            path: the file to load.
            network: its entry in the manifest.
        """

    def device_loops(self, unet: Network, vae: Network, condition: Network | None, name: str) -> DeviceLoops | None:
        """Return loops that generate whole images on a GPU; None if the host runs the loop.

        Args:
            condition: the part of the guide that depends only on w, if it is a separate network.
            name: name of the bundle.
        """
        return None
