"""Peers generate the images of the teacher's CFG engine; those that cannot run are listed with the reason."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from pnp_trt.bench.measure import latency, peers
from pnp_trt.bench.measure.cases import Case
from pnp_trt.bench.measure.footprint import MemoryMeter
from pnp_trt.errors import InputError
from pnp_trt.runtime.pipeline import Pipeline

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def eager(micro_base: Path) -> peers.Peer:
    cases, left_out = peers.available(str(micro_base), kinds=["diffusers"])
    assert left_out == [] and [case.method for case in cases] == ["diffusers"]
    peer = cases[0].pipe
    assert isinstance(peer, peers.Peer)
    return peer


def drawn(pipe: Any, method: str, schedule: str | None) -> np.ndarray:
    context = pipe.encode(["a cat", "a red house"])
    latents = pipe.denoise(context, pipe.noise([3, 4]), steps=5, guidance=4.0, method=method, schedule=schedule)
    return np.asarray(pipe.decode(latents)).astype(int)


@pytest.mark.parametrize("schedule", ["ddim", "dpm++", "euler", "heun", "unipc", "dpm++:trailing", None])
def test_diffusers_generates_the_same_images(eager: peers.Peer, micro_bundles: Path, schedule: str | None) -> None:
    ours = Pipeline.load(micro_bundles / "plain", provider="cpu", threads=1)
    assert eager.base == ours.base and eager.size == ours.size
    mine, theirs = drawn(ours, "cfg", schedule), drawn(eager, "diffusers", schedule)
    assert mine.shape == theirs.shape and np.abs(mine - theirs).max() <= 2
    assert np.abs(mine - drawn(ours, "unguided", schedule)).max() > 8  # the test can tell images apart


def test_a_peer_is_timed_with_the_engine_and_compared_with_its_cfg(eager: peers.Peer, micro_bundles: Path) -> None:
    ours = Pipeline.load(micro_bundles / "plain", provider="cpu", threads=1)
    rows = latency.measure(
        [Case(ours, "cfg"), Case(eager, "diffusers")], batches=(2,), steps=2, rounds=2, warmup=1, prompts=["a"],
        schedule="ddim",
    )  # fmt: skip
    assert rows[1].ratio_reference == "plain/cfg" and rows[1].ratio_to_cfg is not None
    assert rows[0].evaluations == rows[1].evaluations == 4


def test_a_step_of_two_evaluations_counts_as_two(eager: peers.Peer, micro_bundles: Path) -> None:
    ours = Pipeline.load(micro_bundles / "plain", provider="cpu", threads=1)
    counted = [Case(ours, "cfg"), Case(eager, "diffusers"), Case(ours, "unguided"), Case(ours, "cfg-fewer-steps")]
    assert [case.evaluations(5, "heun:trailing") for case in counted] == [18, 18, 9, 6]
    assert [case.evaluations(5, "unipc") for case in counted] == [10, 10, 5, 4]
    low, high = ours.guided_interval()
    inside = sum(low <= t <= high for t in ours.schedule(5, "heun").timesteps)  # rows, of which Heun has 2n - 1
    assert Case(ours, "cfg-interval").evaluations(5, "heun") == 9 + inside


def test_the_compiled_peer_generates_the_same_images(
    micro_base: Path, micro_bundles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The U-Net is captured as one graph; compiling C++ for it would take a minute and test only PyTorch."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled = peers.load("diffusers-compile", str(micro_base))
    ours = Pipeline.load(micro_bundles / "plain", provider="cpu", threads=1)
    assert type(compiled._pipe.unet).__name__ == "OptimizedModule"
    assert np.abs(drawn(ours, "cfg", "ddim") - drawn(compiled, "diffusers-compile", "ddim")).max() <= 2


def test_optimum_is_called_by_its_documented_interface(
    micro_base: Path, micro_bundles: Path, eager: peers.Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a fake optimum.onnxruntime that returns diffusers' pipeline; the real package is not a dependency."""
    arguments: dict[str, Any] = {}

    class ORTStableDiffusionPipeline:
        @classmethod
        def from_pretrained(cls, folder: Path, **options: Any) -> Any:
            arguments.update(options, folder=folder)
            return eager._pipe

    module = ModuleType("optimum.onnxruntime")
    module.ORTStableDiffusionPipeline = ORTStableDiffusionPipeline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "optimum", ModuleType("optimum"))
    monkeypatch.setitem(sys.modules, "optimum.onnxruntime", module)
    peer = peers.load("optimum-onnx", str(micro_base))
    assert arguments["export"] is True and arguments["provider"] == "CPUExecutionProvider"
    assert arguments["folder"] == str(micro_base)
    ours = Pipeline.load(micro_bundles / "plain", provider="cpu", threads=1)
    assert np.abs(drawn(peer, "optimum-onnx", "ddim") - drawn(ours, "cfg", "ddim")).max() <= 2


def test_memory_of_a_peer_is_measured_in_a_separate_process(eager: peers.Peer) -> None:
    meter = MemoryMeter("cpu")
    peak = meter(Case(eager, "diffusers"), batch=1, steps=1)
    assert meter.left_out == [] and peak is not None and peak > 100 * 2**20  # torch alone takes more


def test_peers_that_cannot_run_are_listed_with_the_reason(
    micro_base: Path, micro_sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, left_out = peers.available("random:sd15")
    assert cases == [] and [row["what"] for row in left_out] == list(peers.KINDS)
    assert left_out[0]["why"] == "base 'random:sd15' has no files for it to load"
    _, left_out = peers.available(str(micro_sdxl), kinds=["optimum-onnx"])
    assert "has 2 text encoders, with which it has not been tested" in left_out[0]["why"]
    _, left_out = peers.available(str(micro_base), kinds=["diffusers"], weights="0" * 64)
    assert "are not those in the engines" in left_out[0]["why"]
    for versions, why in (({}, "it is not installed; pip install optimum-onnx"), ({"": "1"}, "is an AutoencoderTiny")):
        monkeypatch.setattr(peers, "installed", lambda names, versions=versions: versions)
        _, left_out = peers.available(str(micro_base), kinds=["optimum-onnx"])
        assert why in left_out[0]["why"]
    monkeypatch.setattr(peers, "_compiler", lambda: None)
    _, left_out = peers.available(str(micro_base), kinds=["diffusers-compile"])
    assert "C++ compiler" in left_out[0]["why"]

    def broken(*_: Any) -> None:
        raise RuntimeError("it is broken\nin many lines")

    monkeypatch.setattr(peers, "_diffusers", broken)
    _, left_out = peers.available(str(micro_base), kinds=["diffusers"])
    assert left_out == [{"what": "diffusers", "why": "it could not be loaded (RuntimeError: it is broken)"}]


def test_bad_requests_are_refused(eager: peers.Peer, micro_base: Path) -> None:
    with pytest.raises(InputError, match="peer is 'comfy'; known: diffusers, diffusers-compile, optimum-onnx"):
        peers.available(str(micro_base), kinds=["comfy"])
    context, noise = eager.encode(["a"]), eager.noise([0])
    with pytest.raises(InputError, match="takes one scale above 1"):
        eager.denoise(context, noise, steps=1, guidance=1.0, method="diffusers")
    with pytest.raises(InputError, match="cannot do 'guided'"):
        eager.denoise(context, noise, steps=1, guidance=2.0, method="guided")
    if not torch.cuda.is_available():
        _, left_out = peers.available(str(micro_base), kinds=["diffusers"], provider="cuda")
        assert "PyTorch finds no GPU" in left_out[0]["why"]
