"""The CUDA calls needed to run and capture engines, through ``cuda-python``, with errors as sentences."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import InputError, MissingDependency, PnpError

#: threads per block; the kernels use one thread per element
_BLOCK = 256


class Cuda:
    """CUDA on device 0; addresses, streams, kernels and graphs are plain CUDA numbers and handles.

    Raises:
        InputError: if cuda-python, a driver or a GPU is missing.
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
                f"running a TensorRT engine needs an NVIDIA GPU, but CUDA found none ({error.name}); use an engine of "
                "backend onnxruntime here, see pnp-trt doctor"
            )
        self.call("cudaSetDevice", 0)
        self.call("cudaFree", 0)  # creates the context

    def call(self, name: str, *arguments: Any) -> Any:
        """Call the runtime and return the result, if there is one.

        Raises:
            PnpError: if the call fails; the message has CUDA's name of the error.
        """
        error, *results = getattr(self._rt, name)(*arguments)
        if error != self._rt.cudaError_t.cudaSuccess:
            raise PnpError(f"CUDA's {name} failed: {error.name}; see pnp-trt doctor")
        return results[0] if results else None

    def stream(self) -> int:
        """Create a stream that does not synchronise with the default stream."""
        return int(self.call("cudaStreamCreateWithFlags", self._rt.cudaStreamNonBlocking))

    def synchronize(self, stream: int) -> None:
        """Wait for all work on ``stream``."""
        self.call("cudaStreamSynchronize", stream)

    def allocate(self, size: int) -> int:
        """Allocate device memory: at least one byte, so that the address is valid."""
        return int(self.call("cudaMalloc", max(size, 1)))

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, int]:
        """Allocate pinned host memory; return it as an array, and its address."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = int(self.call("cudaMallocHost", max(size, 1)))
        raw = (ctypes.c_byte * size).from_address(address)
        return np.frombuffer(raw, dtype=dtype).reshape(shape), address

    def to_device(self, device: int, host: int, size: int, stream: int) -> None:
        """Copy ``size`` bytes to the device, asynchronously on ``stream``."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", device, host, size, kind, stream)

    def to_host(self, host: int, device: int, size: int, stream: int) -> None:
        """Copy ``size`` bytes to the host, asynchronously on ``stream``."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", host, device, size, kind, stream)

    def free(self, devices: list[int], hosts: list[int], stream: int) -> None:
        """Free memory from ``allocate`` and ``pinned``, and a stream from ``stream``."""
        for address in devices:
            self.free_device(address)
        for address in hosts:
            self.free_host(address)
        self.call("cudaStreamDestroy", stream)

    def free_device(self, address: int) -> None:
        """Free memory from ``allocate``."""
        self.call("cudaFree", address)

    def free_host(self, address: int) -> None:
        """Free memory from ``pinned``."""
        self.call("cudaFreeHost", address)

    def attach(self) -> None:
        """Make the GPU current in this thread, as kernel launches require."""
        self.call("cudaSetDevice", 0)

    def fill(self, device: int, size: int, stream: int) -> None:
        """Set ``size`` bytes to zero, asynchronously on ``stream``."""
        self.call("cudaMemsetAsync", device, 0, size, stream)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Copy ``size`` bytes on the device, asynchronously on ``stream``."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call("cudaMemcpyAsync", to, source, size, kind, stream)

    def kernels(self, ptx: bytes, names: Sequence[str]) -> dict[str, Any]:
        """Compile PTX with the driver and return its functions by name; they stay loaded until the process ends."""
        module = self._driver("cuModuleLoadData", ptx + b"\0")
        return {name: self._driver("cuModuleGetFunction", module, name.encode()) for name in names}

    def launch(self, kernel: Any, count: int, stream: int, *arguments: tuple[int, Any]) -> None:
        """Launch a kernel on ``stream`` with ``count`` threads, rounded up to whole blocks.

        Args:
            arguments: (value, ctypes type) of each kernel argument.
        """
        values, types = zip(*arguments, strict=True)
        blocks = -(-count // _BLOCK)
        self._driver("cuLaunchKernel", kernel, blocks, 1, 1, _BLOCK, 1, 1, 0, stream, (values, types), 0)

    def capture(self, stream: int, work: Callable[[], None]) -> Any:
        """Capture what ``work`` enqueues on ``stream`` into a graph, without running it; other threads may continue.

        The graph stores addresses but keeps no memory alive: its owner must keep the buffers.
        """
        self.call("cudaStreamBeginCapture", stream, self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            work()
        except BaseException:
            # with the capture left open, all later work on the stream would fail
            error, graph = self._rt.cudaStreamEndCapture(stream)
            if error == self._rt.cudaError_t.cudaSuccess:
                self._rt.cudaGraphDestroy(graph)
            raise
        graph = self.call("cudaStreamEndCapture", stream)
        try:
            executable = self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self._rt.cudaGraphDestroy(graph)
        self.call("cudaGraphUpload", executable, stream)
        return executable

    def replay(self, graph: Any, stream: int) -> None:
        """Launch a captured graph on ``stream``."""
        self.call("cudaGraphLaunch", graph, stream)

    def drop(self, graph: Any) -> None:
        """Destroy a captured graph, which must not be running."""
        self.call("cudaGraphExecDestroy", graph)

    def free_memory(self) -> int:
        """Return the free GPU memory in bytes (``cudaMemGetInfo``)."""
        error, free, _ = self._rt.cudaMemGetInfo()
        if error != self._rt.cudaError_t.cudaSuccess:
            raise PnpError(f"CUDA's cudaMemGetInfo failed: {error.name}; see pnp-trt doctor")
        return int(free)

    def _driver(self, name: str, *arguments: Any) -> Any:
        """Call the driver and return the result, if there is one."""
        from cuda.bindings import driver

        error, *results = getattr(driver, name)(*arguments)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise PnpError(f"CUDA's {name} failed: {error.name}; see pnp-trt doctor")
        return results[0] if results else None
