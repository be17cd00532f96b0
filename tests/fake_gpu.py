"""A fake GPU in host memory: the CUDA runtime and driver calls that pnp_trt makes, and engines that are functions.

The fakes define only names that exist in the real bindings.  Work on a stream runs immediately, unless the stream is
being captured: then it is recorded and replayed later.  The sampler's kernels are ``kernels.cu`` itself, compiled with
the host's g++; their threads run one after another.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pnp_trt.backends import cuda_graph
from pnp_trt.backends.base import Profile
from pnp_trt.backends.cuda import Cuda
from pnp_trt.backends.per_shape import has_open_tokens
from pnp_trt.backends.tensorrt.flavour import Flavour
from pnp_trt.backends.tensorrt.network import TrtNetwork
from pnp_trt.bundle.manifest import CompileRecord, NetworkRecord
from pnp_trt.bundle.profiles import by_chunks

trt = pytest.importorskip("tensorrt_rtx")
real = pytest.importorskip("cuda.bindings.runtime")
driver = pytest.importorskip("cuda.bindings.driver")

OK = real.cudaError_t.cudaSuccess
SOURCE = Path(cuda_graph.__file__).with_name("kernels.cu")
_HOST = """
#include <cmath>
struct Dim { unsigned x; };
static Dim blockIdx, blockDim, threadIdx;
#define __global__
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
extern "C" void place(unsigned block, unsigned size, unsigned thread) {
  blockIdx.x = block; blockDim.x = size; threadIdx.x = thread;
}
"""


def host_kernels(folder: Path) -> ctypes.CDLL:
    """Compile ``kernels.cu`` for the host."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++, which runs the kernels' source on the host")
    (folder / "k.cpp").write_text(_HOST + SOURCE.read_text())
    words = [compiler, "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w", str(folder / "k.cpp")]
    subprocess.run([*words, "-o", str(folder / "k.so")], check=True)
    return ctypes.CDLL(str(folder / "k.so"))


class Runtime:
    """Fake ``cuda.bindings.runtime``; ``log`` lists the queued work, waits, captures, launches and releases."""

    cudaError_t = real.cudaError_t
    cudaMemcpyKind = real.cudaMemcpyKind
    cudaStreamCaptureMode = real.cudaStreamCaptureMode
    cudaStreamNonBlocking = real.cudaStreamNonBlocking

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.log: list[str] = []
        self.capturing: dict[int, list[Callable[[], None]]] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.streams = 100

    def put(self, stream: int, name: str, work: Callable[[], None]) -> None:
        self.log.append(name)
        if stream in self.capturing:
            self.capturing[stream].append(work)
        else:
            work()

    def cudaSetDevice(self, number: int) -> tuple[Any, ...]:
        return (OK,)

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return OK, 1

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        used = sum(ctypes.sizeof(raw) for raw in self.memory.values())
        return OK, 2**30 - used, 2**30

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        self.streams += 1
        return OK, self.streams

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        self.log.append("wait")
        if stream in self.capturing:
            return (real.cudaError_t.cudaErrorStreamCaptureUnsupported,)
        return (OK,)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if self.capturing:
            return real.cudaError_t.cudaErrorStreamCaptureUnsupported, None
        raw = ctypes.create_string_buffer(b"\xff" * size, size)  # not a number, as uninitialised GPU memory may be
        self.memory[ctypes.addressof(raw)] = raw
        return OK, ctypes.addressof(raw)

    cudaMallocHost = cudaMalloc

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        self.log.append("free")
        del self.memory[address]
        return (OK,)

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: Any, stream: int) -> tuple[Any, ...]:
        self.put(stream, kind.name.removeprefix("cudaMemcpy"), lambda: void(ctypes.memmove(to, source, size)))
        return (OK,)

    def cudaMemsetAsync(self, to: int, value: int, size: int, stream: int) -> tuple[Any, ...]:
        self.put(stream, "fill", lambda: void(ctypes.memset(to, value, size)))
        return (OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any, ...]:
        assert mode == real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal and not self.capturing
        self.log.append("begin capture")
        self.capturing[stream] = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        self.log.append("end capture")
        work = self.capturing.pop(stream)
        self.graphs[id(work)] = work
        return OK, id(work)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        self.graphs[-graph] = self.graphs[graph]
        return OK, -graph

    def cudaGraphUpload(self, graph: int, stream: int) -> tuple[Any, ...]:
        return (OK,)

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        del self.graphs[graph]
        return (OK,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Any, ...]:
        self.log.append("drop")
        del self.graphs[graph]
        return (OK,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any, ...]:
        self.log.append("replay")
        for work in self.graphs[graph]:
            work()
        return (OK,)


assert [n for n in vars(Runtime) if n.startswith("cuda") and not hasattr(real, n)] == []


