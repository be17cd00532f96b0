"""The torch form of the device loop: its arithmetic on the CPU, capture and replay where a GPU is."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pnp_trt import backends
from pnp_trt.backends.base import LoadOptions
from pnp_trt.backends.torch import graph as torch_graph
from pnp_trt.backends.torch import network
from pnp_trt.build.builder import build
from pnp_trt.build.spec import BuildSpec
from pnp_trt.bundle.manifest import Compiled, NetworkParity, NetworkRecord
from pnp_trt.errors import PnpError
from pnp_trt.runtime.pipeline import Pipeline

PROMPTS = ["a cat", "a red house"]


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


@pytest.mark.parametrize("schedule", ["ddim", "dpm++", "euler", "heun", "unipc"])
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
        compiled=Compiled(notes={"mode": "compile"}),
    )  # fmt: skip
    vae = network.TorchNetwork(Path("vae.json"), record, LoadOptions("cuda"), Watched())
    assert vae.run({"latents": torch.ones(1, 4, 8, 8)}).sum() == 2 * 4 * 8 * 8
    assert threads == [threading.current_thread()] and given == [{"triton.cudagraphs": False}]
    loops: Any = backends.get("torch")
    assert loops.device_loops(vae, vae, None, "compiled") is not None


def test_not_finite_is_never_a_picture(bundles: Path) -> None:
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("schedule", ["ddim", "dpm++", "euler", "heun", "unipc"])
@pytest.mark.parametrize(("name", "method"), [("guided", None), ("plain", "cfg")])
def test_captured_pictures_are_the_eager_ones(bundles: Path, schedule: str, name: str, method: str | None) -> None:
    eager, captured = (Pipeline.load(bundles / name, provider="cuda") for _ in range(2))
    assert eager.loops is not None and captured.loops is not None
    eager.loops.capture = False
    for seed in range(4):
        asked: dict[str, Any] = {"steps": 5, "seed": [seed, 9], "guidance": [2.0, 3.0 + seed], "schedule": schedule}
        prompts = [f"a cat {seed}", "a house"]
        for one, other in zip(
            eager(prompts, method=method, **asked), captured(prompts, method=method, **asked), strict=True
        ):
            assert np.array_equal(one.pixels, other.pixels)
    assert (captured.loops.captures, captured.loops.replays) == (1, 3), captured.loops.why_not
    assert eager.loops.captures == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_pictures_are_those_of_compiled_code(bundles: Path, compiled: Path) -> None:
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
