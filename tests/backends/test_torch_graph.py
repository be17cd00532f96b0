"""The device loop in PyTorch: its arithmetic on the CPU, and capture and replay on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pnp_trt import backends
from pnp_trt.backends.base import LoadOptions
from pnp_trt.backends.torch import graph as torch_graph
from pnp_trt.backends.torch import network
from pnp_trt.build.builder import build
from pnp_trt.build.spec import BuildSpec
from pnp_trt.bundle.manifest import CompileRecord, NetworkParity, NetworkRecord
from pnp_trt.errors import Cancelled, PnpError
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.sampling.device_loop import DeviceLoops
from pnp_trt.sampling.table import make_table

PROMPTS = ["a cat", "a red house"]
SCHEDULES = ["ddim", "dpm++", "euler", "heun", "unipc"]
#: schedules and numbers of steps of runs that share a graph
RUNS = [(schedule, steps) for steps in (3, 1) for schedule in SCHEDULES]


@pytest.fixture(scope="module")
def bundles(micro_base: Path, micro_guide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eager float32 bundles, ``guided`` and ``plain``; do not write into them."""
    home = tmp_path_factory.mktemp("torch-graph")
    build(BuildSpec(str(micro_base), str(micro_guide), backend="torch", out=home / "guided"))
    build(BuildSpec(str(micro_base), "none", backend="torch", out=home / "plain"))
    return home


@pytest.fixture(scope="module")
def compiled(bundles: Path, micro_base: Path, micro_guide: Path) -> Path:
    """``guided`` for ``torch.compile``; built without Inductor, which compiles where the bundle runs."""
    out = bundles / "compiled"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        build(BuildSpec(str(micro_base), str(micro_guide), backend="torch", target="compile", out=out))
    return out


def with_lane(folder: Path) -> Pipeline:
    """Return a pipeline on the CPU that samples with the device loop, without capture."""
    pipeline = Pipeline.load(folder, provider="cpu")
    assert pipeline.loops is None
    unet: Any = pipeline._unet
    vae: Any = pipeline._vae
    pipeline.loops = torch_graph.device_loops(unet, vae, None, pipeline.name)
    pipeline.loops.capture = False
    return pipeline


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "method"), [("guided", None), ("plain", "cfg")])
def test_the_lanes_images_equal_the_hosts(bundles: Path, schedule: str, name: str, method: str | None) -> None:
    host, lane = Pipeline.load(bundles / name, provider="cpu"), with_lane(bundles / name)
    for seed in (0, 3):
        request: dict[str, Any] = {"steps": 4, "seed": [seed, 9], "guidance": [2.0, 5.0], "schedule": schedule}
        for one, other in zip(
            host(PROMPTS, method=method, **request), lane(PROMPTS, method=method, **request), strict=True
        ):
            assert np.abs(one.pixels.astype(int) - other.pixels).max() <= 1
    text, noise = host.encode(PROMPTS), host.noise([1, 2])
    a, b = (p.denoise(text, noise, steps=4, guidance=3.0, method=method, schedule=schedule) for p in (host, lane))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max())