class Gpu(Cuda):
    """The real ``Cuda`` class on the fake runtime and driver.

    Attributes:
        backwards: run a kernel's threads in reverse order.
    """

    def __init__(self, folder: Path) -> None:
        self.backwards = False
        self._rt = self.runtime = Runtime()
        self._lib = host_kernels(folder)

    def _driver(self, name: str, *arguments: Any) -> Any:
        assert hasattr(driver, name)
        if name == "cuModuleLoadData":
            assert arguments[0].startswith(b"//") and arguments[0].endswith(b"\0")
            return 1
        if name == "cuModuleGetFunction":
            assert f".entry {arguments[1].decode()}(".encode() in cuda_graph.ptx()
            return getattr(self._lib, arguments[1].decode())
        assert name == "cuLaunchKernel"
        kernel, blocks, _, _, size, _, _, _, stream, (values, types), _ = arguments
        kernel.argtypes, kernel.restype = types, None

        def work() -> None:
            for at in reversed(range(blocks * size)) if self.backwards else range(blocks * size):
                self._lib.place(at // size, size, at % size)
                kernel(*values)

        self.runtime.put(stream, kernel.__name__, work)
        return None


class Context:
    """Fake execution context of an engine that is a function of arrays; its methods must exist in the real one."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._at: dict[str, int] = {}
        self._profile: Profile | None = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._profile = self._engine.entry.profiles[index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Like TensorRT, refuse shapes outside the selected profile."""
        assert self._profile is not None
        for size, axis in zip(shape, self._engine.entry.inputs[name][1], strict=True):
            least, _, most = self._profile.extent(axis) if isinstance(axis, str) else (axis, axis, axis)
            if not least <= size <= most:
                return False
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._at[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        raise AssertionError("no shape is open here")

    def is_stream_capturable(self, stream: int) -> bool:
        return self._engine.capturable

    def execute_async_v3(self, stream: int) -> bool:
        if self._engine.fails(stream):
            return False

        def work() -> None:
            entry = self._engine.entry
            inputs = {n: view(self._at[n], self._shapes[n], d) for n, (d, _) in entry.inputs.items()}
            output = np.ascontiguousarray(self._engine.function(**inputs))
            ctypes.memmove(self._at[next(iter(entry.outputs))], output.ctypes.data, output.nbytes)

        self._engine.gpu.runtime.put(stream, self._engine.name, work)
        return True


assert [n for n in vars(Context) if not n.startswith("_") and not hasattr(trt.IExecutionContext, n)] == []


class Engine:
    """Fake ``ICudaEngine`` described by a manifest's entry."""

    def __init__(self, gpu: Gpu, name: str, entry: NetworkRecord, function: Callable[..., np.ndarray]) -> None:
        self.gpu, self.name, self.entry, self.function = gpu, name, entry, function
        self.capturable = True
        self.fails: Callable[[int], bool] = lambda stream: False
        self.num_optimization_profiles = len(entry.profiles)
        self._tensors = {**entry.inputs, **entry.outputs}
        self.num_io_tensors = len(self._tensors)

    def get_tensor_name(self, i: int) -> str:
        return list(self._tensors)[i]

    def get_tensor_mode(self, name: str) -> Any:
        return trt.TensorIOMode.INPUT if name in self.entry.inputs else trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return {"float32": trt.float32, "int64": trt.int64}[self._tensors[name][0]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(size, str) else size for size in self._tensors[name][1])

    def create_execution_context(self, strategy: Any) -> Context:
        """``strategy``, how memory is allocated, is ignored."""
        return Context(self)


class _Plain(Flavour):
    """``tensorrt`` with the installed bindings."""

    @property
    def rtx(self) -> bool:
        return False


def network(gpu: Gpu, name: str, entry: NetworkRecord, function: Callable[..., np.ndarray]) -> Any:
    """A real ``TrtNetwork`` on a fake engine, which is its attribute ``engine``."""

    class Faked(TrtNetwork):
        def _deserialize(self, host_code: bool) -> Engine:
            return Engine(gpu, name, record, function)

        @property
        def engine(self) -> Engine:
            return self._engine

        def _kernels_file(self, batch: int, size: tuple[int, int] | None, tokens: int | None) -> Path:
            return Path("/nowhere")

    profiles: tuple[Profile, ...] = (Profile("b1-8", 1, 1, 8),)
    if has_open_tokens(entry):
        profiles = by_chunks(profiles, 77, 2)
    record = replace(entry, profiles=profiles, compiled=CompileRecord())
    return Faked(
        _Plain("tensorrt", "tensorrt_rtx", (), "rtx"),
        Path(f"{name}.engine"),
        record,
        gpu,
    )


def view(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Copy memory into an array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_byte * size).from_address(address), dtype).reshape(shape).copy()


def void(_: object) -> None:
    """Discard a value, so that a lambda returns None."""
