"""What a machine with a GPU can show: ``make gpu``, or ``python -m benchmarks.gpu``.

Each part runs in a process of its own, so that what fails there (a package that is missing, an engine that the GPU
cannot run, memory) is written down and the next part goes on:

- **tests**: those marked ``gpu``;
- **kernels**: the sampler's own kernels against numpy, bit for bit; a loop of them captured against uncaptured; the
  host's time to launch either; device memory over 300 replays.  Needs cuda-python alone;
- **torch-bundled**, **torch-sd15**: engines of backend ``torch`` of the bundled model (float32), and of SD 1.5's size
  (random weights, float16): pictures captured against step by step, time a step and a picture of both, of the host's
  loop, and of CFG on the teacher's engine; the host's time to launch; memory;
- **rtx-bundled**, **rtx-sd15**: the same on TensorRT-RTX (float16), where the GPU is one that it compiles for.

Where no GPU is, it says so, writes nothing and claims nothing.  Results: ``benchmarks/results/gpu-NAME.json``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCHEMA = "pnp-trt/gpu/1"
RESULTS = Path(__file__).parent / "results"
PARTS = ("tests", "kernels", "torch-bundled", "rtx-bundled", "torch-sd15", "rtx-sd15")
STEPS = (8, 50)
#: what a part's process prints before its JSON
MARK = "RESULT "


def gpu_present() -> bool:
    """Whether NVIDIA's driver is here and finds a GPU; asks the driver alone."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(library)
        except OSError:
            continue
        count = ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    return False


# ---------------------------------------------------------------------------------------------------- parts


def tests() -> dict[str, Any]:
    """The tests marked ``gpu``."""
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "--no-header", "tests"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        raise RuntimeError(" | ".join([*lines[-6:], *done.stderr.strip().splitlines()[-2:]]) or "pytest said nothing")
    return {"summary": lines[-1]}


def kernels(
    size: tuple[int, int] = (64, 64), rounds: int = 30, steady: int = 300, all_steps: tuple[int, ...] = STEPS
) -> dict[str, Any]:
    """The device loop with a network that is a kernel, too: everything but engines.

    Args:
        size: of the latents.
        rounds: timed runs of each kind.
        steady: runs over which the GPU's memory is watched.
    """
    import numpy as np

    from benchmarks.gpu_kernels import Scaling, check_kernels, scheduler
    from pnp_trt.backends.cuda import Cuda
    from pnp_trt.backends.cuda_graph import KERNELS, device_loops, ptx
    from pnp_trt.sampling.device_loop import Feeds, Plan
    from pnp_trt.sampling.schedules import make

    cuda = Cuda()
    loaded = cuda.kernels(ptx(), KERNELS)
    found: dict[str, Any] = {"equal_to_numpy": check_kernels(cuda, loaded)}
    channels, batch = 3, 2
    unet = Scaling(cuda, loaded, "sample", 0.3, channels)
    vae = Scaling(cuda, loaded, "latents", 0.5, channels)
    start = np.random.default_rng(0).standard_normal((batch, channels, *size), np.float32)
    feeds = Feeds(start, np.full(batch, 3, np.float32), {})
    for name in ("ddim", "dpm++", "euler"):
        for steps in all_steps:
            loops = device_loops(cuda, unet, vae, None, "kernels")
            table = make(name, scheduler(), steps)
            plan = Plan(batch, size, table, False, True)
            x: Any = start
            previous: Any = None
            for i in range(steps):
                x, previous = table.step(i, x, np.float32(0.3) * table.scaled(i, x), previous)
            wanted = np.clip(np.rint((np.float32(0.5) * x + np.float32(1)) * np.float32(127.5)), 0, 255)
            wanted = wanted.astype(np.uint8).transpose(0, 2, 3, 1)
            launch: dict[str, list[float]] = {"eager": [], "captured": []}
            whole: dict[str, list[float]] = {"eager": [], "captured": []}
            equal = {"eager": True, "captured": True}
            lane_time = _watch_lane(loops)
            for mode in ("eager", "captured"):
                loops.capture = mode == "captured"
                for number in range(-4, rounds):
                    lane_time.clear()
                    started = time.perf_counter()
                    drawn = loops.run(plan, feeds)
                    if number >= 0:
                        whole[mode].append(time.perf_counter() - started)
                        launch[mode].append(sum(lane_time))
                    equal[mode] &= bool(np.array_equal(drawn.values, wanted))
            row: dict[str, Any] = {
                "host_launch_us": {k: _median(v, 1e6) for k, v in launch.items()},
                "picture_us": {k: _median(v, 1e6) for k, v in whole.items()},
                "equal_to_numpy": equal, "captures": loops.captures, "why_not": loops.why_not,
            }  # fmt: skip
            found[f"{name}, {steps} steps"] = row
            before = cuda.free_memory()
            for _ in range(steady):
                loops.run(plan, feeds)
            row["memory_growth_bytes"] = before - cuda.free_memory()
            loops.clear()
    return found


