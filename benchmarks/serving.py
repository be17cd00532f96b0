"""Measure the gain of step-level batching in a server, on ONNX Runtime's CPU provider with the bundled model.

Two measurements, in CPU seconds of one thread, which other programs on the machine hardly affect:

- **queues**: as in `pnp-trt bench --only serving`, for two mixes of steps and with two more batching policies:
  `step-buckets` with batches padded to 1, 2, 4, 8, and `step-fifo`, first come first served;
- **a burst** of mixed requests served by real calls, whose images are compared with those generated one at a time.

    python -m benchmarks.serving                # about five minutes on one core
    python -m benchmarks.serving --requests 400 --rounds 5
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pnp_trt.bench.measure import queues, serving
from pnp_trt.bench.measure.serving import PROMPTS
from pnp_trt.bundle.provenance import provenance
from pnp_trt.bundle.store import write_json
from pnp_trt.runtime.pipeline import Pipeline, Prepared
from pnp_trt.sampling.step_loop import SLOTS, Run, Ticket

SCHEMA = "pnp-trt/serving/2"
RESULTS = Path(__file__).parent / "results"
MIXES: dict[str, tuple[int, ...]] = {"8, 20 or 50 steps": (8, 20, 50), "4 to 50 steps": tuple(range(4, 51))}
SCALES = (2.0, 3.0, 5.0, 7.0)
POLICIES: dict[str, queues.Policy] = queues.POLICIES | {
    "step-buckets": lambda costs, requests: queues.by_steps(costs, requests, buckets=(1, 2, 4, 8)),
    "step-fifo": lambda costs, requests: queues.by_steps(costs, requests, ageing=1e9),
}
clock = time.process_time


def mixes(costs: queues.Costs, count: int) -> dict[str, Any]:
    """Capacity and queues for each mix of steps."""
    results: dict[str, Any] = {}
    for mix, steps in MIXES.items():
        capacity = queues.capacity(costs, count, steps, POLICIES)
        results[mix] = {"capacity_per_s": capacity, "queues": queues.rows(costs, count, steps, POLICIES, capacity)}
    return results


def burst(pipeline: Pipeline, count: int) -> dict[str, Any]:
    """Serve requests that all arrive at once, by real calls: CPU seconds by policy, and how many images are equal."""
    draw = np.random.default_rng(3)
    requests = [
        {"prompts": str(draw.choice(PROMPTS)), "steps": int(draw.choice((8, 20, 50))), "seed": i,
         "guidance": float(draw.choice(SCALES))}
        for i in range(count)
    ]  # fmt: skip
    alone: list[np.ndarray] = []
    results: dict[str, Any] = {"requests": count, "cpu_seconds": {}}
    started = clock()
    for each in requests:
        alone.append(pipeline(**each)[0].pixels)
    results["cpu_seconds"]["one"] = clock() - started
    started = clock()
    for steps in sorted({each["steps"] for each in requests}):
        group = [each for each in requests if each["steps"] == steps]
        for k in range(0, len(group), SLOTS):
            part = group[k : k + SLOTS]
            lists = {key: [each[key] for each in part] for key in ("prompts", "seed", "guidance")}
            pipeline(**lists, steps=steps)
    results["cpu_seconds"]["whole"] = clock() - started
    for name, method in (("step", "guided"), ("cfg", "cfg")):
        loop = pipeline.step_loop(SLOTS)
        tickets: list[Ticket] = []
        pixels: dict[Ticket, np.ndarray] = {}
        started = clock()
        for each in requests:
            prepared: Prepared = pipeline.prepare(**each, method=method)
            begin: Callable[[], Run] = lambda p=prepared: pipeline.run(p, 0)  # type: ignore[misc]  # noqa: E731
            tickets.append(loop.submit(begin, len(prepared.table), prepared.rows))
        while loop.waiting or loop.running:
            for ticket in loop.step():
                assert ticket.latents is not None
                pixels[ticket] = pipeline.decode(ticket.latents[None])[0]
        results["cpu_seconds"][name] = clock() - started
        if method == "guided":
            same = [np.array_equal(pixels[t], a) for t, a in zip(tickets, alone, strict=True)]
            results["images_equal_to_alone"] = sum(same)
    return results


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="emoji-tiny")
    parser.add_argument("--requests", type=int, default=2000, help="requests in each queue")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--burst", type=int, default=24, help="requests in the burst")
    parser.add_argument("--out", type=Path, default=RESULTS / "serving-emoji.json")
    options = parser.parse_args()
    pipeline = Pipeline.load(options.engine, provider="cpu", threads=1)
    costs = serving.costs(pipeline, options.rounds, SCALES, clock)
    print({n: round(1e3 * v, 1) for n, v in costs.step.items()}, "ms a call by batch", flush=True)
    real = burst(pipeline, options.burst)
    print(real, flush=True)
    document = {
        "schema": SCHEMA,
        "provenance": provenance(["python", "-m", "benchmarks.serving", *sys.argv[1:]]),
        "engine": pipeline.name,
        "slots": SLOTS,
        "cpu_threads": 1,
        "requests": options.requests,
        "costs_seconds": vars(costs),
        "burst": real,
        "mixes": mixes(costs, options.requests),
    }
    write_json(options.out, document)
    for mix, result in document["mixes"].items():
        print(mix, result["capacity_per_s"])
        for row in result["queues"]:
            print(f"  {row['arrivals']:8} {row['load']:.0%} {row['policy']:13} {row['latency_s']}")


if __name__ == "__main__":
    main()
