"""A backend: ONNX's reference implementation in numpy, slow, but a reference for all other backends."""

import contextlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pnp_trt.backends.base import Backend, Compiled, CompileJob, LoadOptions, Progress
from pnp_trt.bundle.compile_options import CompileOptions
from pnp_trt.bundle.manifest import Manifest, NetworkRecord
from pnp_trt.bundle.profiles import Size
from pnp_trt.errors import InputError
from pnp_trt.sampling.network import Bound, Description, Network


class OnnxReference(Backend):
    """A backend that runs the bundle's graphs as exported."""

    name = "onnx-reference"
    label = "reference"
    elements = frozenset({"float32"})
    profiles = ()
    beside_int8 = "fp32"

    def versions(self) -> dict[str, str]:
        return {"onnx": version("onnx")}

    def resolve_target(self, target: str | None, precision: str, options: CompileOptions) -> str:
        if target not in (None, "any"):
            raise InputError(f"target is '{target}', but backend {self.name} runs everywhere; omit --target")
        return "any"

    def prepare(self, graph: Path) -> dict[str, tuple[str, list[dict[str, Any]]]]:
        return {}

    def compile(self, job: CompileJob, progress: Progress) -> Compiled:
        progress(job.network, 1, 1)
        return Compiled(job.graph.name, 0.0)

    def check(self, manifest: Manifest) -> None:
        pass

    def cannot_run(self, target: str, options: CompileOptions | None = None) -> str | None:
        return None

    def load(self, path: Path, network: NetworkRecord, options: LoadOptions) -> Network:
        return ReferenceNetwork(path, network)


class ReferenceNetwork(Network):
    """A network that runs one graph."""

    def __init__(self, path: Path, record: NetworkRecord) -> None:
        from onnx.reference import ReferenceEvaluator

        self.evaluator, self.record = ReferenceEvaluator(str(path)), record

    def describe(self) -> Description:
        return Description(dict(self.record.inputs), dict(self.record.outputs), "cpu")

    @contextlib.contextmanager
    def bind(self, batch: int, size: Size | None = None) -> Iterator[Bound]:
        yield ReferenceBound(self.evaluator)


class ReferenceBound(Bound):
    """The network with the inputs and the output of one batch."""

    def __init__(self, evaluator: Any) -> None:
        self.evaluator, self.inputs = evaluator, {}

    def write(self, **inputs: np.ndarray) -> None:
        self.inputs.update({name: np.array(value) for name, value in inputs.items()})

    def run(self) -> None:
        (self.values, *_) = self.evaluator.run(None, self.inputs)

    def read(self) -> np.ndarray:
        return np.array(self.values, np.float32)