def engines(backend: str, base: str, precision: str, rounds: int, guide: str = "tiny") -> dict[str, Any]:
    """A guided engine and its teacher's: captured, step by step, and driven by the host."""
    import numpy as np

    from pnp_trt.build.builder import build
    from pnp_trt.build.spec import BuildSpec
    from pnp_trt.runtime import pipeline

    out: dict[str, Any] = {"backend": backend, "base": base, "precision": precision}
    with tempfile.TemporaryDirectory(prefix="pnp-trt-gpu-") as folder:
        for kind, name, method in (("guided", guide, None), ("CFG", "none", "cfg")):
            started = time.perf_counter()
            built = build(BuildSpec(base, name, backend=backend, precision=precision, out=Path(folder) / kind.lower()))
            row: dict[str, Any] = {"build_seconds": round(time.perf_counter() - started, 1)}
            out[kind] = row
            pipe = pipeline.Pipeline.load(built.folder, provider="cuda")
            loops = pipe.loops
            assert loops is not None
            with _device_memory(row):
                observed: dict[str, dict[int, list[float]]] = {}
                launch: dict[str, dict[int, list[float]]] = {}
                pixels: dict[tuple[str, int], Any] = {}
                for number in range(-3, rounds):  # step by step, capture, replay: three rounds of warm-up
                    for mode in ("captured", "step by step", "host"):
                        for steps in STEPS:
                            loops.capture = mode == "captured"
                            pipe.loops = None if mode == "host" else loops
                            watched = _watch_lane(loops)
                            begun = time.perf_counter()
                            (drawn,) = pipe(
                                ["a red apple"], steps=steps, guidance=3.0, seed=max(number, 0), method=method
                            )
                            spent = time.perf_counter() - begun
                            pixels[mode, steps] = drawn.pixels.astype(int)
                            if number >= 0:
                                observed.setdefault(mode, {}).setdefault(steps, []).append(spent)
                                launch.setdefault(mode, {}).setdefault(steps, []).append(sum(watched))
            row |= {
                "captures": loops.captures, "replays": loops.replays, "why_not": loops.why_not,
                "captured_equals_step_by_step": all(
                    np.array_equal(pixels["captured", n], pixels["step by step", n]) for n in STEPS
                ),
                "host_differs_by_levels": max(
                    int(np.abs(pixels["host", n] - pixels["captured", n]).max()) for n in STEPS
                ),
                "picture_ms": {m: {n: _median(v, 1e3) for n, v in d.items()} for m, d in observed.items()},
                "step_ms": {
                    m: round((_median(d[STEPS[1]], 1e3) - _median(d[STEPS[0]], 1e3)) / (STEPS[1] - STEPS[0]), 4)
                    for m, d in observed.items()
                },
                "host_launch_ms": {
                    m: {n: _median(v, 1e3) for n, v in d.items()} for m, d in launch.items() if m != "host"
                },
                "seconds": observed,
            }  # fmt: skip
            loops.clear()
            del pipe
    guided, teacher = (out[kind]["picture_ms"]["captured"] for kind in ("guided", "CFG"))
    few, many = STEPS
    out["guided_times_faster_than_cfg"] = {f"{few} steps against {many}": round(teacher[many] / guided[few], 2)}
    out["guided_over_cfg_per_step"] = round(out["guided"]["step_ms"]["captured"] / out["CFG"]["step_ms"]["captured"], 3)
    return out


