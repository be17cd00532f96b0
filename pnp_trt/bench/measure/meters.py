"""Fields of a latency row besides times: evaluations, memory, energy, and the lower bound of the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .cases import Case
from .energy import Counter, joules_per_image
from .footprint import MemoryMeter
from .roofline import CallCost, Device, least_loop_ms


@dataclass(frozen=True)
class Meters:
    """Meters for measurements besides times; where a meter is None, its fields are None.

    memory: called once per row, after the times.
    counter: the GPU's energy counter (`energy.nvml_counter`), read around `energy.SECONDS` of every case on a GPU.
    device: the measured peaks (`roofline.measure_device`).
    work: returns the cost of a network call (`roofline.work_of`), at the model's own image size.
    """

    memory: MemoryMeter | None = None
    counter: Counter | None = None
    device: Device | None = None
    work: Callable[[Case], CallCost | None] | None = None

    def read(
        self,
        case: Case,
        *,
        batch: int,
        steps: int,
        schedule: str | None,
        size: tuple[int, int] | None,
        draw: Callable[[], object],
        clock: Callable[[], float],
    ) -> dict[str, Any]:
        """Measure the fields of a latency row that are not times, see `latency.LatencyRow`.

        steps: as requested.  draw: generates one batch of images.  clock: returns seconds.
        """
        calls = case.calls(steps, schedule)
        is_own_size = size is None or tuple(size) == getattr(case.pipe, "size", None)
        work = self.work(case) if self.work is not None and is_own_size else None
        bounded = work is not None and self.device is not None and work.precision == self.device.precision
        energy = self.counter is not None and getattr(case.pipe, "on_gpu", False)
        return {
            "evaluations": case.evaluations(steps, schedule),
            "guided_interval": case.interval,
            "peak_memory_bytes": self.memory(case, batch=batch, steps=steps, schedule=schedule, size=size)
            if self.memory is not None
            else None,
            "energy_j_per_image": joules_per_image(draw, batch, self.counter, clock)
            if energy and self.counter is not None
            else None,
            "least_ms": least_loop_ms(work, calls, batch, self.device)
            if bounded and work is not None and self.device is not None
            else None,
        }
