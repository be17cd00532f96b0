"""What step-level batching gives a server, on ONNX Runtime's CPU provider with the bundled model.

Two measurements, in CPU seconds of one thread, so that other programs of the machine count little:

- **costs**: one network call of each batch by each way of batching, a text encoding, a decoding; and a burst of mixed
  requests served by real calls, with the images compared with those that the pipeline gives alone;
- **queues**: thousands of requests, Poisson or in bursts, through the same scheduler (`StepLoop`) on a clock that the
  measured costs drive, at 50, 80 and 95 % of the capacity of step-level batching.

Ways of batching: `one` request at a time; `whole` requests of equal steps as one batch, w mixed (what `Pipeline` does);
`step` (`pnp-trt serve`); `step-buckets` with batches padded to 1, 2, 4, 8; `step-fifo`, first come first served;
`step-cfg`, CFG's two rows an image on the same engine.

    python -m benchmarks.serving                # about five minutes on one core
    python -m benchmarks.serving --requests 400 --rounds 5
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pnp_trt.bundle.provenance import provenance
from pnp_trt.bundle.store import write_json
from pnp_trt.runtime.pipeline import Pipeline, Prepared
from pnp_trt.sampling.network import Bound, Description, Network
from pnp_trt.sampling.step_loop import Run, StepLoop, Ticket
from pnp_trt.sampling.table import Schedule, make_table

SCHEMA = "pnp-trt/serving/1"
RESULTS = Path(__file__).parent / "results"
SLOTS = 8
MIXES: dict[str, tuple[int, ...]] = {"8, 20 or 50 steps": (8, 20, 50), "4 to 50 steps": tuple(range(4, 51))}
SCALES = (2.0, 3.0, 5.0, 7.0)
PROMPTS = ("a red apple", "a panda", "a red heart, noto style", "a lighthouse", "a blue car", "a green tree")
SHARES = (0.5, 0.8, 0.95)
#: requests of a burst, which come at the same moment
BURST = 12
clock = time.process_time


@dataclass
class Costs:
    """CPU seconds.

    Attributes:
        whole, step: one network call by batch, with all that the loop does around it.
        text, decode: of one image.
    """

    whole: dict[int, float]
    step: dict[int, float]
    text: float
    decode: float


@dataclass
class Request:
    """One image to make; times in seconds."""

    at: float
    steps: int
    began: float = float("nan")
    done: float = float("nan")


@dataclass
class Served:
    """How a queue was served.

    Attributes:
        rows, padded: of network calls.
    """

    requests: list[Request]
    rows: int = 0
    padded: int = 0


class Clocked(Network):
    """A network whose calls take the time of ``costs`` and compute nothing."""

    def __init__(self, costs: dict[int, float]) -> None:
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


def arrivals(count: int, rate: float, seed: int, steps: Sequence[int], burst: int = 1) -> list[Request]:
    """Requests at ``rate`` a second, Poisson, ``burst`` at the same moment; all at once for a rate of 0."""
    draw = np.random.default_rng(seed)
    moments = draw.exponential(burst / rate, -(-count // burst)).cumsum() if rate else np.zeros(-(-count // burst))
    return [Request(float(moments[i // burst]), int(draw.choice(steps))) for i in range(count)]


def by_whole_requests(costs: Costs, requests: list[Request], most: int) -> Served:
    """Whenever the engine is free: the oldest request, and those that wait with equal steps, at most ``most``."""
    now, waiting, k, rows = 0.0, [], 0, 0
    while k < len(requests) or waiting:
        if not waiting:
            now = max(now, requests[k].at)
        while k < len(requests) and requests[k].at <= now:
            waiting.append(requests[k])
            k += 1
        group = [r for r in waiting if r.steps == waiting[0].steps][:most]
        taken = {id(r) for r in group}
        waiting = [r for r in waiting if id(r) not in taken]
        n, steps = len(group), group[0].steps
        for request in group:
            request.began = now + n * costs.text
        now += steps * costs.whole[n] + n * (costs.text + costs.decode)
        rows += steps * n
        for request in group:
            request.done = now
    return Served(requests, rows)


def _table(steps: int) -> Schedule:
    one = np.ones(steps)
    return make_table("clock", np.arange(steps), x_scale=one, output_scale=one, image_scale=one, noise_scale=one)


_TABLES = {steps: _table(steps) for steps in range(1, 101)}


def by_steps(
    costs: Costs, requests: list[Request], rows: int = 1, buckets: Sequence[int] | None = None, ageing: float = 1.0
) -> Served:
    """The package's own loop."""
    network = Clocked(costs.step)
    loop = StepLoop(network, SLOTS, buckets, ageing)
    owners: dict[Ticket, Request] = {}
    start, inputs, k = np.zeros((1, 1, 1), np.float32), tuple({} for _ in range(rows)), 0

    def beginning(request: Request) -> Callable[[], Run]:
        def begin() -> Run:
            network.now += costs.text
            request.began = network.now
            return Run(_TABLES[request.steps], start, inputs)

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


