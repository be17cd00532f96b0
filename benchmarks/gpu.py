"""Measurements that need a GPU: ``make gpu``, or ``python -m benchmarks.gpu``.

Each part runs in a separate process with a time limit.  A failure (a missing package, an engine that the GPU cannot
run, lack of memory) is recorded and the next part runs.  The record is written after each part, and a part that is
stopped at its time limit keeps the results it has printed:

- **roof**: products of fp16 and bf16 matrices, and a copy within the GPU's memory, for comparison with the rest;
- **kernels**: the sampler's own kernels against numpy, bit for bit; a loop of them captured against uncaptured; the
  host's time to launch either; device memory over 300 replays.  Needs only cuda-python;
- **torch-sd15**: SD 1.5's size in float16 (``gpu_unet``), eager: guided, unguided and CFG at batch 1 and 4;
- **torch-sd15-compiled**: the same through ``torch.compile``, with the seconds that each case's compilation took.
  PyTorch caches compiled code in ``TORCHINDUCTOR_CACHE_DIR`` (default: a folder for the user among the temporary
  files), so a second run on the same machine only traces the modules (``graphs_from_cache``);
- **torch-sdxl**: SDXL's size in float16, 1024², eager: guided, unguided and CFG at batch 1.  Latents only: SDXL's
  decoder overflows float16;
- **torch-bundled-fp16**, **torch-bundled-fp32**: engines of backend ``torch`` of the bundled model: captured images
  against those generated step by step, time per step and image of both, of the host's loop, and of CFG on the
  teacher's engine;
- **ort-bundled**: ONNX Runtime's CUDA provider on the bundled model (``gpu_ort``): its images against the CPU's, time,
  and nodes that run on the CPU;
- **trt-bundled**, **trt-sd15**, **rtx-bundled**, **rtx-sd15**: the same on TensorRT and TensorRT-RTX (float16), if
  the package is installed and compiles for the GPU;
- **tests**: the tests marked ``gpu``;
- **torch-sdxl-compiled**: SDXL's size through ``torch.compile``, which takes minutes per case.

The most informative parts for their time come first, so that ``--budget`` leaves out the least informative ones.

Without a GPU the program prints that, and writes nothing.  Results: ``benchmarks/results/gpu-NAME.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCHEMA = "pnp-trt/gpu/3"
ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
PARTS = (
    "roof", "kernels", "torch-sd15", "torch-sd15-compiled", "torch-sdxl", "torch-bundled-fp16", "torch-bundled-fp32",
    "ort-bundled", "trt-bundled", "trt-sd15", "rtx-bundled", "rtx-sd15", "tests", "torch-sdxl-compiled",
)  # fmt: skip
#: a part is not started with fewer seconds left
LEAST = {"ort-bundled": 40.0,
    "torch-sd15": 25.0, "torch-sd15-compiled": 40.0, "torch-sdxl": 25.0, "trt-sd15": 60.0, "rtx-sd15": 60.0,
    "torch-sdxl-compiled": 90.0,
}  # fmt: skip
#: most seconds of a budget that a part may take, so that a slow part leaves time for the next ones
MOST = {"torch-sd15-compiled": 130.0, "torch-sdxl": 75.0}
#: most seconds of one module's tests, also without a budget: first tests without compiled code, then those with it
TEST_SECONDS = {"not compiled": 60.0, "compiled": 180.0}
STEPS = (8, 50)
#: prefix of each JSON that a part's process prints; the last one printed counts
MARK = "RESULT "
Say = Callable[[dict[str, Any]], object]


def gpu_present() -> bool:
    """Whether NVIDIA's driver is installed and reports a GPU; needs no other package."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(library)
        except OSError:
            continue
        count = ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    return False


# ---------------------------------------------------------------------------------------------------- parts


