"""The torch form of the device loop: its arithmetic on the CPU, capture and replay where a GPU is."""

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
#: steps and schedules of runs that share a graph
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
    """``guided`` for ``torch.compile``; built without Inductor, whose code is made where the bundle runs."""
    out = bundles / "compiled"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        build(BuildSpec(str(micro_base), str(micro_guide), backend="torch", target="compile", out=out))
    return out


def with_lane(folder: Path) -> Pipeline:
    """A pipeline on the CPU whose loop is the lane's."""
    pipeline = Pipeline.load(folder, provider="cpu")
    assert pipeline.loops is None
    unet: Any = pipeline._unet
    vae: Any = pipeline._vae
    pipeline.loops = torch_graph.device_loops(unet, vae, None, pipeline.name)
    pipeline.loops.capture = False
    return pipeline


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "method"), [("guided", None), ("plain", "cfg")])
def test_the_lane_draws_what_the_host_draws(bundles: Path, schedule: str, name: str, method: str | None) -> None:
    host, lane = Pipeline.load(bundles / name, provider="cpu"), with_lane(bundles / name)
    for seed in (0, 3):
        asked: dict[str, Any] = {"steps": 4, "seed": [seed, 9], "guidance": [2.0, 5.0], "schedule": schedule}
        for one, other in zip(
            host(PROMPTS, method=method, **asked), lane(PROMPTS, method=method, **asked), strict=True
        ):
            assert np.abs(one.pixels.astype(int) - other.pixels).max() <= 1
    text, noise = host.encode(PROMPTS), host.noise([1, 2])
    a, b = (p.denoise(text, noise, steps=4, guidance=3.0, method=method, schedule=schedule) for p in (host, lane))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max())


