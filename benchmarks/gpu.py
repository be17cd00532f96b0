"""What a machine with a GPU can show: ``make gpu``, or ``python -m benchmarks.gpu``.

Each part runs in a separate process with a time limit, so that what fails there (a package that is missing, an engine
that the GPU cannot run, memory) is written down and the next part continues; the record is written after each part, and
what a part had found when its time was up is kept:

- **roof**: products of fp16 and bf16 matrices, and a copy in the GPU's memory: what the rest is compared with;
- **kernels**: the sampler's own kernels against numpy, bit for bit; a loop of them captured against uncaptured; the
  host's time to launch either; device memory over 300 replays.  Needs cuda-python alone;
- **torch-sd15**: SD 1.5's size in float16 (``gpu_unet``), eager: guided, unguided and CFG at batch 1 and 4;
- **torch-sd15-compiled**: the same through ``torch.compile``, with the seconds that each case's compilation took.
  PyTorch keeps what it makes in ``TORCHINDUCTOR_CACHE_DIR`` (without it in a folder of the user's beside temporary
  files): a second run on the same machine traces the modules and finds the code there (``graphs_from_cache``);
- **torch-sdxl**: SDXL's size in float16, 1024², eager: guided, unguided and CFG at batch 1.  Latents only: SDXL's
  decoder overflows float16;
- **torch-bundled-fp16**, **torch-bundled-fp32**: engines of backend ``torch`` of the bundled model: images captured
  against step by step, time a step and an image of both, of the host's loop, and of CFG on the teacher's engine;
- **ort-bundled**: ONNX Runtime's CUDA provider on the bundled model (``gpu_ort``): its images against the CPU's, time,
  and nodes that run on the CPU;
- **trt-bundled**, **trt-sd15**, **rtx-bundled**, **rtx-sd15**: the same on TensorRT and TensorRT-RTX (float16), where
  the package is installed and the GPU is one that it compiles for;
- **tests**: those marked ``gpu``;
- **torch-sdxl-compiled**: SDXL's size through ``torch.compile``, which takes minutes a case.

The parts are in the order of what they say for their time, and ``--budget`` ends the last ones first.

Without a GPU it reports that, writes nothing and claims nothing.  Results: ``benchmarks/results/gpu-NAME.json``.
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
#: seconds below which a part is not begun
LEAST = {"ort-bundled": 40.0,
    "torch-sd15": 25.0, "torch-sd15-compiled": 40.0, "torch-sdxl": 25.0, "trt-sd15": 60.0, "rtx-sd15": 60.0,
    "torch-sdxl-compiled": 90.0,
}  # fmt: skip
#: seconds of a budget that a part may take at most, so that a part that is slow leaves time for the next ones
MOST = {"torch-sd15-compiled": 130.0, "torch-sdxl": 75.0}
#: the same for the tests of one module, first those without compiled code, then those with it; budget or none
TEST_SECONDS = {"not compiled": 60.0, "compiled": 180.0}
STEPS = (8, 50)
#: what a part's process prints before its JSON, as often as it knows more; the last one counts
MARK = "RESULT "
Say = Callable[[dict[str, Any]], object]


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


def tests(say: Say = print, limit: float = 600.0) -> dict[str, Any]:
    """The tests marked ``gpu``, one module after the other; a module that cannot be imported stops no other.

    What torch.compile makes takes minutes, so tests of it come last.  No module takes more than ``TEST_SECONDS``.
    """
    started = time.monotonic()
    texts = {path: path.read_text("utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py"))}
    marked = {path: text for path, text in texts.items() if re.search(r"^@pytest\.mark\.gpu$", text, re.M)}
    found: dict[str, Any] = {"modules": {}}
    for words, most in TEST_SECONDS.items():
        for path in (path for path, text in marked.items() if words != "compiled" or "compiled" in text):
            name = f"{path.relative_to(ROOT)} ({words})"
            left = min(limit - (time.monotonic() - started), most)
            if left < 5:
                found["modules"][name] = "not run: no time was left"
                continue
            command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "-q", "-rs",
                       "--no-header", "-k", words, str(path)]  # fmt: skip
            try:
                done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=left)
            except subprocess.TimeoutExpired:
                found["modules"][name] = f"stopped after {left:.0f} s"
            else:
                lines = [line for line in done.stdout.strip().splitlines() if line]
                kept = lines[-1:] if done.returncode in (0, 5) else [*lines[-12:], *done.stderr.splitlines()[-3:]]
                found["modules"][name] = {"exit": done.returncode, "said": kept}
            say(found)
    codes = [m["exit"] if isinstance(m, dict) else None for m in found["modules"].values()]
    return found | {"failed": sum(code not in (0, 5) for code in codes)}


def kernels(
    size: tuple[int, int] = (64, 64),
    rounds: int = 30,
    steady: int = 300,
    all_steps: tuple[int, ...] = STEPS,
    say: Say = lambda _: None,
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
    from pnp_trt.sampling.device_loop import Feeds, LoopPlan
    from pnp_trt.sampling.schedules import make

    cuda = Cuda()
    loaded = cuda.kernels(ptx(), KERNELS)
    found: dict[str, Any] = {"equal_to_numpy": check_kernels(cuda, loaded)}
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
                "image_us": {k: _median(v, 1e6) for k, v in whole.items()},
                "equal_to_numpy": equal, "captures": loops.captures, "why_not": loops.why_not,
            }  # fmt: skip
            found[f"{name}, {steps} steps"] = row
            before = cuda.free_memory()
            for _ in range(steady):
                loops.run(plan, feeds)
            row["memory_growth_bytes"] = before - cuda.free_memory()
            say(found)
    loops.clear()
    return found


def engines(
    backend: str, base: str, precision: str, rounds: int, guide: str = "tiny", say: Say = lambda _: None
) -> dict[str, Any]:
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
                pixels: dict[tuple[str, int], Any] = {}  # of seed 0, drawn by every mode
                for number in range(-2, rounds):  # two rounds of warm-up: step by step, then capture
                    for mode in ("captured", "step by step", "host"):
                        if mode != "captured" and not -1 <= number < 2:
                            continue  # slow, and no goal is set for them
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


def run_part(name: str, rounds: int, limit: float, say: Say) -> dict[str, Any]:
    """One part, in this process."""
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
    """Why a part cannot run here, known before any work; None where nothing speaks against it."""
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
            return f"the GPU is {sm}, and {flavour.name} makes engines for {', '.join(flavour.targets[1:])}"
    if missing := [package for package in needed if not _installed(package)]:
        return f"missing here: {', '.join(missing)}"
    if name.startswith("ort-"):
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return f"onnxruntime {onnxruntime.__version__} has no CUDA provider; onnxruntime-gpu has it"
    return None


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # the package around it is missing
        return False


def in_own_process(name: str, rounds: int, limit: float) -> dict[str, Any]:
    """A part's result, what it had when its time was up, or why there is none."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--rounds", str(rounds), "--limit", str(limit)]
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ, "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        # a group of its own: pytest and compilers below it end with it
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
        printed, said = out.read().decode(errors="replace"), err.read().decode(errors="replace").strip().splitlines()
    why = None
    if code is None:
        why = f"it took more than {limit:.0f} s"
    elif code:
        why = f"exit code {code}: {said[-1] if said else 'it said nothing'}"
    for line in reversed(printed.splitlines()):
        if line.startswith(MARK):
            with contextlib.suppress(ValueError):  # cut short
                found = {"ran": True, "complete": why is None, "seconds": seconds, **json.loads(line[len(MARK) :])}
                return found if why is None else found | {"why": why, "tail": said[-15:]}
    return {"ran": False, "why": why or "it printed no result", "seconds": seconds, "tail": said[-15:]}


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a part's process and those that it started."""
    if os.name == "nt":
        child.kill()
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def main(arguments: list[str] | None = None) -> int:
    """Measure what can be measured; 0 unless this program itself fails."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", action="append", choices=PARTS, help="default: all parts")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each kind")
    parser.add_argument("--limit", type=float, default=900, help="seconds for each part")
    parser.add_argument("--budget", type=float, help="seconds for all; parts that no longer fit are not run")
    parser.add_argument("--json", type=Path, help="default benchmarks/results/gpu-NAME.json")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    a = parser.parse_args(arguments)
    if a.part:

        def say(found: dict[str, Any]) -> None:
            print(MARK + json.dumps(found), flush=True)

        say(run_part(a.part, a.rounds, a.limit - 5, say))
        return 0
    if not gpu_present():
        print("no NVIDIA GPU was found here: nothing was measured, nothing is written, and nothing is claimed")
        return 0
    from benchmarks.gpu_report import goals, table
    from pnp_trt.backends.gpus import present_gpus
    from pnp_trt.bundle.provenance import provenance
    from pnp_trt.bundle.store import write_json

    gpu = present_gpus()[0]
    out = a.json or RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', gpu.name.lower()).strip('-')}.json"
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    # the file's name without its folder: a record has no paths of the machine
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
            found: dict[str, Any] = {"ran": False, "why": reason, "seconds": 0.0}
        else:
            print(f"{name} …", flush=True)
            most = a.limit if a.budget is None else min(a.limit, MOST.get(name, a.limit))
            found = in_own_process(name, a.rounds, min(most, left))
        document["parts"][name] = found
        document["goals"] = goals(document["parts"])
        state = (
            "done" if found.get("complete") else ("partly done: " if found["ran"] else "did not run: ") + found["why"]
        )
        print(f"{name}: {state}, {found['seconds']} s", flush=True)
        write_json(out, document)  # what is measured stays, whatever the next part does
    print(table(document))
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
