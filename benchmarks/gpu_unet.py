"""Time, memory and energy of models of SD 1.5's and SDXL's size on a GPU, in the product's own loop without a bundle.

The modules are created on the GPU with seeded random weights, because initialising, hashing, writing and reading
gigabytes twice, and parity on the CPU, would take longer than all measurements here.  The code that runs is that of a
bundle of backend ``torch``: ``TorchNetwork``, ``TorchLane`` and ``DeviceLoops``.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MADE = "modules made on the GPU with seeded random weights, and run by the loop that a torch bundle runs; no bundle"
#: steps of a timed loop
STEPS = 20
TOKENS = 77
Say = Callable[[dict[str, Any]], object]
#: method and batch size, the most informative first
CASES = (("guided", 1), ("unguided", 1), ("CFG", 1), ("guided", 4), ("CFG", 4), ("unguided", 4))
SINGLE = CASES[:3]
#: name -> whether weights are channels-last, and whether cuDNN's algorithms are timed in the first run
LAYOUTS = {"NCHW": (False, False), "NHWC": (True, False), "NHWC, searched": (True, True)}


def measure(
    say: Say,
    rounds: int = 5,
    *,
    base: str = "random:sd15",
    target: str = "eager",
    cases: tuple[tuple[str, int], ...] = CASES,
    steps: int = STEPS,
    layouts: tuple[str, ...] = (),
    decode: bool = False,
    precision: str = "fp16",
    provider: str = "cuda",
    energy_seconds: float = 1.5,
    configs: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Measure guided, unguided and CFG loops (CFG with a doubled batch) at several batch sizes.

    Args:
        say: called with all results so far, after each figure.
        rounds: timed runs of each kind; medians are kept.
        base: ``random:sd15`` or ``random:sdxl``.
        target: the backend's target, ``eager`` or ``compile``.
        layouts: names in ``LAYOUTS`` to compare; the fastest is used.  Without any it is ``NHWC``.
        decode: whether to measure a loop that ends with pixels too, in the half precision of the random weights.
        energy_seconds: how long loops of each case of the first batch size are repeated to measure energy.
        configs: network configs that replace the base's own.

    Returns:
        The results. Steps are timed by the GPU's own clock, and whole loops by the host's.
    """
    import torch

    from pnp_trt.backends.torch.network import Convolutions
    from pnp_trt.models.random import random_base

    started = time.perf_counter()
    results: dict[str, Any] = {
        "made": MADE, "base": base, "target": target, "precision": precision, "steps": steps, "cases": {},
    }  # fmt: skip
    random_model = random_base(base)
    models = Models(
        dataclasses.replace(random_model, configs=configs) if configs else random_model, precision, provider
    )
    results["latents"] = [models.channels, *models.size]
    results["make_seconds"] = round(time.perf_counter() - started, 1)
    if models.cuda:
        results["roof_fp16_tflops"] = round(matmul_tflops(torch.float16), 1)
    say(results)
    try:
        results["macs_a_row"] = models.macs()
    except Exception as e:  # times do not need the count
        results["macs_failed"] = _said(e)
    say(results)

    schedule = random_model.scheduler_config()
    times: dict[str, float] = {}
    for name in layouts:
        try:
            case = Case(models, "unguided", 1, steps, schedule, Convolutions(*LAYOUTS[name]), target)
            times[name] = case.step(min(rounds, 2))["ms"]
            case.close()
        except Exception as e:  # the other layouts may still run
            results.setdefault("layouts_failed", {})[name] = _said(e)
        results["unguided_step_ms_by_layout"] = times
        say(results)
    results["layout"] = min(times, key=lambda name: times[name]) if times else "NHWC"
    how = Convolutions(*LAYOUTS[results["layout"]])

    counter, no_counter = _counter()
    results["energy"] = no_counter or "GPU's own counter (NVML) over repeated loops, idle share included"
    for method, batch in cases:
        row: dict[str, Any] = {}
        results["cases"][f"{method}, batch {batch}"] = row
        if models.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            case = Case(models, method, batch, steps, schedule, how, target)
            if target == "compile":
                row["compile"] = case.compile()
                say(results)
            row["step"] = case.step(rounds)
            row |= rates(row)
            if "macs_a_row" in results:
                row |= shares(row, batch * results["macs_a_row"][method], results.get("roof_fp16_tflops"))
            say(results)
            row |= case.loop(rounds)
            row |= overhead(row, steps)
            if models.cuda:
                row["peak_memory_bytes"] = {
                    "tensors": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(),
                }  # fmt: skip
            say(results)
            if counter is not None and batch == cases[0][1]:
                row["joules_per_image"] = case.joules(counter, energy_seconds)
            case.close()
        except Exception as e:  # the next case may still run
            row["failed"] = _said(e)
        say(results)
    if decode:
        try:
            case = Case(models, "guided", 1, steps, schedule, how, target, decode=True)
            results["image"] = case.loop(rounds)
            case.close()
        except Exception as e:
            results["image"] = {"failed": _said(e)}
    results["seconds_inside"] = round(time.perf_counter() - started, 1)
    say(results)
    return results


