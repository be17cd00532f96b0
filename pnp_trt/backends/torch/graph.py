"""PyTorch modules and the sampler's arithmetic on one stream: the torch counterpart of ``backends.cuda_graph``.

Graphs are ``torch.cuda.CUDAGraph``, with memory from PyTorch's allocator.  On a CPU the same lane runs uncaptured.
The index of the table row that a step reads is a tensor, which the step increments; a step reads nothing back.
Source: PyTorch's notes on CUDA semantics, "CUDA Graphs" (side stream, static inputs, thread-local capture, one memory
pool for graphs that are replayed in turn).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import PnpError
from ...sampling.device_loop import DeviceLoops, Feeds, Lane, LoopOutput, Shape
from ...sampling.table import COLUMNS, Schedule
from .network import TorchNetwork


def device_loops(unet: TorchNetwork, vae: TorchNetwork, condition: TorchNetwork | None, name: str) -> DeviceLoops:
    """Return loops over modules on one device.

    Args:
        condition: the part of the guide that depends only on w, if it is a separate network.
        name: name of the bundle.
    """
    return DeviceLoops(lambda shape: TorchLane(unet, vae, condition, shape), name)


#: the table's columns in the lane's order: the input scale, the columns of the data prediction, then those of x
_COLUMNS = [
    COLUMNS.index(name)
    for name in (
        "input_scale", "data_x", "data_output", "x_scale", "output_scale", "previous_scale", "older_scale",
    )
]  # fmt: skip


class TorchLane(Lane):
    """Tensors at fixed addresses for one shape."""

    def __init__(self, unet: TorchNetwork, vae: TorchNetwork, condition: TorchNetwork | None, shape: Shape) -> None:
        self._device = torch.device(unet.device)
        self._unet, self._vae, self._condition = unet, vae, condition
        batch, self._evaluations = shape.batch, 2 if shape.twice else 1
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._graphs: list[torch.cuda.CUDAGraph] = []
        latents = (batch, int(vae.describe().inputs["latents"][1][1]), *shape.size)
        with self._on_stream():
            # x, the network's output, and the data predictions of the last two steps
            self._state, self._products = (torch.zeros((4, *latents), device=self._device) for _ in range(2))
            self._x, self._output, self._previous, self._older = self._state
            self._w = torch.zeros(batch, device=self._device)
            self._table = torch.zeros((shape.rows, len(_COLUMNS)), device=self._device)
            self._timesteps = torch.zeros(shape.rows, dtype=torch.int64, device=self._device)
            # the same table row throughout: every image is at the same step
            self._row = torch.zeros(self._evaluations * batch, dtype=torch.int64, device=self._device)
            self._inputs: dict[str, Tensor] = {
                "sample": torch.zeros((self._evaluations * batch, *latents[1:]), device=self._device),
                "timestep": torch.zeros(self._evaluations * batch, dtype=torch.int64, device=self._device),
            }
            self._bad = torch.zeros((2, batch), dtype=torch.bool, device=self._device)
        # by whether the latents were decoded; allocated by the first run, then at fixed addresses
        self._results: dict[bool, Tensor] = {}

    def load(self, table: Schedule, feeds: Feeds) -> None:
        steps = len(table)
        sources = (
            (self._x, feeds.latents),
            (self._w, feeds.guidance),
            (self._table[:steps], table.table()[:, _COLUMNS]),
            (self._timesteps[:steps], table.timesteps),
        )
        with self._on_stream():
            for target, array in sources:
                target.copy_(_tensor(array))
            for name, array in feeds.inputs.items():
                _keep(self._inputs, name, _tensor(array).to(self._device))

    def begin(self) -> None:
        with self._on_stream():
            self._row.zero_()
            self._state[2:].zero_()
            self._bad.zero_()
            if self._condition is not None:
                _keep(self._inputs, "condition", self._condition.run({"guidance": self._w}))

    def step(self) -> None:
        with self._on_stream():
            scales = self._table.index_select(0, self._row[:1]).view(len(_COLUMNS), 1, 1, 1, 1)
            shown = self._inputs["sample"].view(self._evaluations, *self._x.shape)
            torch.mul(self._x.expand_as(shown), scales[0], out=shown)
            torch.index_select(self._timesteps, 0, self._row, out=self._inputs["timestep"])
            output = self._unet.run(self._inputs)
            if self._evaluations == 2:  # Ho & Salimans 2022
                unconditional, conditional = output.chunk(2)
                change = self._w[:, None, None, None] * (conditional - unconditional)
                torch.add(unconditional, change, out=self._output)
            else:
                self._output.copy_(output)
            # products are rounded before they are added, as in the host's loop; a scale of 0 adds nothing
            of_x, of_output, of_previous, of_older = torch.mul(self._state, scales[3:], out=self._products)
            data_x, data_output = self._state[:2] * scales[1:3]
            self._older.copy_(self._previous)
            torch.add(data_x, data_output, out=self._previous)
            torch.add(of_x, of_output, out=self._x).add_(of_previous).add_(of_older)
            self._row.add_(1)

    def end(self, decode: bool) -> None:
        with self._on_stream():
            self._bad[0].copy_(_not_finite(self._x))
            if decode:
                pixels = self._vae.run({"latents": self._x})
                self._bad[1].copy_(_not_finite(pixels))
                scaled = pixels.permute(0, 2, 3, 1).add(1).mul_(127.5).round_().nan_to_num_(0).clamp_(0, 255)
                _keep(self._results, True, scaled.to(torch.uint8))
            else:
                _keep(self._results, False, self._x)

    def wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def read(self, decode: bool) -> LoopOutput:
        with self._on_stream():
            values, bad = self._results[decode].cpu(), self._bad.cpu()
        return LoopOutput(values.numpy().copy(), bad[0].numpy().copy(), bad[1].numpy().copy())

    def capture(self, work: Callable[[], None]) -> Any:
        if self._stream is None:
            raise PnpError(f"there are no CUDA graphs on {self._device}")
        graph = torch.cuda.CUDAGraph()
        # one pool for all: the lane's graphs never run concurrently, and data that outlives a run is in the lane's
        # tensors.  A pool must not be reused once all its graphs are gone
        pool = self._graphs[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        self._graphs.append(graph)
        return graph

    def replay(self, graph: Any) -> None:
        with self._on_stream():
            graph.replay()

    def drop(self, graph: Any) -> None:
        self._graphs.remove(graph)
        graph.reset()

    def close(self) -> None:
        self._results.clear()
        self._inputs.clear()

    @contextlib.contextmanager
    def _on_stream(self) -> Any:
        with torch.inference_mode(), torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            yield


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))  # a copy, because broadcast arrays cannot be wrapped


def _keep(tensors: dict[Any, Tensor], name: Any, values: Tensor) -> None:
    """Copy values to a fixed address, as captured graphs store it."""
    if name not in tensors:
        tensors[name] = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    tensors[name].copy_(values)


def _not_finite(values: Tensor) -> Tensor:
    """``[N]`` bool."""
    return torch.isfinite(values).flatten(1).all(1).logical_not()
