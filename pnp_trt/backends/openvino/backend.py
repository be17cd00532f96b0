"""OpenVINO on the CPU, with the same graphs as ONNX Runtime's bundles."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle.compile_options import CompileOptions
from ...bundle.manifest import TOKENS, Manifest, NetworkRecord
from ...errors import InputError, MissingDependency, PnpError
from ...io.text import printable
from ...sampling.network import Bound, Description, Network, check_input
from ...version import installed
from ..base import Backend, LoadOptions, Profile, Size
from ..onnxruntime.backend import OnnxRuntime
from ..per_shape import PerShapeNetwork, has_open_tokens
from . import NEEDS

_MISSING = "OpenVINO is not installed; install with: pip install 'pnp-trt[openvino]'"


@cache
def _core() -> Any:
    """Return OpenVINO's entry point, one per process.

    Raises:
        MissingDependency: if OpenVINO is not installed; the message has the command that installs it.
    """
    try:
        import openvino
    except ImportError:
        raise MissingDependency(_MISSING) from None
    return openvino.Core()


class OpenVino(OnnxRuntime):
    """Builds the same bundles as ONNX Runtime, and runs them with OpenVINO's CPU plugin in float32."""

    name = "openvino"
    label = "openvino"
    elements = frozenset({"float32"})
    needs = NEEDS

    def versions(self) -> dict[str, str]:
        if not installed(["openvino"]):
            raise MissingDependency(_MISSING)
        return {}  # an engine is a plain graph, so it is not tied to a version

    def layers(self, graph: Path, facts: Mapping[str, int] | None) -> tuple[dict[str, int], str | None]:
        return Backend.layers(self, graph, facts)

    def check(self, manifest: Manifest) -> None:
        self.versions()

    def cannot_run(self, target: str, options: CompileOptions | None = None) -> str | None:
        try:
            self.versions()
        except MissingDependency as e:
            return str(e)
        return None

    def load(self, path: Path, network: NetworkRecord, options: LoadOptions) -> Network:
        if options.provider not in ("auto", "cpu"):
            raise InputError(f"provider is '{options.provider}'; backend {self.name} runs on: auto, cpu")
        return OpenVinoNetwork(path, options.threads, network.profiles, has_open_tokens(network))


class OpenVinoNetwork(PerShapeNetwork):
    """One ONNX graph, compiled once per batch size, image size and number of tokens; those used last are kept.

    Args:
        threads: number of CPU threads; None leaves the choice to OpenVINO.
        profiles: the legal sizes in latents; if empty, any size that the graph takes.  Their batch sizes are ignored.
        open_tokens: whether the graph leaves the number of tokens of the text states open.
    """

    #: compiled shapes to keep
    KEEP = 8

    def __init__(
        self, path: Path, threads: int | None = None, profiles: tuple[Profile, ...] = (), open_tokens: bool = False
    ) -> None:
        super().__init__(path, profiles, self.KEEP, max_idle=self.KEEP, open_tokens=open_tokens)
        self._threads = threads

    def _load(self, batch: int | None, size: Size | None, tokens: int | None) -> Any:
        core = _core()
        # OpenVINO's default is bfloat16 if the processor supports it
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if self._threads:
            options["INFERENCE_NUM_THREADS"] = self._threads
        try:
            model = core.read_model(self.path)
            model.reshape({i.any_name: _fixed(i.partial_shape, batch, size, tokens) for i in model.inputs})
            return core.compile_model(model, "CPU", options)
        except Exception as e:  # OpenVINO raises RuntimeError and others
            raise PnpError(f"OpenVINO cannot load {self.path}: {printable(e, limit=500)}") from e

    def _buffers(self, loaded: Any, batch: int, tokens: int | None) -> OpenVinoBound:
        return OpenVinoBound(loaded)

    def describe(self) -> Description:
        model = _core().read_model(self.path)

        def tensors(ports: Any) -> dict[str, tuple[str, tuple[int | str, ...]]]:
            return {p.any_name: (_dtype(p).name, ("batch", *_sides(p.partial_shape)[1:])) for p in ports}

        return Description(tensors(model.inputs), tensors(model.outputs), "CPU", self.profiles)

    def facts(self) -> dict[str, int]:
        if not self._loaded:
            return {}
        operations = next(reversed(self._loaded.values())).get_runtime_model().get_ops()
        layers = [op.get_rt_info()["layerType"].astype(str) for op in operations]
        moved = ("Reorder", "Convert", "Reinterpret")
        return {
            "layers": sum(kind not in ("Input", "Output", "Const") for kind in layers),
            "reformats": sum(kind in moved for kind in layers),
        }


def _sides(shape: Any) -> list[int | str]:
    """Return the shape of a graph's input or output, with open dimensions named by their position."""
    names = ["batch", TOKENS] if len(shape) == 3 else ["batch", "channels", "height", "width"]
    return [d.get_length() if d.is_static else names[i] for i, d in enumerate(shape)]


def _fixed(shape: Any, batch: int | None, size: Size | None, tokens: int | None) -> list[int]:
    """Return an input's shape with batch size, latents' size and tokens filled in; -1 for open dimensions."""
    sides = [d.get_length() if d.is_static else -1 for d in shape]
    sides[0] = -1 if batch is None else batch
    if len(sides) == 4 and size is not None:
        sides[2:] = size
    if len(sides) == 3 and sides[1] < 0 and tokens is not None:
        sides[1] = tokens
    return sides


def _dtype(port: Any) -> np.dtype[Any]:
    return np.dtype(port.element_type.to_dtype())


class OpenVinoBound(Bound):
    """An inference request on numpy arrays, which the caller may write and read in place."""

    def __init__(self, compiled: Any) -> None:
        import openvino

        self.compiled = compiled
        self._request = compiled.create_infer_request()
        self._host: dict[str, np.ndarray] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for port in compiled.inputs:
            if port.partial_shape.is_dynamic:
                raise InputError(f"{port.any_name} has an open size; bind it with the latents' size and the tokens")
            self._shapes[port.any_name] = tuple(port.shape)
            self._host[port.any_name] = np.zeros(self._shapes[port.any_name], _dtype(port))
            self._request.set_tensor(port, openvino.Tensor(self._host[port.any_name], shared_memory=True))

    def write(self, **inputs: np.ndarray) -> None:
        for name, array in inputs.items():
            check_input(name, array, self._shapes)
            np.copyto(self._host[name], array)

    def run(self) -> None:
        try:
            self._request.infer(share_outputs=True)
        except Exception as e:  # OpenVINO raises RuntimeError and others
            raise PnpError(f"OpenVINO cannot run a network: {printable(e, limit=500)}") from e

    def host_input(self, name: str) -> np.ndarray | None:
        return self._host.get(name)

    def output(self) -> np.ndarray:
        data: np.ndarray = self._request.get_output_tensor(0).data
        return data

    def read(self) -> np.ndarray:
        return np.array(self.output())

    def read_all(self) -> tuple[np.ndarray, ...]:
        count = len(self.compiled.outputs)
        return tuple(np.array(self._request.get_output_tensor(i).data) for i in range(count))
