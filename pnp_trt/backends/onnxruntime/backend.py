"""The default backend: ONNX Runtime on CPU and CUDA."""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import memory
from ...bundle.compile_options import CompileOptions
from ...bundle.manifest import TOKENS, Manifest, NetworkRecord
from ...errors import BundleCorrupt, InputError, PnpError
from ...io.text import printable
from ...precision.recipes import RECIPES
from ...processor import usable_cores
from ...sampling.network import Bound, Description, Network, check_input
from ..base import Backend, Compiled, CompileJob, LoadOptions, Profile, Progress, Size
from ..gpus import driver_present
from ..per_shape import PerShapeNetwork, Shape, has_open_tokens
from . import NEEDS
from .for_cuda import for_cuda

#: bytes of weights below which free memory is not checked
_LARGE = 2**30
#: part of the names of E4M3 weights in a graph (``precision.int8.qdq.FLOAT8``)
_FLOAT8 = b".float8"
#: ONNX Runtime's names of the types of a graph's inputs and outputs → numpy's
DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(float16)": "float16"}


def providers(provider: str = "auto") -> list[str]:
    """Return the execution providers for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        InputError: for any other value, or for ``cuda`` if CUDA is not usable.
    """
    import onnxruntime as ort

    usable = "CUDAExecutionProvider" in ort.get_available_providers() and driver_present()
    if provider == "cpu" or (provider == "auto" and not usable):
        return ["CPUExecutionProvider"]
    if provider not in ("auto", "cuda"):
        raise InputError(f"provider is '{provider}'; known: auto, cpu, cuda")
    if not usable:
        raise InputError(
            "provider 'cuda' was requested, but no NVIDIA driver was found; use --provider cpu, see pnp-trt doctor"
        )
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


#: operators that compute shapes, which ONNX Runtime deliberately leaves on the CPU
_SHAPES = frozenset(
    (
        "Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Gather", "Identity", "Range", "Reshape", "Shape",
        "Size", "Slice", "Split", "Squeeze", "Unsqueeze",
    )
)  # fmt: skip


def with_options(names: list[str], half: bool) -> list[Any]:
    """Return execution providers as a session takes them, with options for CUDA.

    ``use_tf32``
        Off for a float32 graph, whose results would otherwise differ in the fourth digit; on for half precision.  The
        option is meant for float32 (microsoft/onnxruntime#19426).  However, since cuDNN's frontend plans convolutions
        (#19470), off excludes plans that use tensor cores for every type.  If no other plan is left, ONNX Runtime logs
        "No execution plans support the graph" and retries with them; otherwise it keeps a plan without tensor cores
        (``core/providers/cuda/nn/conv.cc``, ``CreateCudnnFeExecutionPlan``).  TensorFloat-32 has float16's ten bits of
        mantissa and float32's exponent, so the nodes that such a graph keeps in float32 for their range are rounded no
        more coarsely than the nodes around them.
    ``cudnn_conv_algo_search``
        cuDNN's heuristic mode A.  The default, EXHAUSTIVE, is mode B since cuDNN 9; DEFAULT is the slow fallback mode.
    ``prefer_nhwc``
        Left at its default, off.  It would avoid cuDNN's transposes within a convolution, but add transposes around
        every node without an NHWC kernel, here the reshapes on both sides of each group norm.  ONNX Runtime keeps the
        default until more models have been measured (microsoft/onnxruntime#22648).

    The effect of these options on half-precision speed has not been measured.

    Args:
        names: names of the providers.
        half: whether the graph has float16 weights.
    """
    options = {"use_tf32": str(int(half)), "cudnn_conv_algo_search": "HEURISTIC"}
    return [(name, dict(options)) if name == "CUDAExecutionProvider" else name for name in names]


@cache
def _preload() -> None:
    """Load the CUDA and cuDNN libraries of PyPI packages, which are not on the loader's search path."""
    import onnxruntime as ort

    if hasattr(ort, "preload_dlls"):
        with contextlib.suppress(Exception):  # a missing library is reported when the session lacks its provider
            ort.preload_dlls()


@cache
def _silence() -> None:
    """Stop ONNX Runtime's default logger from writing to standard error, for the whole process.

    The CUDA provider logs every plan that it tries for a convolution without success as a red error, although the
    result is correct.  Real failures are raised by ``run`` with the same text.  Call this only after a session has its
    provider: the reason why a provider cannot be loaded appears in this log alone.
    """
    import onnxruntime as ort

    ort.set_default_logger_severity(4)  # fatal