def test_compiled_modules_run_in_the_lane(bundles: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    host, lane = Pipeline.load(bundles / "guided", provider="cpu"), with_lane(compiled)
    request: dict[str, Any] = {"steps": 4, "seed": [0, 9], "guidance": [2.0, 5.0]}
    for one, other in zip(host(PROMPTS, **request), lane(PROMPTS, **request), strict=True):
        assert np.abs(one.pixels.astype(int) - other.pixels).max() <= 1


def test_on_a_gpu_compiled_code_runs_in_the_capturing_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture records only the work of its own thread, and cannot contain another CUDA graph."""
    threads: list[threading.Thread] = []
    compile_options: list[dict[str, Any]] = []

    class Watched(torch.nn.Module):
        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            threads.append(threading.current_thread())
            return 2 * latents

    def compile(module: Any, **options: Any) -> Any:
        compile_options.append(options["options"])
        return module

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)  # there may be no GPU
    monkeypatch.setattr(network, "device", lambda provider="auto": "cuda")
    record = NetworkRecord(
        graph="vae.json", precision="fp32", inputs={"latents": ("float32", ("batch", 4, 8, 8))},
        outputs={"sample": ("float32", ("batch",))}, parity=NetworkParity(0.0, 0.0, 0),
        compiled=CompileRecord(notes={"mode": "compile"}),
    )  # fmt: skip
    vae = network.TorchNetwork(Path("vae.json"), record, LoadOptions("cuda"), Watched())
    assert vae.run({"latents": torch.ones(1, 4, 8, 8)}).sum() == 2 * 4 * 8 * 8
    assert threads == [threading.current_thread()] and compile_options == [{"triton.cudagraphs": False}]
    loops: Any = backends.get("torch")
    assert loops.device_loops(vae, vae, None, "compiled") is not None


def test_a_run_is_independent_of_the_previous_run(bundles: Path) -> None:
    """The first rows have no previous step, so their scales for it have no effect; nor has NaN in an earlier run."""
    host, lane = Pipeline.load(bundles / "guided", provider="cpu"), with_lane(bundles / "guided")
    ones = np.ones(4, np.float32)
    table = make_table(
        "test", np.array([900, 600, 300, 1]), x_scale=0.9 * ones, output_scale=-0.1 * ones, previous_scale=0.5 * ones,
        older_scale=0.25 * ones, data_x=ones, data_output=-ones, image_scale=ones, noise_scale=ones,
    )  # fmt: skip
    text, noise = host.encode(["a cat"]), host.noise([1])
    for start in (noise, np.full_like(noise, np.nan), noise):
        a, b = (p.denoise(text, start, steps=4, guidance=3.0, schedule=table) for p in (host, lane))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max())


def test_values_that_are_not_finite_raise_an_error(bundles: Path) -> None:
    lane = with_lane(bundles / "guided")
    vae: Any = lane._vae
    with torch.no_grad():
        list(vae._call.parameters())[-1].fill_(torch.nan)
    with pytest.raises(PnpError, match="the decoded pixels of image 0 are not finite"):
        lane("a cat", steps=2)


def test_without_cuda_graphs_it_warns_and_continues(bundles: Path) -> None:
    lane = with_lane(bundles / "guided")
    assert lane.loops is not None
    lane.loops.capture = True
    first = lane("a cat", steps=2)[0].pixels
    with pytest.warns(UserWarning, match=r"could not be captured .*no CUDA graphs on cpu"):
        assert np.array_equal(lane("a cat", steps=2)[0].pixels, first)


class Recorder(TorchDispatchMode):
    """A substitute for a CUDA graph on the CPU: it records operations with their tensors, and can repeat them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.item, torch.ops.aten._local_scalar_dense):
            raise RuntimeError("a value was read back in a capture")
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output

    def again(self) -> None:
        """Repeat each operation, and write its outputs into the recorded outputs."""
        for func, args, kwargs, outputs in self.calls:
            for target, output in zip(
                pytree.tree_leaves(outputs), pytree.tree_leaves(func(*args, **kwargs)), strict=True
            ):
                if isinstance(target, torch.Tensor) and target.data_ptr() != output.data_ptr():
                    target.copy_(output)


class RecordedLane(torch_graph.TorchLane):
    """Captures and replays without a GPU."""

    def capture(self, work: Callable[[], None]) -> Recorder:
        tensors = [value for value in pytree.tree_leaves(vars(self)) if isinstance(value, torch.Tensor)]
        before = [value.clone() for value in tensors]
        with torch.inference_mode():
            try:
                with Recorder() as graph:
                    work()
            finally:
                for value, saved in zip(tensors, before, strict=True):
                    value.copy_(saved)  # a real capture does not run the work
        return graph

    def replay(self, graph: Recorder) -> None:
        with torch.inference_mode():
            graph.again()

    def drop(self, graph: Recorder) -> None:
        graph.calls.clear()


def recorded(folder: Path) -> tuple[Pipeline, DeviceLoops]:
    pipeline = with_lane(folder)
    unet: Any = pipeline._unet
    vae: Any = pipeline._vae
    pipeline.loops = loops = DeviceLoops(lambda shape: RecordedLane(unet, vae, None, shape), pipeline.name)
    return pipeline, loops


