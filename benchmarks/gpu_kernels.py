"""The device loop's kernels on a real GPU: compared with numpy, and used as the networks of a loop without engines."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pnp_trt.backends.cuda import Cuda

_P, _I = ctypes.c_void_p, ctypes.c_int


def scheduler() -> dict[str, Any]:
    """Stable Diffusion's noise schedule."""
    return {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}


class Device:
    """Arrays on the GPU for one check."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.stream = cuda, cuda.stream()
        self.held: list[int] = []

    def up(self, values: np.ndarray) -> int:
        """Copy an array to the GPU; return its address."""
        values = np.ascontiguousarray(values)
        self.held.append(self.cuda.allocate(values.nbytes))
        self.cuda.to_device(self.held[-1], values.ctypes.data, values.nbytes, self.stream)
        self.cuda.synchronize(self.stream)
        return self.held[-1]

    def down(self, address: int, like: np.ndarray) -> np.ndarray:
        """Copy the array at ``address`` to the host; its shape and type are those of ``like``."""
        out = np.empty_like(like)
        self.cuda.to_host(out.ctypes.data, address, out.nbytes, self.stream)
        self.cuda.synchronize(self.stream)
        return out

    def close(self) -> None:
        """Free all arrays."""
        self.cuda.free(self.held, [], self.stream)


def check_kernels(cuda: Cuda, kernels: dict[str, Any]) -> dict[str, bool]:
    """Compare each kernel's output with numpy's, bit for bit."""
    draw = np.random.default_rng(0)
    d = Device(cuda)
    batch, channels, plane = 3, 4, 100
    per, count = channels * plane, batch * channels * plane
    x, previous, older = (draw.standard_normal(count, np.float32) for _ in range(3))
    both = draw.standard_normal(2 * count, np.float32)
    w = np.array([1.5, 3.0, 7.5], np.float32)
    table = draw.standard_normal((4, 7), np.float32)
    times = np.array([900, 600, 300, 1], np.int64)
    equal: dict[str, bool] = {}

    def launch(name: str, size: int, *arguments: tuple[int, Any]) -> None:
        cuda.launch(kernels[name], size, d.stream, *arguments)

    at_x, at_table, at_times = d.up(x), d.up(table), d.up(times)
    row = np.array([2, -1], np.int32)
    at_row = d.up(row)
    shown, stamps = np.zeros((2, count), np.float32), np.zeros(6, np.int64)
    at_shown, at_stamps = d.up(shown), d.up(stamps)
    launch("show", count, (at_shown, _P), (at_stamps, _P), (at_x, _P), (at_table, _P), (at_times, _P), (at_row, _P),
           (count, _I), (2, _I), (6, _I))  # fmt: skip
    scaled = table[2, 0] * x
    equal["show"] = bool(np.array_equal(d.down(at_shown, shown), np.stack([scaled, scaled])))
    equal["show"] &= bool((d.down(at_stamps, stamps) == 300).all())
    equal["show"] &= d.down(at_row, row).tolist() == [2, 2]

    at_previous, at_older, at_both, at_w = d.up(previous), d.up(older), d.up(both), d.up(w)
    launch("update", count, (at_x, _P), (at_previous, _P), (at_older, _P), (at_both, _P), (at_w, _P), (at_table, _P),
           (at_row, _P), (count, _I), (per, _I))  # fmt: skip
    u, c = both[:count], both[count:]
    out = u + np.repeat(w, per) * (c - u)
    _, a, b, p, dx, do, e = table[2]
    equal["update"] = bool(np.array_equal(d.down(at_x, x), a * x + b * out + p * previous + e * older))
    equal["update"] &= bool(np.array_equal(d.down(at_older, older), previous))
    equal["update"] &= bool(np.array_equal(d.down(at_previous, previous), dx * x + do * out))
    equal["update"] &= d.down(at_row, row).tolist() == [3, 2]

    bad = x.copy()
    bad[per + 5], bad[2 * per] = np.nan, np.inf
    flags = np.zeros(batch, np.int32)
    at_flags = d.up(flags)
    launch("check", count, (at_flags, _P), (d.up(bad), _P), (count, _I), (per, _I))
    equal["check"] = bool(np.array_equal(d.down(at_flags, flags), [0, 1, 1]))

    pixels = draw.uniform(-1.2, 1.2, (batch, channels, plane)).astype(np.float32)
    data = np.zeros((batch, plane, channels), np.uint8)
    at_data = d.up(data)
    launch("to_bytes", count, (at_data, _P), (d.up(pixels), _P), (count, _I), (channels, _I), (plane, _I))
    expected = np.clip(np.rint((pixels + np.float32(1)) * np.float32(127.5)), 0, 255).astype(np.uint8)
    equal["to_bytes"] = bool(np.array_equal(d.down(at_data, data), expected.transpose(0, 2, 1)))
    d.close()
    return equal


class Scaling:
    """Stand-in for an engine: a network that multiplies its input by ``factor`` with the kernel ``show``."""

    def __init__(self, cuda: Cuda, kernels: dict[str, Any], reads: str, factor: float, channels: int) -> None:
        self.path = Path(f"{reads}.engine")
        self._cuda, self._kernel = cuda, kernels["show"]
        self._reads, self._factor, self._channels = reads, factor, channels

    @contextlib.contextmanager
    def bind(self, batch: int, size: tuple[int, int] | None = None) -> Iterator[ScalingBound]:
        """Allocate buffers for the duration of the block."""
        assert size is not None
        bound = ScalingBound(self._cuda, self._kernel, self._reads, self._factor, (batch, self._channels, *size))
        try:
            yield bound
        finally:
            bound.close()

    def bind_tokens(
        self, batch: int, size: tuple[int, int] | None, tokens: int | None
    ) -> contextlib.AbstractContextManager[ScalingBound]:
        """Same as :meth:`bind`, because this network reads no text."""
        return self.bind(batch, size)


class ScalingBound:
    """Buffers of a :class:`Scaling`."""

    output_name = "out"

    def __init__(self, cuda: Cuda, kernel: Any, reads: str, factor: float, shape: tuple[int, ...]) -> None:
        self._cuda, self._kernel, self._reads = cuda, kernel, reads
        self._device = Device(cuda)
        self.stream = self._device.stream
        self._like = {
            reads: np.zeros(shape, np.float32),
            "out": np.zeros(shape, np.float32),
            "timestep": np.zeros(shape[0], np.int64),
        }
        self.addresses = {name: self._device.up(values) for name, values in self._like.items()}
        self._table = self._device.up(np.array([[factor, 0, 0, 0, 0, 0, 0]], np.float32))
        self._row = self._device.up(np.zeros(2, np.int32))

    def write(self, **inputs: np.ndarray) -> None:
        """No inputs are written by the host."""
        assert not inputs

    def enqueue(self, stream: int) -> None:
        """Enqueue one run."""
        at, count = self.addresses, self._like["out"].size
        self._cuda.launch(
            self._kernel, count, stream, (at["out"], _P), (0, _P), (at[self._reads], _P), (self._table, _P), (0, _P),
            (self._row, _P), (count, _I), (1, _I), (0, _I),
        )  # fmt: skip

    def capturable(self, stream: int) -> bool:
        """Always true."""
        return True

    def staged(self, name: str) -> np.ndarray:
        """Shape and type of a tensor."""
        return self._like[name]

    def keep_kernels(self) -> None:
        """There are no kernels to keep."""

    def close(self) -> None:
        """Free the buffers."""
        self._device.close()
