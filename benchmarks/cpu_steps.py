"""One model evaluation step on a CPU: guided, unguided and CFG on ONNX Runtime, and diffusers' own CFG, interleaved.

Every round runs each once, and the order rotates.  A CFG step is one call with two batch entries per image.  Ratios are
taken within a round, of wall time and of the process's CPU time, which other load on the machine affects less.

    python -m benchmarks.cpu_steps                                          # the bundled model, batches 1, 4 and 8
    python -m benchmarks.cpu_steps --base random:sd15 --batches 1 --rounds 7 --threads 2

Engines that are not named are built in ``--work``.  At SD 1.5's size the networks take about 20 GiB of memory, or
16 GiB with ``--without diffusers``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pnp_trt.backends.onnxruntime.backend import OrtNetwork
from pnp_trt.bundle.provenance import provenance
from pnp_trt.bundle.store import open_bundle, write_json
from pnp_trt.sampling.network import Network

from .constant_parts import ratio
from .openvino import inputs_of

SCHEMA = "pnp-trt/cpu-steps/1"
RESULTS = Path(__file__).parent / "results"
GUIDED, UNGUIDED, CFG, DIFFUSERS = "guided", "unguided", "CFG", "diffusers CFG"
#: numerator and denominator of each ratio
RATIOS = ((GUIDED, UNGUIDED), (GUIDED, CFG), (CFG, DIFFUSERS), (GUIDED, DIFFUSERS))
Step = Callable[[], np.ndarray]


def engine(name: str | None, base: str, guide: str, work: Path) -> Path:
    """Path of a bundle's U-Net graph. Without a name, the bundle is built in ``work`` unless it exists."""
    if name is None:
        folder = work / f"{base.replace('random:', '')}-{guide}"
        if not folder.is_dir():
            words = ["build", "--base", base, "--guide", guide, "--backend", "onnxruntime", "--out", str(folder)]
            subprocess.run([sys.executable, "-m", "pnp_trt", *words], check=True)
        name = str(folder)
    bundle = open_bundle(name)
    if bundle.guided != (guide != "none"):
        raise SystemExit(f"{name} {'has a' if bundle.guided else 'has no'} guide; use another engine")
    return bundle.file("unet")


def on_onnxruntime(network: Network, rows: int) -> Step:
    """Return a function that makes one call with a batch of ``rows``."""
    inputs = inputs_of(network, rows)

    def step() -> np.ndarray:
        with network.bind(rows) as bound:
            bound.write(**inputs)
            bound.run()
            return bound.output()

    return step


def in_diffusers(base: str, threads: int) -> Callable[[int], Step]:
    """Return the same for diffusers' U-Net in eager PyTorch, float32, given the number of rows."""
    import torch

    from pnp_trt.models.bases import resolve
    from pnp_trt.models.networks import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(threads)
    unet = resolve(base).unet().float().eval().requires_grad_(False)  # random weights are float16
    config = unet.config

    def for_rows(rows: int) -> Step:
        sample = torch.randn(rows, config.in_channels, config.sample_size, config.sample_size)
        timestep, text = torch.full((rows,), 500), torch.randn(rows, 77, config.cross_attention_dim)

        def step() -> np.ndarray:
            with torch.inference_mode():
                values: np.ndarray = unet(sample, timestep, text).sample.numpy()
            return values

        return step

    return for_rows


def measure(steps: dict[str, Step], rounds: int, divided: Sequence[tuple[str, str]] = RATIOS) -> dict[str, Any]:
    """Seconds of each step by round, and the ratios of the pairs in ``divided`` within a round."""
    for step in steps.values():
        if not np.isfinite(step()).all():  # warm-up
            raise SystemExit("a prediction is not finite")
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        for name in order:
            at, used = time.perf_counter(), time.process_time()
            steps[name]()
            wall[name].append(round(time.perf_counter() - at, 6))
            cpu[name].append(round(time.process_time() - used, 6))
        order = [*order[1:], order[0]]
    ratios = {
        f"{a} / {b}": {
            kind: ratio(np.array(times[a]), np.array(times[b])) for kind, times in (("wall", wall), ("cpu", cpu))
        }
        for a, b in divided
        if a in steps and b in steps
    }
    return {"seconds": wall, "cpu_seconds": cpu, "ratios": ratios}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="emoji")
    parser.add_argument("--guided", help="an engine with a guide; default: built")
    parser.add_argument("--plain", help="an engine without a guide; default: built")
    parser.add_argument("--without", action="append", default=[], choices=(GUIDED, UNGUIDED, CFG, "diffusers"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8], help="batch sizes, in images")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/cpu-steps"), help="folder for engines that are built")
    parser.add_argument("--json", type=Path, help="default benchmarks/results/cpu-steps-BASE.json")
    a = parser.parse_args(arguments)
    networks: dict[str, OrtNetwork] = {}
    if GUIDED not in a.without:
        networks[GUIDED] = OrtNetwork(engine(a.guided, a.base, "tiny", a.work), "cpu", a.threads)
    if not {UNGUIDED, CFG} <= set(a.without):
        networks[UNGUIDED] = networks[CFG] = OrtNetwork(engine(a.plain, a.base, "none", a.work), "cpu", a.threads)
    eager = None if "diffusers" in a.without else in_diffusers(a.base, a.threads)
    rows = []
    for batch in a.batches:
        steps = {
            name: on_onnxruntime(networks[name], batch * (2 if name == CFG else 1))
            for name in (GUIDED, UNGUIDED, CFG)
            if name not in a.without
        }
        steps |= {} if eager is None else {DIFFUSERS: eager(2 * batch)}
        rows.append({"batch": batch, **measure(steps, a.rounds)})
        for name, times in rows[-1]["seconds"].items():
            print(f"batch {batch}: {name:14} {1000 * statistics.median(times):10.2f} ms")
        for name, kinds in rows[-1]["ratios"].items():
            shown = (f"{kind} {r['time_ratio']:.4f} {r['interval']}" for kind, r in kinds.items())
            print(f"batch {batch}: {name}: {', '.join(shown)}")
    out = a.json or RESULTS / f"cpu-steps-{a.base.removeprefix('random:')}.json"
    words = ["python", "-m", "benchmarks.cpu_steps", *(sys.argv[1:] if arguments is None else arguments)]
    document = {"schema": SCHEMA, "provenance": provenance(words), "base": a.base, "threads": a.threads, "rows": rows}
    write_json(out, document)
    print(out)


if __name__ == "__main__":
    main()