@pytest.mark.parametrize(("name", "method"), [("guided", None), ("plain", "cfg")])
def test_one_capture_serves_every_schedule_and_number_of_steps(bundles: Path, name: str, method: str | None) -> None:
    host = Pipeline.load(bundles / name, provider="cpu")
    lane, loops = recorded(bundles / name)
    for number, (schedule, steps) in enumerate(RUNS):
        request: dict[str, Any] = {
            "steps": steps, "seed": [number, 9], "guidance": [2.0, 1.0 + number / 2], "schedule": schedule,
            "method": method,
        }  # fmt: skip
        for one, other in zip(host(PROMPTS, **request), lane(PROMPTS, **request), strict=True):
            assert np.abs(one.pixels.astype(int) - other.pixels).max() <= 1
    assert (loops.captures, loops.replays, loops.why_not) == (1, len(RUNS) - 1, None)


def test_a_step_that_reads_a_value_back_is_not_captured(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lane, loops = recorded(bundles / "guided")
    step = RecordedLane.step
    monkeypatch.setattr(RecordedLane, "step", lambda self: (step(self), self._row[0].item()))
    first = lane("a cat", steps=2)[0].pixels
    with pytest.warns(UserWarning, match=r"could not be captured .*a value was read back"):
        assert np.array_equal(lane("a cat", steps=2)[0].pixels, first)
    assert loops.captures == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "method"), [("guided", None), ("plain", "cfg")])
def test_captured_images_equal_the_eager_ones(bundles: Path, name: str, method: str | None) -> None:
    eager, captured = (Pipeline.load(bundles / name, provider="cuda") for _ in range(2))
    assert eager.loops is not None and captured.loops is not None
    eager.loops.capture = False
    for number, (schedule, steps) in enumerate(RUNS):
        request: dict[str, Any] = {
            "steps": steps, "seed": [number, 9], "guidance": [2.0, 1.0 + number / 2], "schedule": schedule,
            "method": method,
        }  # fmt: skip
        prompts = [f"a cat {number}", "a house"]
        for one, other in zip(eager(prompts, **request), captured(prompts, **request), strict=True):
            assert np.array_equal(one.pixels, other.pixels)
    assert (captured.loops.captures, captured.loops.replays) == (1, len(RUNS) - 1), captured.loops.why_not
    assert eager.loops.captures == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_images_equal_those_of_compiled_code(bundles: Path, compiled: Path) -> None:
    eager = Pipeline.load(bundles / "guided", provider="cuda")
    plain, captured = (Pipeline.load(compiled, provider="cuda") for _ in range(2))
    assert plain.loops is not None and captured.loops is not None
    plain.loops.capture = False
    for seed in range(3):
        request: dict[str, Any] = {"steps": 4, "seed": [seed, 9], "guidance": [2.0, 3.0 + seed]}
        pixels = [[p.pixels for p in pipe(PROMPTS, **request)] for pipe in (eager, plain, captured)]
        assert np.array_equal(pixels[1], pixels[2])
        assert np.abs(np.array(pixels[0], int) - np.array(pixels[1])).max() <= 2
    assert (captured.loops.captures, captured.loops.replays) == (1, 2), captured.loops.why_not


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_steps_are_reported_and_captured_again_after_clear(bundles: Path) -> None:
    pipeline = Pipeline.load(bundles / "guided", provider="cuda")
    loops = pipeline.loops
    assert loops is not None
    request: dict[str, Any] = {"steps": 4, "seed": 3}
    first = pipeline("a cat", **request)[0].pixels
    seen: list[int] = []
    for _ in range(2):
        again = pipeline("a cat", **request, callback=lambda done, _: seen.append(done))[0].pixels
        assert np.array_equal(again, first)
    assert seen == [1, 2, 3, 4] * 2 and (loops.captures, loops.replays) == (1, 2), loops.why_not
    with pytest.raises(Cancelled, match="after 2 of 4"):
        pipeline("a cat", **request, callback=lambda done, _: done < 2)
    assert np.array_equal(pipeline("a cat", **request)[0].pixels, first)
    latents = [pipeline.denoise(pipeline.encode(["a cat"]), pipeline.noise([3]), steps=4, guidance=3.0)
               for _ in range(3)]  # fmt: skip
    assert np.array_equal(latents[0], latents[2]) and loops.captures == 1
    unet: Any = pipeline._unet
    with torch.no_grad():
        list(unet._call.parameters())[-1].add_(0.5)
    loops.clear()
    changed = [pipeline("a cat", **request)[0].pixels for _ in range(2)]
    assert np.array_equal(*changed) and not np.array_equal(changed[0], first)
    assert loops.captures == 2, loops.why_not
