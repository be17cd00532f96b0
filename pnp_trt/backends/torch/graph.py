"""PyTorch modules and the sampler's arithmetic on one stream: the torch form of ``backends.cuda_graph``.

Graphs are ``torch.cuda.CUDAGraph``, whose memory is of PyTorch's own allocator.  On a CPU the same lane runs step by
step.  Source: PyTorch's notes on CUDA semantics, "CUDA Graphs" (side stream, static inputs, thread-local capture).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import PnpError
from ...sampling.device_loop import DeviceLoops, Drawn, Feeds, Lane, Plan
from ..base import Size
from .network import TorchNetwork


def device_loops(unet: TorchNetwork, vae: TorchNetwork, condition: TorchNetwork | None, name: str) -> DeviceLoops:
    """Loops over modules of one device.

    Args:
        condition: the part of the guide that depends on w alone, where it is a separate network.
        name: of the bundle.
    """
    return DeviceLoops(lambda batch, size, twice: TorchLane(unet, vae, condition, batch, size, twice), name)


@dataclass(frozen=True)
class _Prepared:
    """A plan with its table on the device: coefficients ``[steps, 7]`` and timesteps ``[steps]``."""

    plan: Plan
    coefficients: Tensor
    timesteps: Tensor


class TorchLane(Lane):
    """Tensors that stay where they are for one batch and size."""

    def __init__(
        self,
        unet: TorchNetwork,
        vae: TorchNetwork,
        condition: TorchNetwork | None,
        batch: int,
        size: Size,
        twice: bool,
    ) -> None:
        self._device = torch.device(unet.device)
        self._unet, self._vae, self._condition = unet, vae, condition
        self._passes = 2 if twice else 1
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        shape = (batch, int(vae.describe().inputs["latents"][1][1]), *size)
        with self._on_stream():
            self._x, self._scratch, self._data, self._previous, self._older = (
                torch.zeros(shape, device=self._device) for _ in range(5)
            )
            self._w = torch.zeros(batch, device=self._device)
            self._inputs: dict[str, Tensor] = {
                "sample": torch.zeros((self._passes * batch, *shape[1:]), device=self._device),
                "timestep": torch.zeros(self._passes * batch, dtype=torch.int64, device=self._device),
            }
            self._bad = torch.zeros((2, batch), dtype=torch.bool, device=self._device)
        # by whether it was decoded; made by the first run, and in one place from then on
        self._results: dict[bool, Tensor] = {}

    def prepare(self, plan: Plan) -> _Prepared:
        table, timesteps = plan.table.table(), plan.table.timesteps
        with self._on_stream():
            return _Prepared(
                plan, torch.from_numpy(table).to(self._device), torch.from_numpy(timesteps.copy()).to(self._device)
            )

    def release(self, prepared: _Prepared) -> None:
        pass  # its tensors go with it

    def load(self, feeds: Feeds) -> None:
        with self._on_stream():
            for name, array in (("", feeds.latents), ("w", feeds.guidance), *feeds.inputs.items()):
                values = torch.from_numpy(np.array(array))  # a copy: arrays that are broadcast cannot be wrapped
                if name in ("", "w"):
                    (self._w if name else self._x).copy_(values)
                else:
                    _keep(self._inputs, name, values.to(self._device))

    def begin(self, prepared: _Prepared) -> None:
        with self._on_stream():
            self._bad.zero_()
            if self._condition is not None:
                _keep(self._inputs, "condition", self._condition.run({"guidance": self._w}))

    def step(self, prepared: _Prepared, i: int) -> None:
        with self._on_stream():
            (input_scale, x_scale, output_scale, previous_scale, data_x, data_output, older_scale) = (
                prepared.coefficients[i]
            )
            x, scratch = self._x, self._scratch
            shown = self._inputs["sample"].view(self._passes, *x.shape)
            shown.copy_(torch.mul(x, input_scale, out=scratch))
            self._inputs["timestep"].copy_(prepared.timesteps[i])
            output = self._unet.run(self._inputs)
            if self._passes == 2:  # Ho & Salimans 2022
                unconditional, conditional = output.chunk(2)
                output = unconditional + self._w[:, None, None, None] * (conditional - unconditional)
            # products are rounded before they are added, as in the host's loop
            if prepared.plan.table.multistep:
                torch.mul(x, data_x, out=self._data).add_(torch.mul(output, data_output, out=scratch))
            x.mul_(x_scale).add_(torch.mul(output, output_scale, out=scratch))
            if prepared.plan.table.multistep:
                if i > 0:
                    x.add_(torch.mul(self._previous, previous_scale, out=scratch))
                if prepared.plan.table.history == 2:
                    if i > 1:
                        x.add_(torch.mul(self._older, older_scale, out=scratch))
                    self._older.copy_(self._previous)
                self._previous.copy_(self._data)

    def end(self, prepared: _Prepared) -> None:
        with self._on_stream():
            self._bad[0].copy_(_not_finite(self._x))
            if prepared.plan.decode:
                pixels = self._vae.run({"latents": self._x})
                self._bad[1].copy_(_not_finite(pixels))
                scaled = pixels.permute(0, 2, 3, 1).add(1).mul_(127.5).round_().nan_to_num_(0).clamp_(0, 255)
                _keep(self._results, True, scaled.to(torch.uint8))
            else:
                _keep(self._results, False, self._x)

    def wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def read(self, prepared: _Prepared) -> Drawn:
        with self._on_stream():
            values, bad = self._results[prepared.plan.decode].cpu(), self._bad.cpu()
        return Drawn(values.numpy().copy(), bad[0].numpy().copy(), bad[1].numpy().copy())

    def capture(self, work: Callable[[], None]) -> Any:
        if self._stream is None:
            raise PnpError(f"there are no CUDA graphs on {self._device}")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph

    def replay(self, graph: Any) -> None:
        with self._on_stream():
            graph.replay()

    def drop(self, graph: Any) -> None:
        graph.reset()

    def close(self) -> None:
        self._results.clear()
        self._inputs.clear()

    @contextlib.contextmanager
    def _on_stream(self) -> Any:
        with torch.inference_mode(), torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            yield


def _keep(held: dict[Any, Tensor], name: Any, values: Tensor) -> None:
    """Put values where they are always found; a graph has that address."""
    if name not in held:
        held[name] = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    held[name].copy_(values)


def _not_finite(values: Tensor) -> Tensor:
    """``[N]`` bool."""
    return torch.isfinite(values).flatten(1).all(1).logical_not()
