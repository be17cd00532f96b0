"""Simulate queues of image requests under several batching policies, with a clock driven by measured costs.

Batching policies: ``one``, one request at a time; ``whole``, requests with equal steps as one batch, with mixed w (as
in ``Pipeline``); ``step``, step-level batching by the server's own loop; ``cfg``, the same with CFG's two rows per
image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ...sampling.network import Bound, Description, Network
from ...sampling.step_loop import AGEING, Run, StepLoop, Ticket
from ...sampling.table import Schedule, make_table

#: load as a share of the capacity of ``step``
SHARES = (0.5, 0.8, 0.95)
#: number of requests in a burst, which arrive simultaneously
BURST = 12
#: kinds of arrivals, and how many requests arrive simultaneously
ARRIVALS = {"poisson": 1, "bursts": BURST}
_PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Costs:
    """Measured costs, in seconds.

    Attributes:
        whole, step: cost of one network call by batch size, including the loop's overhead, for whole requests and for
            step-level batching. Calls are padded to these batch sizes; the largest is the number of slots.
        text, decode: cost of text encoding and of decoding one image.
    """

    whole: Mapping[int, float]
    step: Mapping[int, float]
    text: float
    decode: float

    @property
    def slots(self) -> int:
        """Maximum number of rows in a call."""
        return max(self.step)


@dataclass
class QueuedRequest:
    """A request for one image, with the times in seconds of its arrival, its first step and its end."""

    at: float
    steps: int
    began: float = float("nan")
    done: float = float("nan")


@dataclass
class Served:
    """Result of serving a queue.

    Attributes:
        rows, padded: numbers of used and of padded rows in all network calls.
    """

    requests: list[QueuedRequest]
    rows: int = 0
    padded: int = 0


class Clocked(Network):
    """A network whose calls advance a clock by ``costs`` and compute nothing."""

    def __init__(self, costs: Mapping[int, float]) -> None:
        self.costs, self.now = costs, 0.0

    def describe(self) -> Description:
        return Description({}, {}, "clock")

    @contextlib.contextmanager
    def bind(self, batch: int, size: tuple[int, int] | None = None) -> Iterator[Bound]:
        yield _Call(self, batch)


class _Call(Bound):
    def __init__(self, network: Clocked, batch: int) -> None:
        self._network, self._batch = network, batch

    def write(self, **inputs: np.ndarray) -> None:
        pass

    def run(self) -> None:
        self._network.now += self._network.costs[self._batch]

    def read(self) -> np.ndarray:
        return np.zeros((self._batch, 1, 1, 1), np.float32)


def arrivals(count: int, rate: float, seed: int, steps: Sequence[int], burst: int = 1) -> list[QueuedRequest]:
    """Generate Poisson arrivals at ``rate`` requests per second, ``burst`` at a time; a rate of 0 means all at once."""
    rng = np.random.default_rng(seed)
    moments = rng.exponential(burst / rate, -(-count // burst)).cumsum() if rate else np.zeros(-(-count // burst))
    return [QueuedRequest(float(moments[i // burst]), int(rng.choice(steps))) for i in range(count)]


def by_whole_requests(costs: Costs, requests: list[QueuedRequest], most: int | None = None) -> Served:
    """Serve the oldest request together with waiting ones of equal steps, at most ``most``, when the engine is free."""
    most = costs.slots if most is None else most
    served, now, k = Served(requests), 0.0, 0
    waiting: list[QueuedRequest] = []
    while k < len(requests) or waiting:
        if not waiting:
            now = max(now, requests[k].at)
        while k < len(requests) and requests[k].at <= now:
            waiting.append(requests[k])
            k += 1
        group = [r for r in waiting if r.steps == waiting[0].steps][:most]
        group_ids = {id(r) for r in group}
        waiting = [r for r in waiting if id(r) not in group_ids]
        n, steps = len(group), group[0].steps
        batch = min(b for b in costs.whole if b >= n)
        for request in group:
            request.began = now + n * costs.text
        now += steps * costs.whole[batch] + n * (costs.text + costs.decode)
        served.rows += steps * n
        served.padded += steps * (batch - n)
        for request in group:
            request.done = now
    return served


def _table(steps: int) -> Schedule:
    one = np.ones(steps)
    return make_table("clock", np.arange(steps), x_scale=one, output_scale=one, image_scale=one, noise_scale=one)


def by_steps(
    costs: Costs,
    requests: list[QueuedRequest],
    rows: int = 1,
    buckets: Sequence[int] | None = None,
    ageing: float = AGEING,
) -> Served:  # fmt: skip
    """Serve with the server's own loop and ``rows`` per image; ``buckets`` and ``ageing`` as for ``StepLoop``."""
    network = Clocked(costs.step)
    loop = StepLoop(network, costs.slots, tuple(costs.step) if buckets is None else buckets, ageing)
    tables = {steps: _table(steps) for steps in {request.steps for request in requests}}
    owners: dict[Ticket, QueuedRequest] = {}
    start, k = np.zeros((1, 1, 1), np.float32), 0
    inputs: tuple[dict[str, np.ndarray], ...] = tuple({} for _ in range(rows))

    def beginning(request: QueuedRequest) -> Callable[[], Run]:
        def begin() -> Run:
            network.now += costs.text
            request.began = network.now
            return Run(tables[request.steps], start, inputs)

        return begin

    while k < len(requests) or loop.waiting or loop.running:
        if not loop.waiting and not loop.running:
            network.now = max(network.now, requests[k].at)
        while k < len(requests) and requests[k].at <= network.now:
            owners[loop.submit(beginning(requests[k]), requests[k].steps, rows)] = requests[k]
            k += 1
        for ticket in loop.step():
            network.now += costs.decode
            owners.pop(ticket).done = network.now
    return Served(requests, loop.rows_used, loop.rows_padded)


