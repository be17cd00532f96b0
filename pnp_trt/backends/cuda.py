"""The few CUDA calls that running and capturing engines takes, through ``cuda-python``, with errors as sentences."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import InputError, MissingDependency, PnpError

#: threads of a block; the kernels have one thread an element
_BLOCK = 256


class Cuda:
    """CUDA on device 0; addresses, streams, kernels and graphs are its own numbers and handles.

    Raises:
        InputError: where cuda-python, a driver or a GPU is missing.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except (ImportError, OSError) as e:
            raise MissingDependency(
                f"running a TensorRT engine needs cuda-python ({e}); install with: pip install 'pnp-trt[rtx]'"
            ) from None
        self._rt: Any = runtime
        error, count = runtime.cudaGetDeviceCount()
        if error != runtime.cudaError_t.cudaSuccess or not count:
            raise InputError(
                f"running a TensorRT engine needs an NVIDIA GPU, and CUDA finds none ({error.name}); use an engine of "
                "backend onnxruntime here, see pnp-trt doctor"
            )
        self.call("cudaSetDevice", 0)
        self.call("cudaFree", 0)  # makes the context

    def call(self, name: str, *arguments: Any) -> Any:
        """One runtime call; its result, if it has one.

        Raises:
            PnpError: with CUDA's own word.
        """
        error, *results = getattr(self._rt, name)(*arguments)
        if error != self._rt.cudaError_t.cudaSuccess:
            raise PnpError(f"CUDA's {name} failed: {error.name}; see pnp-trt doctor")
        return results[0] if results else None

    def stream(self) -> int:
        """A new stream that does not wait for the default one."""
        return int(self.call("cudaStreamCreateWithFlags", self._rt.cudaStreamNonBlocking))

    def synchronize(self, stream: int) -> None:
        """Wait for all that was put on ``stream``."""
        self.call("cudaStreamSynchronize", stream)

    def allocate(self, size: int) -> int:
        """Device memory; at least one byte, so that the address is one."""
        return int(self.call("cudaMalloc", max(size, 1)))

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, int]:
        """Host memory that copies without a detour, as an array; and its address."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = int(self.call("cudaMallocHost", max(size, 1)))
        raw = (ctypes.c_byte * size).from_address(address)
        return np.frombuffer(raw, dtype=dtype).reshape(shape), address

    def to_device(self, device: int, host: int, size: int, stream: int) -> None:
        """Copy ``size`` bytes in ``stream``'s order."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", device, host, size, kind, stream)

    def to_host(self, host: int, device: int, size: int, stream: int) -> None:
        """Copy ``size`` bytes in ``stream``'s order."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", host, device, size, kind, stream)

    def free(self, devices: list[int], hosts: list[int], stream: int) -> None:
        """Give back what ``allocate``, ``pinned`` and ``stream`` gave."""
        for address in devices:
            self.free_device(address)
        for address in hosts:
            self.free_host(address)
        self.call("cudaStreamDestroy", stream)

    def free_device(self, address: int) -> None:
        """Give back what ``allocate`` gave."""
        self.call("cudaFree", address)

    def free_host(self, address: int) -> None:
        """Give back what ``pinned`` gave."""
        self.call("cudaFreeHost", address)

    def attach(self) -> None:
        """Make the GPU current in this thread, which launching kernels asks for."""
        self.call("cudaSetDevice", 0)

    def fill(self, device: int, size: int, stream: int) -> None:
        """Set ``size`` bytes to zero in ``stream``'s order."""
        self.call("cudaMemsetAsync", device, 0, size, stream)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Copy ``size`` bytes on the device in ``stream``'s order."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call("cudaMemcpyAsync", to, source, size, kind, stream)

    def kernels(self, ptx: bytes, names: Sequence[str]) -> dict[str, Any]:
        """Functions of PTX text by name, compiled by the driver; they stay loaded until the process ends."""
        module = self._driver("cuModuleLoadData", ptx + b"\0")
        return {name: self._driver("cuModuleGetFunction", module, name.encode()) for name in names}

    def launch(self, kernel: Any, count: int, stream: int, *arguments: tuple[int, Any]) -> None:
        """Run a kernel on ``count`` threads or a few more, in ``stream``'s order.

        Args:
            arguments: value and ctypes type of each.
        """
        values, types = zip(*arguments, strict=True)
        blocks = -(-count // _BLOCK)
        self._driver("cuLaunchKernel", kernel, blocks, 1, 1, _BLOCK, 1, 1, 0, stream, (values, types), 0)

    def capture(self, stream: int, work: Callable[[], None]) -> Any:
        """A graph of what ``work`` puts on ``stream``, none of which is run; other threads may continue meanwhile.

        The graph keeps addresses and nothing alive: whoever holds it holds the buffers too.
        """
        self.call("cudaStreamBeginCapture", stream, self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            work()
        except BaseException:
            # a capture that stays open would fail all that comes after it on the stream
            error, graph = self._rt.cudaStreamEndCapture(stream)
            if error == self._rt.cudaError_t.cudaSuccess:
                self._rt.cudaGraphDestroy(graph)
            raise
        graph = self.call("cudaStreamEndCapture", stream)
        try:
            made = self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self._rt.cudaGraphDestroy(graph)
        self.call("cudaGraphUpload", made, stream)
        return made

    def replay(self, graph: Any, stream: int) -> None:
        """Run a captured graph in ``stream``'s order."""
        self.call("cudaGraphLaunch", graph, stream)

    def drop(self, graph: Any) -> None:
        """Give a captured graph back; it must not be running."""
        self.call("cudaGraphExecDestroy", graph)

    def free_memory(self) -> int:
        """Bytes of the GPU that nobody holds; ``cudaMemGetInfo``."""
        error, free, _ = self._rt.cudaMemGetInfo()
        if error != self._rt.cudaError_t.cudaSuccess:
            raise PnpError(f"CUDA's cudaMemGetInfo failed: {error.name}; see pnp-trt doctor")
        return int(free)

    def _driver(self, name: str, *arguments: Any) -> Any:
        """One call of the driver; its result, if it has one."""
        from cuda.bindings import driver

        error, *results = getattr(driver, name)(*arguments)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise PnpError(f"CUDA's {name} failed: {error.name}; see pnp-trt doctor")
        return results[0] if results else None
