"""The few CUDA runtime calls that running an engine takes, through ``cuda-python``, with errors as sentences."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InputError, PnpError


class Cuda:
    """CUDA's runtime on device 0.

    Raises:
        InputError: where cuda-python, a driver or a GPU is missing.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except (ImportError, OSError) as e:
            raise InputError(
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
        import ctypes

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
            self.call("cudaFree", address)
        for address in hosts:
            self.call("cudaFreeHost", address)
        self.call("cudaStreamDestroy", stream)