def _watch_lane(loops: Any) -> list[float]:
    """Seconds that the host spends putting work on the stream, a number a call; for every lane that is opened."""
    seen: list[float] = []
    opens = getattr(loops, "_opens", loops._open)

    def watch(lane: Any) -> Any:
        for name in ("begin", "step", "end", "replay"):
            whole = getattr(type(lane), name)

            def timed(*arguments: Any, whole: Any = whole, lane: Any = lane) -> None:
                started = time.perf_counter()
                whole(lane, *arguments)
                seen.append(time.perf_counter() - started)

            setattr(lane, name, timed)
        return lane

    loops._opens, loops._open = opens, lambda *arguments: watch(opens(*arguments))
    for held in loops._lanes.values():
        watch(held.lane)
    return seen


@contextmanager
def _device_memory(row: dict[str, Any]) -> Iterator[None]:
    """Bytes of the GPU that the block came to hold, for all processes and for PyTorch's own tensors at the most."""
    from pnp_trt.backends.cuda import Cuda

    cuda = Cuda()
    before = cuda.free_memory()
    yield
    row["memory_bytes"] = {"held": before - cuda.free_memory()}
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        row["memory_bytes"]["torch_peak"] = int(torch.cuda.max_memory_allocated())


def _median(values: list[float], scale: float) -> float:
    return round(sorted(values)[len(values) // 2] * scale, 3)


# --------------------------------------------------------------------------------------------------- running


def run_part(name: str, rounds: int) -> dict[str, Any]:
    """One part, in this process."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "tests": tests,
        "kernels": kernels,
        "torch-bundled": lambda: engines("torch", "emoji", "fp32", rounds, "emoji-tiny"),
        "rtx-bundled": lambda: engines("tensorrt-rtx", "emoji", "fp16", rounds, "emoji-tiny"),
        "torch-sd15": lambda: engines("torch", "random:sd15", "fp16", rounds),
        "rtx-sd15": lambda: engines("tensorrt-rtx", "random:sd15", "fp16", rounds),
    }
    return parts[name]()


def in_own_process(name: str, rounds: int, limit: float) -> dict[str, Any]:
    """A part's result, or why there is none."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--rounds", str(rounds)]
    started = time.perf_counter()
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"ran": False, "why": f"it took more than {limit:g} s", "seconds": limit}
    seconds = round(time.perf_counter() - started, 1)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(MARK):
            return {"ran": True, "seconds": seconds, **json.loads(line[len(MARK) :])}
    said = done.stderr.strip().splitlines()
    why = said[-1] if said else "it said nothing"
    return {"ran": False, "why": f"exit code {done.returncode}: {why}", "seconds": seconds, "tail": said[-15:]}


def main(arguments: list[str] | None = None) -> int:
    """Measure what can be measured; 0 unless this program itself fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", action="append", choices=PARTS, help="default: all parts")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--limit", type=float, default=900, help="seconds for each part")
    parser.add_argument("--json", type=Path, help="default benchmarks/results/gpu-NAME.json")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    a = parser.parse_args(arguments)
    if a.part:
        print(MARK + json.dumps(run_part(a.part, a.rounds)))
        return 0
    if not gpu_present():
        print("no NVIDIA GPU was found here: nothing was measured, nothing is written, and nothing is claimed")
        return 0
    from pnp_trt.backends.gpus import present_gpus
    from pnp_trt.bundle.provenance import provenance
    from pnp_trt.bundle.store import write_json

    gpu = present_gpus()[0]
    out = a.json or RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', gpu.name.lower()).strip('-')}.json"
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "provenance": provenance(["python", "-m", "benchmarks.gpu", *(arguments or sys.argv[1:])], device=gpu.name),
        "gpu": {"name": gpu.name, "sm": gpu.sm},
        "parts": {},
    }
    for name in a.only or PARTS:
        print(f"{name} …", flush=True)
        found = document["parts"][name] = in_own_process(name, a.rounds, a.limit)
        print(f"{name}: {'done' if found['ran'] else 'did not run: ' + found['why']}, {found['seconds']} s", flush=True)
        write_json(out, document)  # what is measured stays, whatever the next part does
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
