"""ONNX Runtime against OpenVINO on the CPU: the same graphs of one bundle, rounds interleaved.

For each batch size, one call of the U-Net, one of the decoder, and the whole loop are timed once per round in both
runtimes, which alternate in going first.  Ratios are taken within a round; the results contain every time.

    python -m benchmarks.openvino                        # the bundled model, one thread
    python -m benchmarks.openvino --engine sd15 --threads 2 --rounds 7 --jobs unet --batches 1 2

Both runtimes keep their networks in memory: an engine of Stable Diffusion 1.5's size takes 12 GB with ``--jobs unet``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pnp_trt.backends.onnxruntime.backend import OrtNetwork
from pnp_trt.backends.openvino.backend import OpenVinoNetwork
from pnp_trt.bundle.provenance import provenance
from pnp_trt.bundle.store import Bundle, open_bundle, write_json
from pnp_trt.sampling.loop import HostLoop
from pnp_trt.sampling.network import Network
from pnp_trt.sampling.schedules import make

SCHEMA = "pnp-trt/openvino/1"
RESULTS = Path(__file__).parent / "results"
RUNTIMES = ("onnxruntime", "openvino")
#: what is timed -> the network that it uses
JOBS = {"unet": "unet", "loop": "unet", "vae_decoder": "vae_decoder"}


def networks(bundle: Bundle, threads: int, names: Iterable[str]) -> dict[str, dict[str, Network]]:
    """Load networks of a bundle in each runtime."""
    names = tuple(dict.fromkeys(names))
    return {
        "onnxruntime": {n: OrtNetwork(bundle.file(n), "cpu", threads) for n in names},
        "openvino": {n: OpenVinoNetwork(bundle.file(n), threads) for n in names},
    }


def inputs_of(network: Network, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs; integer inputs are timesteps."""
    rng = np.random.default_rng(seed)
    inputs = {}
    for name, (dtype, shape) in network.describe().inputs.items():
        full = [batch, *(int(side) for side in shape[1:])]
        inputs[name] = np.full(full, 500, dtype) if dtype == "int64" else rng.standard_normal(full).astype(dtype)
    return inputs | ({"guidance": np.full(batch, 3, np.float32)} if "guidance" in inputs else {})


def work_of(job: str, loaded: dict[str, Network], bundle: Bundle, batch: int, steps: int) -> Callable[[], np.ndarray]:
    """Return the function to be timed; both runtimes must agree on its result."""
    network = loaded[JOBS[job]]
    inputs = inputs_of(network, batch)
    table = make("ddim", bundle.manifest.scheduler, steps)

    def loop() -> np.ndarray:
        with network.bind(batch) as bound:
            bound.write(**inputs)
            return HostLoop(bound, table, inputs["sample"].shape).run(inputs["sample"])

    return loop if job == "loop" else lambda: network(**inputs)


def measure(
    engine: str, batches: Sequence[int], rounds: int, threads: int, steps: int, jobs: Sequence[str]
) -> dict[str, Any]:
    """Time all jobs at all batch sizes; return the record."""
    bundle = open_bundle(engine)
    loaded = networks(bundle, threads, (JOBS[job] for job in jobs))
    rows = []
    for batch in batches:
        for job in jobs:
            work = {runtime: work_of(job, loaded[runtime], bundle, batch, steps) for runtime in RUNTIMES}
            values = {runtime: work[runtime]() for runtime in RUNTIMES}  # warm-up; the results are compared
            seconds: dict[str, list[float]] = {runtime: [] for runtime in RUNTIMES}
            for number in range(rounds):
                for runtime in RUNTIMES if number % 2 else RUNTIMES[::-1]:
                    start = time.perf_counter()
                    work[runtime]()
                    seconds[runtime].append(time.perf_counter() - start)
            ours, theirs = (values[runtime] for runtime in RUNTIMES)
            ratios = [a / b for a, b in zip(seconds["onnxruntime"], seconds["openvino"], strict=True)]
            rows.append(
                {"job": job, "batch": batch, "seconds": seconds, "ratio": statistics.median(ratios),
                 "difference": float(np.abs(ours - theirs).max() / np.abs(ours).max())}
            )  # fmt: skip
    options = {"engine": bundle.name, "threads": threads, "rounds": rounds, "steps": steps}
    return {
        "schema": SCHEMA,
        **options,
        "provenance": provenance(["python", "-m", "benchmarks.openvino", *sys.argv[1:]]),
        "rows": rows,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="emoji-tiny")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path, help="default benchmarks/results/openvino-BASE.json")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    options = parser.parse_args(arguments)
    document = measure(options.engine, options.batches, options.rounds, options.threads, options.steps, options.jobs)
    for row in document["rows"]:
        middle = {name: 1000 * statistics.median(values) for name, values in row["seconds"].items()}
        print(
            f"{row['job']:12} batch {row['batch']}: onnxruntime {middle['onnxruntime']:8.2f} ms, openvino "
            f"{middle['openvino']:8.2f} ms, ratio {row['ratio']:.2f}, difference {row['difference']:.1e}"
        )
    base = document["engine"].partition("-")[0]
    write_json(options.json or RESULTS / f"openvino-{base}.json", document)


if __name__ == "__main__":
    main()