class OnnxRuntime(Backend):
    """Runs the bundle's graphs, in which operators without a kernel in the CPU provider have been rewritten.

    Operators without a kernel in the CUDA provider are rewritten in memory when a session is created (``for_cuda.py``).

    The CPU provider has no bfloat16 kernels, so that recipe is not offered.
    """

    name = "onnxruntime"
    label = ""
    elements = frozenset({"float32", "float16", "int8", "float8_e4m3fn"})
    profiles = ()
    open_tokens = True
    needs = NEEDS
    side_by_side = True
    beside_int8 = "fp32"  # the CPU provider has no float16 kernels and would cast around every node

    def versions(self) -> dict[str, str]:
        return {}  # every permitted version of ONNX Runtime supports the graphs' opset

    def resolve_target(self, target: str | None, precision: str, options: CompileOptions) -> str:
        if target not in (None, "any"):
            raise InputError(f"target is '{target}'; an onnxruntime bundle runs on any machine; leave --target out")
        for name in ("refittable", "version_compatible", "hardware_compatible"):
            if getattr(options, name):
                raise InputError(f"--{name.replace('_', '-')} is for TensorRT; leave it out for an onnxruntime bundle")
        return "any"

    def prepare(self, graph: Path) -> dict[str, tuple[str, list[dict[str, Any]]]]:
        from ...graph.lower import for_onnxruntime_cpu

        return for_onnxruntime_cpu(graph).derived

    def compile(self, job: CompileJob, progress: Progress) -> Compiled:
        progress(job.network, 1, 1)
        return Compiled(job.graph.name, 0.0)

    def replace_weights(self, job: CompileJob, engine: Path, progress: Progress) -> Compiled:
        progress(job.network, 1, 1)
        return Compiled(job.graph.name, 0.0, None, {"weights": "external weights"})  # the session reads the data file

    def check_files(self, manifest: Manifest) -> None:
        for name, network in manifest.networks.items():
            if not (network.file == network.graph and network.graph.endswith(".onnx")):
                raise BundleCorrupt(
                    f"engine '{manifest.name}': networks.{name}.file is '{network.file}'; it must be the graph itself, "
                    f"an .onnx file, for backend {self.name}; build the bundle again"
                )

    def layers(self, graph: Path, facts: Mapping[str, int] | None) -> tuple[dict[str, int], str | None]:
        if (nodes := _nodes(graph)) is None:
            return dict(facts or {}), "counting layers needs the package onnx, which is not installed"
        note = "layers are the graph's nodes, before ONNX Runtime fuses any; it reports no reformats"
        return dict(facts or {}) | {"layers": nodes}, note

    def remark(self, precision: str) -> str | None:
        if "float8_e4m3fn" in RECIPES[precision].elements:
            return "ONNX Runtime computes FP8 in fp32 after rounding; use it to compare images and sizes"
        if "int8" not in RECIPES[precision].elements:
            return None
        # measured in benchmarks/results/emoji-precision.json
        return "on a CPU, ONNX Runtime is slower with INT8 than with fp32; use it to compare images and sizes"

    def check(self, manifest: Manifest) -> None:
        pass

    def cannot_run(self, target: str, options: CompileOptions | None = None) -> str | None:
        return None

    def load(self, path: Path, network: NetworkRecord, options: LoadOptions) -> Network:
        return OrtNetwork(path, options.provider, options.threads, network.profiles, has_open_tokens(network))