class Models:
    """The modules on their device: ``student`` and ``teacher`` share one U-Net."""

    def __init__(self, base: Any, precision: str, provider: str) -> None:
        import diffusers
        import torch

        from pnp_trt.backends.torch.network import device
        from pnp_trt.models.guides.tiny import TinyGuide
        from pnp_trt.models.networks import quiet_libraries
        from pnp_trt.models.student import Student, Teacher
        from pnp_trt.models.wrappers import VaeDecoder
        from pnp_trt.precision.recipes import recipe

        quiet_libraries()
        configs = base.configs
        self.precision, self.provider, self.device = precision, provider, device(provider)
        self.cuda = self.device == "cuda"
        dtype = getattr(torch, recipe(precision).dtype)
        with torch.device("meta"):
            self.unet = diffusers.UNet2DConditionModel.from_config(configs["unet"])
            vae = getattr(diffusers, configs["vae"]["_class_name"]).from_config(configs["vae"])
            guide = TinyGuide.from_unet(self.unet)
        for module in (self.unet, vae, guide):
            fill(module, dtype, self.device)
        # trained layers that start at zero stay small; at unit gain their products overflow half precision
        for layer in (guide.film, *(adapter.expand for adapter in guide.adapters)):
            layer.weight.mul_(0.01)
        self.student, self.teacher, self.vae = Student(self.unet, guide), Teacher(self.unet), VaeDecoder(vae)
        self.channels, side = int(configs["unet"]["in_channels"]), int(configs["unet"]["sample_size"])
        self.size = (side, side)
        self.width = int(configs["unet"]["cross_attention_dim"])
        factor = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
        #: further inputs of the family's U-Net for one image, ``[1, …]`` each
        self.added: dict[str, np.ndarray] = {
            name: values.numpy()
            for name, values in base.golden_added(torch.Generator().manual_seed(0), 1, (side * factor,) * 2).items()
        }

    def inputs(self, method: str) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """Types and shapes of the U-Net's inputs, as in a manifest."""
        inputs_of_unet: dict[str, tuple[str, tuple[int | str, ...]]] = {
            "sample": ("float32", ("batch", self.channels, *self.size)),
            "timestep": ("int64", ("batch",)),
            "encoder_hidden_states": ("float32", ("batch", TOKENS, self.width)),
        }
        inputs_of_unet |= {name: ("float32", ("batch", *values.shape[1:])) for name, values in self.added.items()}
        return inputs_of_unet | ({"guidance": ("float32", ("batch",))} if method == "guided" else {})

    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of one row of a batch, counted on meta tensors; attention products included."""
        import torch

        from pnp_trt.bench.measure.cost import count

        counts = {}
        for method, module in (("guided", self.student), ("unguided", self.teacher)):
            rows = {
                name: torch.zeros([1, *(int(d) for d in shape[1:])], dtype=getattr(torch, dtype), device="meta")
                for name, (dtype, shape) in self.inputs(method).items()
            }
            dtype = next(module.parameters()).dtype
            rows = {k: v.to(dtype) if v.is_floating_point() else v for k, v in rows.items()}
            counts[method] = count(module, rows).macs
        return counts | {"CFG": 2 * counts["unguided"]}


class Case:
    """One method at one batch size, with its buffers."""

    def __init__(
        self,
        models: Models,
        method: str,
        batch: int,
        steps: int,
        scheduler: dict[str, Any],
        convolutions: Any,
        target: str = "eager",
        decode: bool = False,
    ) -> None:
        import torch

        from pnp_trt.backends.base import LoadOptions
        from pnp_trt.backends.torch.graph import device_loops
        from pnp_trt.backends.torch.network import TorchNetwork
        from pnp_trt.bundle.manifest import CompileRecord, NetworkParity, NetworkRecord
        from pnp_trt.sampling.device_loop import Feeds, LoopPlan
        from pnp_trt.sampling.schedules import make

        self.target = target
        if models.cuda:  # undo the layout of the previous case
            last = convolutions.channels_last
            models.unet.to(memory_format=torch.channels_last if last else torch.contiguous_format)

        def load(name: str, module: Any, inputs: Any, output: str) -> Any:
            module._forward_hooks.clear()  # hooks of the previous case
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks_with_kwargs.clear()
            record = NetworkRecord(
                graph=f"{name}.json", precision=models.precision, inputs=inputs,
                outputs={output: ("float32", ("batch",))}, parity=NetworkParity(0.0, 0.0, 0),
                compiled=CompileRecord(notes={"mode": target}),
            )  # fmt: skip
            return TorchNetwork(Path(record.graph), record, LoadOptions(models.provider), module, convolutions)

        unet = load(
            "unet", models.student if method == "guided" else models.teacher, models.inputs(method), "prediction"
        )
        latents = {"latents": ("float32", ("batch", models.channels, *models.size))}
        vae = load("vae_decoder", models.vae, latents, "sample")
        if models.cuda and models.precision != "fp32":
            # half-precision products ignore this flag, but cuDNN's plans are cached by it: it separates the plans of a
            # search from those without one
            torch.backends.cudnn.allow_tf32 = convolutions.search
        self.loops = device_loops(unet, vae, None, method)
        twice = method == "CFG"
        random = np.random.default_rng(0)
        start = random.standard_normal((batch, models.channels, *models.size), np.float32)
        rows = 2 * batch if twice else batch
        inputs = {"encoder_hidden_states": random.standard_normal((rows, TOKENS, models.width), np.float32)}
        inputs |= {name: np.repeat(values, rows, 0) for name, values in models.added.items()}
        w = np.full(batch, 3, np.float32)
        self.feeds = Feeds(start, w, inputs | ({"guidance": w} if method == "guided" else {}))
        self.batch = batch
        self.plan = LoopPlan(batch, models.size, make("ddim", scheduler, steps), twice, decode)

    def compile(self) -> dict[str, Any]:
        """Run the first step, in which PyTorch compiles: seconds, and hits and misses of its cache on disk."""
        from torch._dynamo.utils import counters

        counters.clear()
        lane: Any = self.loops._lane(self.plan).lane
        lane.load(self.plan.table, self.feeds)
        lane.begin()
        begun = time.perf_counter()
        lane.step()
        lane.wait()
        return {
            "seconds": round(time.perf_counter() - begun, 2),
            "graphs_from_cache": counters["inductor"]["fxgraph_cache_hit"],
            "graphs_made": counters["inductor"]["fxgraph_cache_miss"],
        }  # fmt: skip

    def loop(self, rounds: int) -> dict[str, Any]:
        """Time whole loops by the host's clock, captured and step by step, and compare their results."""
        out: dict[str, Any] = {}
        results: dict[str, np.ndarray] = {}
        for mode, warm, times in (("step by step", 1, min(rounds, 2)), ("captured", 1, rounds)):
            self.loops.capture = mode == "captured"
            seconds = []
            for number in range(-warm, times):
                begun = time.perf_counter()
                drawn = self.loops.run(self.plan, self.feeds)
                if number >= 0:
                    seconds.append(time.perf_counter() - begun)
            results[mode] = drawn.values
            out[f"loop_ms_{mode.replace(' ', '_')}"] = _ms(seconds)
            bad = bool(drawn.bad_latents.any() or drawn.bad_pixels.any())
        captured, uncaptured = (results[mode].astype(np.float64) for mode in ("captured", "step by step"))
        differences = np.abs(captured - uncaptured)
        return out | {
            "captured": self.loops.captures > 0, "why_not_captured": self.loops.why_not, "finite": not bad,
            "captured_equals_step_by_step": bool(np.array_equal(captured, uncaptured, equal_nan=True)),
            "largest_difference": float(differences.max()) if np.isfinite(differences).all() else None,
        }  # fmt: skip

    def step(self, rounds: int) -> dict[str, Any]:
        """Time one captured step, replayed as often as a loop has steps, by the GPU's clock if there is a GPU."""
        import torch

        lane: Any = self.loops._lane(self.plan).lane
        steps = len(self.plan.table)
        lane.load(self.plan.table, self.feeds)
        lane.begin()
        for _ in range(2):
            lane.step()
        lane.wait()
        why = None
        try:
            graph = lane.capture(lane.step)
        except Exception as e:  # on a CPU, or for operations that cannot be captured
            graph, why = None, _said(e)
        on_gpu, on_host = [], []
        for number in range(-1, rounds):
            lane.load(self.plan.table, self.feeds)
            lane.begin()
            lane.wait()
            if graph is None:
                begun = time.perf_counter()
                for _ in range(steps):
                    lane.step()
                enqueued = time.perf_counter() - begun
                lane.wait()
                spent = time.perf_counter() - begun
            else:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record(lane._stream)
                begun = time.perf_counter()
                for _ in range(steps):
                    lane.replay(graph)
                enqueued = time.perf_counter() - begun
                last.record(lane._stream)
                last.synchronize()
                spent = first.elapsed_time(last) / 1e3
            if number >= 0:
                on_gpu.append(spent / steps)
                on_host.append(enqueued / steps)
        if graph is not None:
            lane.drop(graph)
        return {
            "ms": _ms(on_gpu), "least_ms": round(1e3 * min(on_gpu), 4), "host_launch_ms": _ms(on_host),
            "captured": graph is not None, "why_not_captured": why,
        }  # fmt: skip

    def joules(self, counter: Callable[[], float], seconds: float) -> float | None:
        """Joules per image of a loop from latents to latents."""
        from pnp_trt.bench.measure.energy import joules_per_image

        used = joules_per_image(
            lambda: self.loops.run(self.plan, self.feeds), self.batch, counter, time.perf_counter, seconds
        )
        return None if used is None else round(used, 2)

    def close(self) -> None:
        """Free buffers, graphs and compiled code."""
        self.loops.clear()
        if self.target == "compile":
            import torch

            torch._dynamo.reset()