Policy = Callable[[Costs, list[QueuedRequest]], Served]
#: batching policies by their names in the results document
POLICIES: dict[str, Policy] = {
    "one": lambda costs, requests: by_whole_requests(costs, requests, 1),
    "whole": by_whole_requests,
    "step": by_steps,
    "cfg": lambda costs, requests: by_steps(costs, requests, rows=2),
}


def figures(served: Served) -> dict[str, Any]:
    """Return throughput in images per second, latency and time to admission in seconds, and the share of padded rows.

    Latency is also given separately for the requests with the fewest and with the most steps.
    """
    latency = np.array([r.done - r.at for r in served.requests])
    admission = np.array([r.began - r.at for r in served.requests])
    steps = np.array([r.steps for r in served.requests])
    span = max(r.done for r in served.requests) - served.requests[0].at
    return {
        "images_per_s": round(len(latency) / span, 4),
        "latency_s": _percentiles(latency),
        "admission_s": _percentiles(admission),
        "latency_s_by_steps": [
            {"steps": int(n), **_percentiles(latency[steps == n])} for n in np.unique([steps.min(), steps.max()])
        ],
        "padding_share": round(served.padded / max(1, served.rows + served.padded), 4),
    }


def _percentiles(values: np.ndarray) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(values, p)), 4) for p in _PERCENTILES}


def capacity(costs: Costs, count: int, steps: Sequence[int], policies: Mapping[str, Policy]) -> dict[str, float]:
    """Return the images per second of each policy if all requests arrive at the start."""
    waiting = partial(arrivals, count, 0, 1, steps)
    return {name: figures(policy(costs, waiting()))["images_per_s"] for name, policy in policies.items()}


def rows(
    costs: Costs, count: int, steps: Sequence[int], policies: Mapping[str, Policy], capacities: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return a row per kind of arrivals, load and policy; figures are None above the policy's capacity."""
    table = []
    for kind, burst in ARRIVALS.items():
        for share in SHARES:
            rate = share * capacities["step"]
            for name, policy in policies.items():
                fits = rate < capacities[name]  # otherwise the queue grows without bound
                measured = figures(policy(costs, arrivals(count, rate, 7, steps, burst))) if fits else _NONE
                table.append(
                    {"arrivals": kind, "load": share, "policy": name, "rate_per_s": round(rate, 4), **measured}
                )
    return table


_NONE: dict[str, Any] = {
    "images_per_s": None, "latency_s": None, "admission_s": None, "latency_s_by_steps": [], "padding_share": None,
}  # fmt: skip