def tests(say: Say = print, limit: float = 600.0) -> dict[str, Any]:
    """The tests marked ``gpu``, one module after the other; a module that cannot be imported does not stop the others.

    Tests with torch.compile take minutes, so they come last.  No module takes more than ``TEST_SECONDS``.
    """
    started = time.monotonic()
    texts = {path: path.read_text("utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py"))}
    marked = {path: text for path, text in texts.items() if re.search(r"^@pytest\.mark\.gpu$", text, re.M)}
    results: dict[str, Any] = {"modules": {}}
    for words, most in TEST_SECONDS.items():
        for path in (path for path, text in marked.items() if words != "compiled" or "compiled" in text):
            name = f"{path.relative_to(ROOT)} ({words})"
            left = min(limit - (time.monotonic() - started), most)
            if left < 5:
                results["modules"][name] = "not run: no time was left"
                continue
            command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "-q", "-rs",
                       "--no-header", "-k", words, str(path)]  # fmt: skip
            try:
                done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=left)
            except subprocess.TimeoutExpired:
                results["modules"][name] = f"stopped after {left:.0f} s"
            else:
                lines = [line for line in done.stdout.strip().splitlines() if line]
                shown = lines[-1:] if done.returncode in (0, 5) else [*lines[-12:], *done.stderr.splitlines()[-3:]]
                results["modules"][name] = {"exit": done.returncode, "said": shown}
            say(results)
    codes = [m["exit"] if isinstance(m, dict) else None for m in results["modules"].values()]
    return results | {"failed": sum(code not in (0, 5) for code in codes)}


