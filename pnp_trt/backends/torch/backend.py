"""PyTorch, eager or through ``torch.compile``: as a reference, and for GPUs without TensorRT.

Its bundles hold modules (``models.rebuild``) instead of graphs.  torch is imported when a network is loaded.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bundle.compile_options import CompileOptions
from ...bundle.manifest import Manifest, NetworkRecord
from ...errors import BundleCorrupt, IncompatibleDevice, InputError
from ..base import Backend, Compiled, CompileJob, LoadOptions, Progress
from . import NEEDS
from .network import TorchNetwork

if TYPE_CHECKING:
    from ...sampling.device_loop import DeviceLoops

TARGETS = ("eager", "compile")
_PACKAGES = ("torch", "diffusers", "transformers", "safetensors")


class Torch(Backend):
    """Runs the modules from which graphs are exported; the target is the mode, ``eager`` or ``compile``."""

    name = "torch"
    label = "torch"
    needs = NEEDS
    elements = frozenset({"float32", "float16", "bfloat16"})
    profiles = ()
    open_tokens = True
    takes_modules = True

    def versions(self) -> dict[str, str]:
        return {}  # every permitted version reads the safetensors files and configs

    def resolve_target(self, target: str | None, precision: str, options: CompileOptions) -> str:
        if target not in (None, *TARGETS):
            raise InputError(f"target is '{target}'; backend 'torch' takes: {', '.join(TARGETS)}")
        for name in ("refittable", "version_compatible", "hardware_compatible"):
            if getattr(options, name):
                raise InputError(f"--{name.replace('_', '-')} is for TensorRT; leave it out for a torch bundle")
        return target or TARGETS[0]

    def prepare(self, graph: Path) -> dict[str, tuple[str, list[dict[str, Any]]]]:
        return {}  # no graph exists

    def compile(self, job: CompileJob, progress: Progress) -> Compiled:
        # torch.compile runs on first use of a batch size; its output is specific to this machine and not in the bundle
        progress(job.network, 1, 1)
        return Compiled(job.graph.with_suffix(".safetensors").name, 0.0, notes={"mode": job.target})

    def check_files(self, manifest: Manifest) -> None:
        for name, network in manifest.networks.items():
            if network.graph != f"{network.file.removesuffix('.safetensors')}.json":
                raise BundleCorrupt(
                    f"engine '{manifest.name}': networks.{name}.graph is '{network.graph}'; it must be the .json file "
                    f"beside the .safetensors file, for backend {self.name}; build the bundle again"
                )

    def layers(self, graph: Path, facts: Mapping[str, int] | None) -> tuple[dict[str, int], str | None]:
        return dict(facts or {}), "PyTorch runs modules; there are no layers to count"

    def check(self, manifest: Manifest) -> None:
        if (reason := self.cannot_run(manifest.target)) is not None:
            raise IncompatibleDevice(f"engine '{manifest.name}' cannot run here: {reason}")

    def cannot_run(self, target: str, options: CompileOptions | None = None) -> str | None:
        if missing := [p for p in _PACKAGES if importlib.util.find_spec(p) is None]:
            return f"backend 'torch' needs {', '.join(missing)}; install with: pip install 'pnp-trt[build]'"
        if target == "compile" and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++", "cl"))):
            return "torch.compile needs a C++ compiler, but none was found; install g++, or build with --target eager"
        return None

    def load(self, path: Path, network: NetworkRecord, options: LoadOptions) -> TorchNetwork:
        return TorchNetwork(path, network, options)

    def device_loops(self, unet: Any, vae: Any, condition: Any, name: str) -> DeviceLoops | None:
        if unet.device != "cuda":
            return None
        from .graph import device_loops

        return device_loops(unet, vae, condition, name)
