"""The torch form of the device loop: its arithmetic on the CPU, capture and replay where a GPU is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pnp_trt.backends.torch import graph as torch_graph
from pnp_trt.build.builder import build
from pnp_trt.build.spec import BuildSpec
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