def test_compiled_modules_run_in_the_lane(bundles: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    host, lane = Pipeline.load(bundles / "guided", provider="cpu"), with_lane(compiled)
    asked: dict[str, Any] = {"steps": 4, "seed": [0, 9], "guidance": [2.0, 5.0]}
    for one, other in zip(host(PROMPTS, **asked), lane(PROMPTS, **asked), strict=True):
        assert np.abs(one.pixels.astype(int) - other.pixels).max() <= 1


def test_on_a_gpu_compiled_code_runs_where_the_loop_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture takes what its own thread puts on its stream, and no CUDA graph within it."""
    threads: list[threading.Thread] = []
    given: list[dict[str, Any]] = []

    class Watched(torch.nn.Module):
        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            threads.append(threading.current_thread())
            return 2 * latents

    def compile(module: Any, **options: Any) -> Any:
        given.append(options["options"])
        return module

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)  # there may be no GPU
    monkeypatch.setattr(network, "device", lambda wanted="auto": "cuda")
    record = NetworkRecord(
        graph="vae.json", precision="fp32", inputs={"latents": ("float32", ("batch", 4, 8, 8))},
        outputs={"sample": ("float32", ("batch",))}, parity=NetworkParity(0.0, 0.0, 0),
        compiled=CompileRecord(notes={"mode": "compile"}),
    )  # fmt: skip
    vae = network.TorchNetwork(Path("vae.json"), record, LoadOptions("cuda"), Watched())
    assert vae.run({"latents": torch.ones(1, 4, 8, 8)}).sum() == 2 * 4 * 8 * 8
    assert threads == [threading.current_thread()] and given == [{"triton.cudagraphs": False}]
    loops: Any = backends.get("torch")
    assert loops.device_loops(vae, vae, None, "compiled") is not None


def test_a_run_reads_nothing_of_the_run_before(bundles: Path) -> None:
    """Its first rows have no step before them, whatever their scales are; and what was not finite is forgotten."""
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


def test_not_finite_is_never_a_image(bundles: Path) -> None:
    lane = with_lane(bundles / "guided")
    vae: Any = lane._vae
    with torch.no_grad():
        list(vae._call.parameters())[-1].fill_(torch.nan)
    with pytest.raises(PnpError, match="the decoded pixels of image 0 are not finite"):
        lane("a cat", steps=2)


def test_without_cuda_graphs_it_says_so_and_goes_on(bundles: Path) -> None:
    lane = with_lane(bundles / "guided")
    assert lane.loops is not None
    lane.loops.capture = True
    first = lane("a cat", steps=2)[0].pixels
    with pytest.warns(UserWarning, match=r"could not be captured .*no CUDA graphs on cpu"):
        assert np.array_equal(lane("a cat", steps=2)[0].pixels, first)


class Recorder(TorchDispatchMode):
    """A CUDA graph on the CPU: operations with the tensors that they were called with, to be made again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.item, torch.ops.aten._local_scalar_dense):
            raise RuntimeError("a value was read back in a capture")
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    def again(self) -> None:
        """Each result goes where the first one went."""
        for func, args, kwargs, made in self.calls:
            for to, found in zip(pytree.tree_leaves(made), pytree.tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(to, torch.Tensor) and to.data_ptr() != found.data_ptr():
                    to.copy_(found)


class RecordedLane(torch_graph.TorchLane):
    """Captures and replays without a GPU."""

    def capture(self, work: Callable[[], None]) -> Recorder:
        held = [value for value in pytree.tree_leaves(vars(self)) if isinstance(value, torch.Tensor)]
        before = [value.clone() for value in held]
        with torch.inference_mode():
            try:
                with Recorder() as graph:
                    work()
            finally:
                for value, was in zip(held, before, strict=True):
                    value.copy_(was)  # a capture runs nothing
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
def test_one_capture_draws_every_schedule_in_any_number_of_steps(bundles: Path, name: str, method: str | None) -> None:
    host = Pipeline.load(bundles / name, provider="cpu")
    lane, loops = recorded(bundles / name)
    for number, (schedule, steps) in enumerate(RUNS):
        asked: dict[str, Any] = {
            "steps": steps, "seed": [number, 9], "guidance": [2.0, 1.0 + number / 2], "schedule": schedule,
            "method": method,
        }  # fmt: skip
        for one, other in zip(host(PROMPTS, **asked), lane(PROMPTS, **asked), strict=True):
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
def test_captured_images_are_the_eager_ones(bundles: Path, name: str, method: str | None) -> None:
    eager, captured = (Pipeline.load(bundles / name, provider="cuda") for _ in range(2))
    assert eager.loops is not None and captured.loops is not None
    eager.loops.capture = False
    for number, (schedule, steps) in enumerate(RUNS):
        asked: dict[str, Any] = {
            "steps": steps, "seed": [number, 9], "guidance": [2.0, 1.0 + number / 2], "schedule": schedule,
            "method": method,
        }  # fmt: skip
        prompts = [f"a cat {number}", "a house"]
        for one, other in zip(eager(prompts, **asked), captured(prompts, **asked), strict=True):
            assert np.array_equal(one.pixels, other.pixels)
    assert (captured.loops.captures, captured.loops.replays) == (1, len(RUNS) - 1), captured.loops.why_not
    assert eager.loops.captures == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_images_are_those_of_compiled_code(bundles: Path, compiled: Path) -> None:
    eager = Pipeline.load(bundles / "guided", provider="cuda")
    plain, captured = (Pipeline.load(compiled, provider="cuda") for _ in range(2))
    assert plain.loops is not None and captured.loops is not None
    plain.loops.capture = False
    for seed in range(3):
        asked: dict[str, Any] = {"steps": 4, "seed": [seed, 9], "guidance": [2.0, 3.0 + seed]}
        pixels = [[p.pixels for p in pipe(PROMPTS, **asked)] for pipe in (eager, plain, captured)]
        assert np.array_equal(pixels[1], pixels[2])
        assert np.abs(np.array(pixels[0], int) - np.array(pixels[1])).max() <= 2
    assert (captured.loops.captures, captured.loops.replays) == (1, 2), captured.loops.why_not


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_steps_are_reported_and_captured_again_after_clear(bundles: Path) -> None:
    pipeline = Pipeline.load(bundles / "guided", provider="cuda")
    loops = pipeline.loops
    assert loops is not None
    asked: dict[str, Any] = {"steps": 4, "seed": 3}
    first = pipeline("a cat", **asked)[0].pixels
    seen: list[int] = []
    for _ in range(2):
        again = pipeline("a cat", **asked, callback=lambda done, _: seen.append(done))[0].pixels
        assert np.array_equal(again, first)
    assert seen == [1, 2, 3, 4] * 2 and (loops.captures, loops.replays) == (1, 2), loops.why_not
    with pytest.raises(Cancelled, match="after 2 of 4"):
        pipeline("a cat", **asked, callback=lambda done, _: done < 2)
    assert np.array_equal(pipeline("a cat", **asked)[0].pixels, first)
    latents = [pipeline.denoise(pipeline.encode(["a cat"]), pipeline.noise([3]), steps=4, guidance=3.0)
               for _ in range(3)]  # fmt: skip
    assert np.array_equal(latents[0], latents[2]) and loops.captures == 1
    unet: Any = pipeline._unet
    with torch.no_grad():
        list(unet._call.parameters())[-1].add_(0.5)
    loops.clear()
    changed = [pipeline("a cat", **asked)[0].pixels for _ in range(2)]
    assert np.array_equal(*changed) and not np.array_equal(changed[0], first)
    assert loops.captures == 2, loops.why_not