def kernels(
    size: tuple[int, int] = (64, 64),
    rounds: int = 30,
    steady: int = 300,
    all_steps: tuple[int, ...] = STEPS,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Measure the device loop with kernels in place of the networks, so that no engines are needed.

    Args:
        size: of the latents.
        rounds: timed runs of each kind.
        steady: number of runs over which growth of GPU memory is measured.
    """
    import numpy as np

    from benchmarks.gpu_kernels import Scaling, check_kernels, scheduler
    from pnp_trt.backends.cuda import Cuda
    from pnp_trt.backends.cuda_graph import KERNELS, device_loops, ptx
    from pnp_trt.sampling.device_loop import Feeds, LoopPlan
    from pnp_trt.sampling.schedules import make

    cuda = Cuda()
    loaded = cuda.kernels(ptx(), KERNELS)
    results: dict[str, Any] = {"equal_to_numpy": check_kernels(cuda, loaded)}
    channels, batch = 3, 2
    unet = Scaling(cuda, loaded, "sample", 0.3, channels)
    vae = Scaling(cuda, loaded, "latents", 0.5, channels)
    start = np.random.default_rng(0).standard_normal((batch, channels, *size), np.float32)
    feeds = Feeds(start, np.full(batch, 3, np.float32), {})
    loops = device_loops(cuda, unet, vae, None, "kernels")  # one capture serves all
    for name in ("ddim", "dpm++", "euler", "heun", "unipc"):
        for steps in all_steps:
            table = make(name, scheduler(), steps)
            plan = LoopPlan(batch, size, table, False, True)
            x: Any = start
            previous: Any = None
            for i in range(len(table)):
                x, previous = table.step(i, x, np.float32(0.3) * table.scaled(i, x), previous)
            expected = np.clip(np.rint((np.float32(0.5) * x + np.float32(1)) * np.float32(127.5)), 0, 255)
            expected = expected.astype(np.uint8).transpose(0, 2, 3, 1)
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
                    equal[mode] &= bool(np.array_equal(drawn.values, expected))
            row: dict[str, Any] = {
                "host_launch_us": {k: _median(v, 1e6) for k, v in launch.items()},
                "image_us": {k: _median(v, 1e6) for k, v in whole.items()},
                "equal_to_numpy": equal, "captures": loops.captures, "why_not": loops.why_not,
            }  # fmt: skip
            results[f"{name}, {steps} steps"] = row
            before = cuda.free_memory()
            for _ in range(steady):
                loops.run(plan, feeds)
            row["memory_growth_bytes"] = before - cuda.free_memory()
            say(results)
    loops.clear()
    return results


def engines(
    backend: str, base: str, precision: str, rounds: int, guide: str = "tiny", say: Say = lambda _: None
) -> dict[str, Any]:
    """Measure a guided engine and its teacher's: captured, step by step, and driven by the host."""
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
                pixels: dict[tuple[str, int], Any] = {}  # of seed 0, by mode and steps
                for number in range(-2, rounds):  # two rounds of warm-up: step by step, then capture
                    for mode in ("captured", "step by step", "host"):
                        if mode != "captured" and not -1 <= number < 2:
                            continue  # slow, and without goals
                        for steps in STEPS:
                            loops.capture = mode == "captured"
                            pipe.loops = None if mode == "host" else loops
                            watched = _watch_lane(loops)
                            begun = time.perf_counter()
                            (drawn,) = pipe(
                                ["a red apple"], steps=steps, guidance=3.0, seed=max(number, 0), method=method
                            )
                            spent = time.perf_counter() - begun
                            if number == 0:
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
                "image_ms": {m: {n: _median(v, 1e3) for n, v in d.items()} for m, d in observed.items()},
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
            say(out)
    guided, teacher = (out[kind]["image_ms"]["captured"] for kind in ("guided", "CFG"))
    few, many = STEPS
    out["guided_times_faster_than_cfg"] = {f"{few} steps against {many}": round(teacher[many] / guided[few], 2)}
    out["guided_over_cfg_per_step"] = round(out["guided"]["step_ms"]["captured"] / out["CFG"]["step_ms"]["captured"], 3)
    return out


def _watch_lane(loops: Any) -> list[float]:
    """Record the seconds that the host spends in each call that enqueues work, for all present and future lanes."""
    seconds: list[float] = []
    opens = getattr(loops, "_opens", loops._open)

    def watch(lane: Any) -> Any:
        for name in ("begin", "step", "end", "replay"):
            method = getattr(type(lane), name)

            def timed(*arguments: Any, method: Any = method, lane: Any = lane) -> None:
                started = time.perf_counter()
                method(lane, *arguments)
                seconds.append(time.perf_counter() - started)

            setattr(lane, name, timed)
        return lane

    loops._opens, loops._open = opens, lambda *arguments: watch(opens(*arguments))
    for entry in loops._lanes.values():
        watch(entry.lane)
    return seconds


@contextmanager
def _device_memory(row: dict[str, Any]) -> Iterator[None]:
    """Record the GPU memory that the block allocates, over all processes, and the peak of PyTorch's tensors."""
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


def run_part(name: str, rounds: int, limit: float, say: Say) -> dict[str, Any]:
    """Run one part in this process."""
    from benchmarks import gpu_ort
    from benchmarks.gpu_unet import LAYOUTS, SINGLE, measure, roof

    def built(backend: str, base: str, precision: str) -> Callable[[], dict[str, Any]]:
        guide = "emoji-tiny" if base == "emoji" else "tiny"
        return lambda: engines(backend, base, precision, rounds, guide, say)

    def sdxl(target: str) -> dict[str, Any]:
        return measure(
            say, min(rounds, 3), base="random:sdxl", target=target, cases=SINGLE, steps=10, energy_seconds=1.0
        )

    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "roof": lambda: roof(say),
        "kernels": lambda: kernels(say=say),
        "torch-sd15": lambda: measure(say, rounds, layouts=tuple(LAYOUTS), decode=True),
        "torch-sd15-compiled": lambda: measure(say, rounds, target="compile", energy_seconds=1.0),
        "torch-sdxl": lambda: sdxl("eager"),
        "torch-sdxl-compiled": lambda: sdxl("compile"),
        "torch-bundled-fp16": built("torch", "emoji", "fp16"),
        "torch-bundled-fp32": built("torch", "emoji", "fp32"),
        "ort-bundled": lambda: gpu_ort.measure(say, rounds),
        "trt-bundled": built("tensorrt", "emoji", "fp16"),
        "trt-sd15": built("tensorrt", "random:sd15", "fp16"),
        "rtx-bundled": built("tensorrt-rtx", "emoji", "fp16"),
        "rtx-sd15": built("tensorrt-rtx", "random:sd15", "fp16"),
        "tests": lambda: tests(say, limit),
    }
    return parts[name]()


def why_not(name: str, sm: str) -> str | None:
    """Reason why a part cannot run on this machine, or None; checked before any work."""
    from pnp_trt.backends.tensorrt.flavour import RTX, TENSORRT

    flavour = {"trt": TENSORRT, "rtx": RTX}.get(name.partition("-")[0])
    needed = {
        "roof": ["torch"],
        "kernels": ["numpy", "cuda.bindings"],
        "tests": ["pytest", "hypothesis", "torch", "diffusers", "transformers"],
    }.get(name, ["torch", "diffusers", "transformers", "safetensors"])
    if name.endswith("-compiled"):
        needed = [*needed, "triton"]
    if name.startswith("ort-"):
        needed = [*needed, "onnxruntime", "onnxscript"]
    if flavour is not None:
        needed = [*needed, flavour.module, "cuda.bindings", "onnxscript"]
        if flavour.targets and sm not in flavour.targets:
            return f"the GPU is {sm}, but {flavour.name} compiles engines for {', '.join(flavour.targets[1:])}"
    if missing := [package for package in needed if not _installed(package)]:
        return f"missing packages: {', '.join(missing)}"
    if name.startswith("ort-"):
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return f"onnxruntime {onnxruntime.__version__} has no CUDA provider; install onnxruntime-gpu"
    return None


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # the package around it is missing
        return False


