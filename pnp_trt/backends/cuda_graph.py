"""TensorRT engines and the sampler's own kernels on one stream, which :class:`DeviceLoops` runs and captures.

Only latents, text states, w and the schedule's table are copied to the GPU.  Only pixels (or latents) and flags for
each image are copied back, by copies into pinned memory that are part of a graph.  The kernels read the current row of
the table from memory, so the schedule, w, prompts and noise can change without a new capture.  Sources: CUDA's
programming guide on stream capture; TensorRT's on ``enqueueV3`` and CUDA graphs (enqueue once before the capture;
addresses and shapes are captured).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import PnpError
from ..sampling.device_loop import DeviceLoops, Feeds, Lane, LoopOutput, Shape
from ..sampling.table import COLUMNS, Schedule
from .base import Size
from .cuda import Cuda

KERNELS = ("show", "update", "check", "to_bytes")
_P, _I = ctypes.c_void_p, ctypes.c_int


class DeviceBound(Protocol):
    """A network's buffers on the GPU, such as ``backends.tensorrt.network.TrtBound``."""

    stream: int
    addresses: dict[str, int]
    output_name: str

    def write(self, **inputs: np.ndarray) -> None: ...
    def enqueue(self, stream: int) -> None: ...
    def capturable(self, stream: int) -> bool: ...
    def staged(self, name: str) -> np.ndarray: ...
    def keep_kernels(self) -> None: ...


class DeviceNetwork(Protocol):
    """A loaded engine, such as ``backends.tensorrt.network.TrtNetwork``."""

    path: Path

    def bind(self, batch: int, size: Size | None = None) -> contextlib.AbstractContextManager[Any]: ...
    def bind_tokens(
        self, batch: int, size: Size | None, tokens: int | None
    ) -> contextlib.AbstractContextManager[Any]: ...


@cache
def ptx() -> bytes:
    """Return the compiled kernels of ``kernels.cu``."""
    return Path(__file__).with_name("kernels.ptx").read_bytes()


def device_loops(
    cuda: Cuda, unet: DeviceNetwork, vae: DeviceNetwork, condition: DeviceNetwork | None, name: str
) -> DeviceLoops:
    """Return loops over engines that are loaded on one GPU.

    Args:
        condition: the part of the guide that depends only on w, if it is a separate network.
        name: name of the bundle.
    """
    loaded: dict[str, Any] = {}

    def open_lane(shape: Shape) -> CudaLane:
        cuda.attach()
        if not loaded:
            loaded.update(cuda.kernels(ptx(), KERNELS))
        return CudaLane(cuda, loaded, unet, vae, condition, shape)

    return DeviceLoops(open_lane, name)