def _nodes(graph: Path) -> int | None:
    """Count the nodes of an ONNX graph, including its subgraphs; None without the package onnx."""
    try:
        import onnx
    except ImportError:
        return None

    def count(part: Any) -> int:
        inner = (a.g for node in part.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
        return len(part.node) + sum(count(g) for g in inner)

    return count(onnx.load(graph, load_external_data=False).graph)


class OrtNetwork(PerShapeNetwork):
    """One ONNX graph, run by one session per image size; with CUDA, per batch size and image size.

    On the CPU a session takes any batch size and any number of tokens.  Measured on the bundled U-Net, a call takes the
    same time as with a fixed batch size, and each batch size adds 3 MiB instead of 53
    (``benchmarks/serving_sessions.py``).  With CUDA, a fixed batch size lets ONNX Runtime constant-fold shape
    computations, which would otherwise run on the CPU.  A session is created on the first use of a shape, and those
    used last are kept.

    Args:
        profiles: the legal sizes in latents; if empty, any size that the graph takes.  Their batch sizes are ignored.
        open_tokens: whether the graph leaves the number of tokens of the text states open.
    """

    #: sessions to keep; each holds the network's weights, and with CUDA each batch size has a separate session
    KEEP = 4
    #: up to ``KEEP_SMALL`` sessions are kept while their weights together take less than ``SMALL`` bytes, because
    #: creating a session costs more than running a small network
    KEEP_SMALL, SMALL = 16, 256 << 20

    def __init__(
        self,
        path: Path,
        provider: str = "auto",
        threads: int | None = None,
        profiles: tuple[Profile, ...] = (),
        open_tokens: bool = False,
    ) -> None:
        max_loaded = max(self.KEEP, min(self.KEEP_SMALL, self.SMALL // max(1, _weight_bytes(path))))
        super().__init__(path, profiles, max_loaded, max_idle=self.KEEP, open_tokens=open_tokens)
        self._providers = providers(provider)
        self._requested_provider = provider
        self._warned = False
        self._threads = threads or usable_cores()

    @property
    def _on_cuda(self) -> bool:
        return self._providers[0] == "CUDAExecutionProvider"

    def _key(self, batch: int | None, size: Size | None, tokens: int | None) -> Shape:
        return batch if self._on_cuda else None, size, None

    def batches(self, most: int) -> tuple[int, ...]:
        return super().batches(most) if self._on_cuda else tuple(range(1, most + 1))

    def _load(self, batch: int | None, size: Size | None, tokens: int | None) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 4  # fatal only: exceptions carry the messages
        if batch is not None:
            options.add_free_dimension_override_by_name("batch", batch)
        # keep inputs signed: the unsigned kernels of AVX2 saturate, and a fusion in 1.31 mixes signed and unsigned
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        if _FLOAT8 in self.path.read_bytes():
            # ONNX Runtime 1.31 fuses a product of E4M3 values into MatMulIntegerToFloat, which rejects the type
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        for name, value in zip(("height", "width"), size or (), strict=False):
            options.add_free_dimension_override_by_name(name, value)
        cuda = self._on_cuda
        if cuda:
            _preload()
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            model: str | bytes = str(self.path)
            half = False
            if not cuda and not self._fits_packed():
                options.add_session_config_entry("session.disable_prepacking", "1")
            if cuda:
                graph = for_cuda(self.path.read_bytes())
                model, half = graph.data, graph.half
                # a model given as bytes needs the folder of its external weights, which are memory-mapped all the same
                options.add_session_config_entry(
                    "session.model_external_initializers_file_folder_path", str(self.path.parent)
                )
            session = ort.InferenceSession(model, options, providers=with_options(self._providers, half))
        except Exception as e:  # ONNX Runtime has its own exception types
            raise PnpError(f"ONNX Runtime cannot load {self.path}: {printable(e, limit=500)}") from e
        if cuda and not self._has_cuda(session):
            return self._load(batch, size, tokens)
        return session

    def _fits_packed(self) -> bool:
        """Whether the weights and the copies that ONNX Runtime packs for its kernels fit into free memory.

        On the CPU, half-precision weights are also widened: SDXL's U-Net takes 23 GiB with packed copies.
        """
        data = self.path.with_name(f"{self.path.name}.data")
        size = data.stat().st_size if data.is_file() else 0
        if size < _LARGE:
            return True
        wide = 2 * size if for_cuda(self.path.read_bytes()).half else 0
        return size + wide + (wide or size) < 0.9 * memory.free()

    def _buffers(self, loaded: Any, batch: int, tokens: int | None) -> OrtBound:
        return OrtBound(loaded, batch, tokens)

    def _dropped(self) -> None:
        release_memory()

    def _has_cuda(self, session: Any) -> bool:
        """Whether a session runs on CUDA; warn if it does not, or if it leaves nodes to the CPU.

        Raises:
            InputError: if ``cuda`` was requested and ONNX Runtime could not load its CUDA provider.
        """
        if session.get_providers()[0] != "CUDAExecutionProvider":
            reason = (
                "ONNX Runtime could not load its CUDA provider, most likely because CUDA or cuDNN is not installed; "
                "install with: pip install 'onnxruntime-gpu[cuda,cudnn]'"
            )
            if self._requested_provider == "cuda":
                raise InputError(f"provider 'cuda' was requested, but {reason}; or use --provider cpu")
            self._providers = ["CPUExecutionProvider"]
            warnings.warn(f"{reason}; {self.path.name} runs on the CPU", stacklevel=4)
            return False
        _silence()
        if not self._warned and (on_cpu := _nodes_on_cpu(session)):
            self._warned = True
            kinds = ", ".join(f"{count} {kind}" for kind, count in on_cpu.most_common(4))
            warnings.warn(
                f"{on_cpu.total()} nodes of {self.path.name} run on the CPU because ONNX Runtime has no CUDA kernel "
                f"for them ({kinds}), with copies in both directions in every call; engines of backend tensorrt or "
                "torch avoid this",
                stacklevel=4,
            )
        return True

    def describe(self) -> Description:
        session = self.loaded(1)

        def tensors(nodes: Any) -> dict[str, tuple[str, tuple[int | str, ...]]]:
            return {n.name: (DTYPES.get(n.type, n.type), ("batch", *n.shape[1:])) for n in nodes}

        device = session.get_providers()[0]
        return Description(tensors(session.get_inputs()), tensors(session.get_outputs()), device, self.profiles)


def _nodes_on_cpu(session: Any) -> Counter[str]:
    """Count the operators that a session runs on the CPU, except shape computations; empty if that is unknown."""
    assignment = getattr(session, "get_provider_graph_assignment_info", None)  # since 1.25
    counts: Counter[str] = Counter()
    for part in [] if assignment is None else assignment():
        if part.ep_name == "CPUExecutionProvider":
            counts.update(node.op_type for node in part.get_nodes() if node.op_type not in _SHAPES)
    return counts


def _weight_bytes(path: Path) -> int:
    """Return the bytes of a graph and of the weights beside it."""
    files = (path, path.with_name(path.name + ".data"))
    return sum(file.stat().st_size for file in files if file.is_file())


def release_memory() -> None:
    """Return the C library's free memory to the system.

    glibc retains the memory of closed sessions in per-thread heaps, so a process that creates and drops sessions would
    grow without bound.  With other C libraries this does nothing.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class OrtBound(Bound):
    """ONNX Runtime's IO binding over tensors at fixed addresses.

    With the CPU provider they are numpy arrays, which the caller may write and read in place; with the CUDA provider
    they are on the GPU.
    """

    def __init__(self, session: Any, batch: int, tokens: int | None = None) -> None:
        import onnxruntime as ort

        self.session = session
        device = "cuda" if session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
        self._binding = session.io_binding()
        self._inputs: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._host: dict[str, np.ndarray] = {}
        for node in session.get_inputs():
            full = [batch, *(tokens if d == TOKENS and tokens else d for d in node.shape[1:])]
            if unknown := [d for d in full if not isinstance(d, int)]:
                raise InputError(f"{node.name} has an open {' and '.join(unknown)}; bind it with {_what(unknown)}")
            if device == "cpu":
                self._host[node.name] = np.zeros(full, _dtype(node.type))
                value = ort.OrtValue.ortvalue_from_numpy(self._host[node.name])
            else:
                value = ort.OrtValue.ortvalue_from_shape_and_type(full, _dtype(node.type), device, 0)
            self._binding.bind_ortvalue_input(node.name, value)
            self._inputs[node.name], self._shapes[node.name] = value, tuple(full)
        first, *self._others = session.get_outputs()
        shape = [batch, *first.shape[1:]]
        self._host_output: np.ndarray | None = None
        if all(isinstance(d, int) for d in shape) and device == "cpu":
            self._host_output = np.zeros(shape, _dtype(first.type))
            self._output = ort.OrtValue.ortvalue_from_numpy(self._host_output)
            self._binding.bind_ortvalue_output(first.name, self._output)
        elif all(isinstance(d, int) for d in shape):
            self._output = ort.OrtValue.ortvalue_from_shape_and_type(shape, _dtype(first.type), device, 0)
            self._binding.bind_ortvalue_output(first.name, self._output)
        else:  # the size is known only after a run
            self._output = None
            self._binding.bind_output(first.name, device)
        for other in self._others:
            self._binding.bind_output(other.name, device)

    def write(self, **inputs: np.ndarray) -> None:
        for name, array in inputs.items():
            check_input(name, array, self._shapes)
            if name in self._host:
                np.copyto(self._host[name], array)
            else:
                self._inputs[name].update_inplace(np.ascontiguousarray(array))

    def run(self) -> None:
        try:
            self.session.run_with_iobinding(self._binding)
        except Exception as e:  # ONNX Runtime has its own exception types
            raise PnpError(f"ONNX Runtime cannot run a network: {printable(e, limit=500)}") from e

    def host_input(self, name: str) -> np.ndarray | None:
        return self._host.get(name)

    def output(self) -> np.ndarray:
        return self.read() if self._host_output is None else self._host_output

    def read(self) -> np.ndarray:
        if self._host_output is not None:
            return self._host_output.copy()
        value = self._output if self._output is not None else self._binding.get_outputs()[0]
        return np.array(value.numpy())  # a copy, because the next run overwrites the buffer

    def read_all(self) -> tuple[np.ndarray, ...]:
        return (self.read(), *(np.array(value.numpy()) for value in self._binding.get_outputs()[1:]))


def _what(unknown: list[str]) -> str:
    """Return what determines the open dimensions, in words."""
    sized = "the latents' size" if any(d != TOKENS for d in unknown) else ""
    return " and ".join(part for part in (sized, "the tokens" if TOKENS in unknown else "") if part)


def _dtype(name: str) -> Any:
    if name not in DTYPES:
        raise PnpError(f"a graph's boundary has type {name}; known: {', '.join(DTYPES)}")
    return np.dtype(DTYPES[name]).type