def in_own_process(name: str, rounds: int, limit: float) -> dict[str, Any]:
    """Run a part in a separate process; return its result, complete or partial, or the reason why there is none."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--rounds", str(rounds), "--limit", str(limit)]
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ, "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        # a separate process group, so that pytest and compilers that it starts are killed with it
        child = subprocess.Popen(
            words, stdout=out, stderr=err, cwd=ROOT, env=environment, start_new_session=os.name != "nt"
        )
        try:
            code: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(child)
        seconds = round(time.monotonic() - started, 1)
        out.seek(0)
        err.seek(0)
        printed, errors = out.read().decode(errors="replace"), err.read().decode(errors="replace").strip().splitlines()
    why = None
    if code is None:
        why = f"it took more than {limit:.0f} s"
    elif code:
        why = f"exit code {code}: {errors[-1] if errors else 'no output on stderr'}"
    for line in reversed(printed.splitlines()):
        if line.startswith(MARK):
            with contextlib.suppress(ValueError):  # a truncated line
                result = {"ran": True, "complete": why is None, "seconds": seconds, **json.loads(line[len(MARK) :])}
                return result if why is None else result | {"why": why, "tail": errors[-15:]}
    return {"ran": False, "why": why or "it printed no result", "seconds": seconds, "tail": errors[-15:]}


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill a part's process and those that it started."""
    if os.name == "nt":
        child.kill()
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that can run; 0 unless this program itself fails."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", action="append", choices=PARTS, help="default: all parts")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each kind")
    parser.add_argument("--limit", type=float, default=900, help="seconds for each part")
    parser.add_argument(
        "--budget", type=float, help="seconds for all parts together; those that no longer fit are not run"
    )
    parser.add_argument("--json", type=Path, help="default benchmarks/results/gpu-NAME.json")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    a = parser.parse_args(arguments)
    if a.part:

        def say(result: dict[str, Any]) -> None:
            print(MARK + json.dumps(result), flush=True)

        say(run_part(a.part, a.rounds, a.limit - 5, say))
        return 0
    if not gpu_present():
        print("no NVIDIA GPU was found: nothing was measured or written")
        return 0
    from benchmarks.gpu_report import goals, table
    from pnp_trt.backends.gpus import present_gpus
    from pnp_trt.bundle.provenance import provenance
    from pnp_trt.bundle.store import write_json

    gpu = present_gpus()[0]
    out = a.json or RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', gpu.name.lower()).strip('-')}.json"
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    # the file's name without its folder, because records contain no paths of the machine
    words = [Path(w).name if w == str(a.json) else w for w in (sys.argv[1:] if arguments is None else arguments)]
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "provenance": provenance(["python", "-m", "benchmarks.gpu", *words], device=gpu.name),
        "gpu": {"name": gpu.name, "sm": gpu.sm},
        "goals": goals({}),
        "parts": {},
    }
    for name in a.only or PARTS:
        left = float("inf") if a.budget is None else a.budget - (time.monotonic() - began)
        reason = why_not(name, gpu.sm)
        if reason is None and left < LEAST.get(name, 8.0):
            reason = f"{max(left, 0):.0f} s of the budget of {a.budget:g} s were left"
        if reason is not None:
            result: dict[str, Any] = {"ran": False, "why": reason, "seconds": 0.0}
        else:
            print(f"{name} …", flush=True)
            most = a.limit if a.budget is None else min(a.limit, MOST.get(name, a.limit))
            result = in_own_process(name, a.rounds, min(most, left))
        document["parts"][name] = result
        document["goals"] = goals(document["parts"])
        state = (
            "done"
            if result.get("complete")
            else ("partly done: " if result["ran"] else "did not run: ") + result["why"]
        )
        print(f"{name}: {state}, {result['seconds']} s", flush=True)
        write_json(out, document)  # results are kept even if the next part fails
    print(table(document))
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