WAYS: dict[str, Callable[[Costs, list[Request]], Served]] = {
    "one": lambda costs, requests: by_whole_requests(costs, requests, 1),
    "whole": lambda costs, requests: by_whole_requests(costs, requests, SLOTS),
    "step": by_steps,
    "step-buckets": lambda costs, requests: by_steps(costs, requests, buckets=(1, 2, 4, 8)),
    "step-fifo": lambda costs, requests: by_steps(costs, requests, ageing=1e9),
    "step-cfg": lambda costs, requests: by_steps(costs, requests, rows=2),
}


def figures(served: Served) -> dict[str, Any]:
    """What is told of a queue: images a second, latencies and waits in seconds, and the share of padded rows."""
    late = np.array([r.done - r.at for r in served.requests])
    wait = np.array([r.began - r.at for r in served.requests])
    steps = np.array([r.steps for r in served.requests])
    span = max(r.done for r in served.requests) - served.requests[0].at

    def of(values: np.ndarray) -> dict[str, float]:
        return {f"p{p}": round(float(np.percentile(values, p)), 4) for p in (50, 95, 99)}

    groups = {"8 or fewer": steps <= 8, "40 or more": steps >= 40}
    return {
        "images_per_second": round(len(late) / span, 4), "latency": of(late), "admission": of(wait),
        "latency_by_steps": {name: of(late[which]) for name, which in groups.items() if which.any()},
        "padding_share": round(served.padded / max(1, served.rows + served.padded), 4),
    }  # fmt: skip


def queues(costs: Costs, count: int) -> dict[str, Any]:
    """Capacity of each way, with everything waiting at the start, and its figures at shares of that of ``step``."""
    found: dict[str, Any] = {}
    for mix, steps in MIXES.items():
        capacity = {
            name: figures(way(costs, arrivals(count, 0, 1, steps)))["images_per_second"] for name, way in WAYS.items()
        }
        found[mix] = {"capacity": capacity, "loads": {}}
        for kind, burst in (("Poisson", 1), (f"bursts of {BURST}", BURST)):
            for share in SHARES:
                rate = share * capacity["step"]
                cell = {
                    name: figures(way(costs, arrivals(count, rate, 7, steps, burst)))
                    for name, way in WAYS.items()
                    if rate < capacity[name]  # else its queue grows without end
                }
                found[mix]["loads"][f"{kind}, {share:.0%}"] = cell
    return found


def measure(pipeline: Pipeline, rounds: int) -> Costs:
    """The costs, medians of ``rounds``; batches take turns, so that another program's load falls on all alike."""
    held: dict[int, StepLoop] = {}
    whole: dict[int, list[float]] = {n: [] for n in range(1, SLOTS + 1)}
    step: dict[int, list[float]] = {n: [] for n in range(1, SLOTS + 1)}
    for n in whole:
        prepared = pipeline.prepare([PROMPTS[i % 6] for i in range(n)], steps=1000, seed=list(range(n)))
        held[n] = pipeline.step_loop(SLOTS)
        for i in range(n):
            held[n].submit(lambda p=prepared, i=i: pipeline.run(p, i), 1000)  # type: ignore[misc]
        held[n].step()
    text, decode = [], []
    for _ in range(rounds):
        for n in whole:
            started = clock()
            held[n].step()
            step[n].append(clock() - started)
            states, noise = np.asarray(pipeline.encode(["a panda"])).repeat(n, 0), pipeline.noise(range(n))
            started = clock()
            latents = pipeline.denoise(states, noise, steps=4, guidance=3.0)
            whole[n].append((clock() - started) / 4)
        started = clock()
        pipeline.encode(["a panda"])
        text.append(clock() - started)
        started = clock()
        pipeline.decode(latents[:1])
        decode.append(clock() - started)
    middle = {name: {n: float(np.median(v)) for n, v in each.items()} for name, each in (("w", whole), ("s", step))}
    return Costs(middle["w"], middle["s"], float(np.median(text)), float(np.median(decode)))