def rates(row: dict[str, Any]) -> dict[str, Any]:
    """Iterations per second."""
    return {"iterations_a_second": round(1e3 / row["step"]["ms"], 1)}


def overhead(row: dict[str, Any], steps: int) -> dict[str, Any]:
    """Time of the whole loop relative to that of its captured steps, minus one."""
    return {"loop_overhead": round(row["loop_ms_captured"] / (steps * row["step"]["ms"]) - 1, 4)}


def shares(row: dict[str, Any], macs: int, roof_tflops: float | None) -> dict[str, Any]:
    """TFLOP/s of a step of ``macs`` multiply-accumulates, and its share of the measured roof."""
    tflops = 2 * macs / row["step"]["ms"] / 1e9
    return {"tflops": round(tflops, 1)} | ({"share_of_roof": round(tflops / roof_tflops, 3)} if roof_tflops else {})


def fill(module: Any, dtype: Any, device: str) -> None:
    """Fill in seeded weights on the device, as in ``models.random``: unit gain, scales of one, biases of zero."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    for part in module.modules():
        for key, old in list(part.named_parameters(recurse=False)):
            tensor = torch.empty(old.shape, dtype=dtype, device=device)
            if old.ndim < 2:
                tensor.fill_(0.0 if key == "bias" else 1.0)
            else:
                tensor.normal_(std=old[0].numel() ** -0.5, generator=generator)
            part._parameters[key] = torch.nn.Parameter(tensor, requires_grad=False)
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not left, left
    module.eval()


def roof(say: Say) -> dict[str, Any]:
    """Measure the GPU's roof: products of 8192² matrices, and a copy within its memory."""
    import torch

    results: dict[str, Any] = {"device": torch.cuda.get_device_name(0), "torch": torch.__version__}
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        results[f"{name}_matmul_tflops"] = round(matmul_tflops(dtype), 1)
        say(results)
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ms = _event_ms(lambda: target.copy_(source), 10)
    results["copy_gb_per_s"] = round(2 * source.numel() / ms / 1e6, 1)  # bytes read and bytes written
    results["copy_counts"] = "bytes read and bytes written"
    return results


def matmul_tflops(dtype: Any, side: int = 8192) -> float:
    """Best rate over several products of random matrices, by the GPU's clock."""
    import torch

    a, b = (torch.randn(side, side, device="cuda").to(dtype) for _ in range(2))
    out = torch.empty(side, side, device="cuda", dtype=dtype)
    return 2 * side**3 / _event_ms(lambda: torch.mm(a, b, out=out), 10) / 1e9


def _event_ms(work: Callable[[], object], times: int, rounds: int = 5) -> float:
    """Milliseconds of one call, the best of ``rounds`` of ``times`` calls each."""
    import torch

    best = float("inf")
    for _ in range(rounds + 1):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(times):
            work()
        last.record()
        last.synchronize()
        best = min(best, first.elapsed_time(last) / times)
    return best


def _counter() -> tuple[Callable[[], float] | None, str | None]:
    from pnp_trt.bench.measure.energy import nvml_counter

    counter, why = nvml_counter()
    return counter, None if why is None else f"not measured: {why}"


def _said(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"[:300]


def _ms(seconds: list[float]) -> float:
    return round(1e3 * sorted(seconds)[len(seconds) // 2], 4)