class CudaLane(Lane):
    """Engines bound for one shape, and the kernels' buffers.

    The latents are in the VAE's input buffer, so nothing is copied between the last step and the decoder.
    """

    def __init__(
        self,
        cuda: Cuda,
        kernels: dict[str, Any],
        unet: DeviceNetwork,
        vae: DeviceNetwork,
        condition: DeviceNetwork | None,
        shape: Shape,
    ) -> None:
        self._cuda, self._kernels = cuda, kernels
        self._batch, self._evaluations = shape.batch, 2 if shape.twice else 1
        self._devices: list[int] = []
        self._hosts: list[int] = []
        self._stack = contextlib.ExitStack()
        try:
            self._unet: DeviceBound = self._stack.enter_context(
                unet.bind_tokens(self._evaluations * shape.batch, shape.size, shape.tokens)
            )
            self._vae: DeviceBound = self._stack.enter_context(vae.bind(shape.batch, shape.size))
            self._condition: DeviceBound | None = (
                self._stack.enter_context(condition.bind(shape.batch, None)) if condition is not None else None
            )
            self._named = [(unet, self._unet), (vae, self._vae)]
            self._named += [(condition, self._condition)] if condition is not None and self._condition else []
            self.stream = self._unet.stream  # orders its input copies before the run
            self._prepare_buffers(shape.rows)
        except BaseException:
            self.close()
            raise

    def _prepare_buffers(self, rows: int) -> None:
        latents, pixels = self._vae.staged("latents"), self._vae.staged(self._vae.output_name)
        output = self._unet.staged(self._unet.output_name)
        for name, tensor in (("latents", latents), ("prediction", output), ("pixels", pixels)):
            if tensor.dtype != np.float32:
                raise PnpError(f"the engine's {name} are {tensor.dtype} and must be float32; build it again")
        if (tensor := self._unet.staged("timestep")).dtype != np.int64:
            raise PnpError(f"the engine's timesteps are {tensor.dtype} and must be int64; build it again")
        n, channels, height, width = pixels.shape
        self._x, self._count = self._vae.addresses["latents"], latents.size
        self._image = n, channels, height * width
        self._previous, self._older = (self._device(latents.nbytes) for _ in range(2))
        self._w = self._device(4 * self._batch)
        self._row = self._device(8)  # two int32, see kernels.cu
        self._bytes = self._device(pixels.size)
        self._bad = self._device(8 * self._batch)
        self._start_host, self._start_at = self._pinned(latents.shape, np.float32)
        self._end_host, self._end_at = self._pinned(latents.shape, np.float32)
        self._w_host, self._w_at = self._pinned((self._batch,), np.float32)
        self._bytes_host, self._bytes_at = self._pinned((n, height, width, channels), np.uint8)
        self._bad_host, self._bad_at = self._pinned((2, self._batch), np.int32)
        self._table_host, self._table_at = self._pinned((rows, len(COLUMNS)), np.float32)
        self._timesteps_host, self._timesteps_at = self._pinned((rows,), np.int64)
        self._table, self._timesteps = (self._device(host.nbytes) for host in (self._table_host, self._timesteps_host))

    def _device(self, size: int) -> int:
        self._devices.append(self._cuda.allocate(size))
        return self._devices[-1]

    def _pinned(self, shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, int]:
        array, address = self._cuda.pinned(shape, dtype)
        self._hosts.append(address)
        return array, address

    def load(self, table: Schedule, feeds: Feeds) -> None:
        self._cuda.attach()
        self._unet.write(**feeds.inputs)
        steps = len(table)
        for host, address, device, values in (
            (self._start_host, self._start_at, self._x, feeds.latents),
            (self._w_host, self._w_at, self._w, feeds.guidance),
            (self._table_host[:steps], self._table_at, self._table, table.table()),
            (self._timesteps_host[:steps], self._timesteps_at, self._timesteps, table.timesteps),
        ):
            np.copyto(host, values)
            self._cuda.to_device(device, address, host.nbytes, self.stream)

    def begin(self) -> None:
        self._cuda.fill(self._row, 8, self.stream)
        self._cuda.fill(self._bad, self._bad_host.nbytes, self.stream)
        if self._condition is not None:
            output_name = self._condition.output_name
            size = self._condition.staged(output_name).nbytes
            self._cuda.copy(self._condition.addresses["guidance"], self._w, 4 * self._batch, self.stream)
            self._condition.enqueue(self.stream)
            self._cuda.copy(
                self._unet.addresses["condition"], self._condition.addresses[output_name], size, self.stream
            )

    def step(self) -> None:
        unet, rows = self._unet.addresses, self._evaluations * self._batch
        per_image = self._count // self._batch
        self._launch(
            "show", max(self._count, rows), (unet["sample"], _P), (unet["timestep"], _P), (self._x, _P),
            (self._table, _P), (self._timesteps, _P), (self._row, _P), (self._count, _I), (self._evaluations, _I),
            (rows, _I),
        )  # fmt: skip
        self._unet.enqueue(self.stream)
        self._launch(
            "update", self._count, (self._x, _P), (self._previous, _P), (self._older, _P),
            (unet[self._unet.output_name], _P), (self._w if self._evaluations == 2 else 0, _P), (self._table, _P),
            (self._row, _P), (self._count, _I), (per_image, _I),
        )  # fmt: skip

    def end(self, decode: bool) -> None:
        self._check(self._bad, self._x, self._count)
        if decode:
            n, channels, plane = self._image
            count, pixels = n * channels * plane, self._vae.addresses[self._vae.output_name]
            self._vae.enqueue(self.stream)
            self._check(self._bad + 4 * self._batch, pixels, count)
            self._launch(
                "to_bytes", count, (self._bytes, _P), (pixels, _P), (count, _I), (channels, _I), (plane, _I)
            )  # fmt: skip
            self._cuda.to_host(self._bytes_at, self._bytes, count, self.stream)
        else:
            self._cuda.to_host(self._end_at, self._x, self._end_host.nbytes, self.stream)
        self._cuda.to_host(self._bad_at, self._bad, self._bad_host.nbytes, self.stream)

    def wait(self) -> None:
        self._cuda.synchronize(self.stream)

    def read(self, decode: bool) -> LoopOutput:
        self.wait()
        for _, bound in self._named:
            if bound is not self._vae or decode:
                bound.keep_kernels()
        latents, pixels = self._bad_host.astype(bool)
        return LoopOutput((self._bytes_host if decode else self._end_host).copy(), latents, pixels)

    def capture(self, work: Callable[[], None]) -> Any:
        for network, bound in self._named:
            if not bound.capturable(self.stream):
                raise PnpError(
                    f"the runtime reports that {network.path.name} cannot be captured; build it again with --force"
                )
        return self._cuda.capture(self.stream, work)

    def replay(self, graph: Any) -> None:
        self._cuda.replay(graph, self.stream)

    def drop(self, graph: Any) -> None:
        self._cuda.drop(graph)

    def close(self) -> None:
        for address in self._devices:
            self._cuda.free_device(address)
        for address in self._hosts:
            self._cuda.free_host(address)
        self._devices, self._hosts = [], []
        self._stack.close()  # returns the engines' buffers to them

    def _launch(self, kernel: str, count: int, *arguments: tuple[int, Any]) -> None:
        self._cuda.launch(self._kernels[kernel], count, self.stream, *arguments)

    def _check(self, flags: int, values: int, count: int) -> None:
        self._launch("check", count, (flags, _P), (values, _P), (count, _I), (count // self._batch, _I))