def burst(pipeline: Pipeline, count: int) -> dict[str, Any]:
    """Requests that wait from the start, by real calls: CPU seconds of each way, and whether the images are equal."""
    draw = np.random.default_rng(3)
    asked = [
        {"prompts": str(draw.choice(PROMPTS)), "steps": int(draw.choice((8, 20, 50))), "seed": i,
         "guidance": float(draw.choice(SCALES))}
        for i in range(count)
    ]  # fmt: skip
    alone: list[np.ndarray] = []
    found: dict[str, Any] = {"requests": count, "cpu_seconds": {}}
    started = clock()
    for each in asked:
        alone.append(pipeline(**each)[0].pixels)
    found["cpu_seconds"]["one"] = clock() - started
    started = clock()
    for steps in sorted({each["steps"] for each in asked}):
        group = [each for each in asked if each["steps"] == steps]
        for k in range(0, len(group), SLOTS):
            part = group[k : k + SLOTS]
            lists = {key: [each[key] for each in part] for key in ("prompts", "seed", "guidance")}
            pipeline(**lists, steps=steps)
    found["cpu_seconds"]["whole"] = clock() - started
    for name, method in (("step", "guided"), ("step-cfg", "cfg")):
        loop = pipeline.step_loop(SLOTS)
        tickets: list[Ticket] = []
        pixels: dict[Ticket, np.ndarray] = {}
        started = clock()
        for each in asked:
            prepared: Prepared = pipeline.prepare(**each, method=method)
            begin: Callable[[], Run] = lambda p=prepared: pipeline.run(p, 0)  # type: ignore[misc]  # noqa: E731
            tickets.append(loop.submit(begin, len(prepared.table), prepared.rows))
        while loop.waiting or loop.running:
            for ticket in loop.step():
                assert ticket.latents is not None
                pixels[ticket] = pipeline.decode(ticket.latents[None])[0]
        found["cpu_seconds"][name] = clock() - started
        if method == "guided":
            same = [np.array_equal(pixels[t], a) for t, a in zip(tickets, alone, strict=True)]
            found["images_equal_to_alone"] = sum(same)
    return found


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="emoji-tiny")
    parser.add_argument("--requests", type=int, default=2000, help="of each queue")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--burst", type=int, default=24, help="requests by real calls")
    parser.add_argument("--out", type=Path, default=RESULTS / "serving-emoji.json")
    given = parser.parse_args()
    pipeline = Pipeline.load(given.engine, provider="cpu", threads=1)
    costs = measure(pipeline, given.rounds)
    print({n: round(1e3 * v, 1) for n, v in costs.step.items()}, "ms a call by batch", flush=True)
    real = burst(pipeline, given.burst)
    print(real, flush=True)
    found = {
        "schema": SCHEMA,
        "provenance": provenance(["python", "-m", "benchmarks.serving", *sys.argv[1:]]),
        "engine": pipeline.name,
        "slots": SLOTS,
        "cpu_threads": 1,
        "requests": given.requests,
        "costs_seconds": vars(costs),
        "burst": real,
        "queues": queues(costs, given.requests),
    }
    write_json(given.out, found)
    for mix, held in found["queues"].items():
        print(mix, held["capacity"])
        for load, cell in held["loads"].items():
            for name, each in cell.items():
                print(f"  {load:16} {name:13} {each['latency']} {each['latency_by_steps'].get('8 or fewer')}")


if __name__ == "__main__":
    main()
