"""Distillation, calibration, visualisation, benchmarks and peers with SDXL, a few steps each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pnp_trt.bench.measure.peers import load
from pnp_trt.distill.guidance import GuidanceConfig, distill
from pnp_trt.distill.states import StateConfig
from pnp_trt.distill.steps import StepsConfig
from pnp_trt.distill.steps import distill as distill_steps
from pnp_trt.distill.train import TrainConfig
from pnp_trt.models.bases import resolve
from pnp_trt.precision.int8.calibrate import CalibrationConfig, calibrate
from pnp_trt.precision.int8.record import Record
from pnp_trt.runtime.pipeline import Pipeline

from ...bundles import document
from ...conftest import Result
from .conftest import SIZES

TRAIN = TrainConfig(steps=6, batch=4, lr=5e-3, warmup=2, checkpoint_every=3)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red apple\na blue car\nthe yellow house on a hill\n")
    return path


def test_both_stages_of_distillation_run(micro_sdxl: Path, prompts: Path, tmp_path: Path) -> None:
    guide = tmp_path / "guide"
    report = distill(
        GuidanceConfig(
            str(micro_sdxl), prompts, guide, options={"rank": 4, "embed_dim": 8}, grid_steps=4,
            states=StateConfig(count=16, steps=4, batch=4), train=TRAIN,
        )
    )  # fmt: skip
    assert 0 < report["held_out"]["residual"] < 2
    (second,) = distill_steps(
        StepsConfig(str(guide), tmp_path / "steps", base=str(micro_sdxl), prompts=prompts, start=4, to=2,
                    trajectories=8, batch_runs=4, grid=False, train=TRAIN)
    )  # fmt: skip
    assert (second["from"], second["to"]) == (4, 2)
    assert (tmp_path / "steps" / "steps-2" / "diffusion_pytorch_model.safetensors").is_file()


def test_calibration_and_an_int8_engine(
    cli: Callable[..., Result], micro_sdxl: Path, sdxl_guide: Path, prompts: Path, tmp_path: Path
) -> None:
    out, engine = tmp_path / "record.json", tmp_path / "engine"
    calibrate(CalibrationConfig(str(micro_sdxl), str(sdxl_guide), prompts, out, images=1, batch=1, steps=2, probes=0))
    record = Record.read(out)
    assert record.base["sha256"] == resolve(str(micro_sdxl)).fingerprint()["all"]
    assert all(layer.amax["max"] > 0 for layer in record.layers.values())
    done = cli("build", "--base", micro_sdxl, "--guide", sdxl_guide, "--precision", "int8", "--calibration", out,
               "--profile", SIZES, "--out", engine)  # fmt: skip
    assert done.code == 0, done.err
    networks = document(engine)["networks"]
    assert networks["unet"]["int8"]["layers"] == len(record.choices()) > 5 and "int8" not in networks["text_encoder_2"]
    assert cli("verify", engine).code == 0
    done = cli("sample", "a red apple", "--engine", engine, "--steps", 2, "--out", tmp_path / "s")
    assert done.code == 0 and len(list((tmp_path / "s").glob("*.png"))) == 1, done.err


def test_an_rtx_engine_is_compiled(
    cli: Callable[..., Result], micro_sdxl: Path, sdxl_guide: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    done = cli("build", "--base", micro_sdxl, "--guide", sdxl_guide, "--backend", "tensorrt-rtx", "--precision", "fp16",
               "--target", "sm_89", "--profile", "b1", "--out", tmp_path / "rtx")  # fmt: skip
    assert done.code == 0, done.err
    networks = document(tmp_path / "rtx")["networks"]
    assert {n: networks[n]["file"] for n in ("unet", "text_encoder", "text_encoder_2", "vae_decoder")} == {
        n: f"{n}.engine" for n in ("unet", "text_encoder", "text_encoder_2", "vae_decoder")
    }
    assert set(networks["unet"]["inputs"]) >= {"text_embeds", "time_ids", "guidance"}
    assert all((tmp_path / "rtx" / f"{n}.engine").stat().st_size > 10_000 for n in networks)
    assert networks["unet"]["parity"]["graph"] < networks["unet"]["parity"]["limit"]


def test_visualize_writes_figures(
    cli: Callable[..., Result], micro_sdxl: Path, sdxl_guide: Path, tmp_path: Path
) -> None:
    done = cli("visualize", "a cat", "--guide", sdxl_guide, "--base", micro_sdxl, "--steps", 2, "--out", tmp_path)
    assert done.code == 0 and list(tmp_path.glob("*.png")), done.err


def test_cost_counts_both_text_encoders(cli: Callable[..., Result], micro_sdxl: Path, tmp_path: Path) -> None:
    done = cli("bench", "--only", "cost", "--base", micro_sdxl, "--json", tmp_path / "cost.json")
    assert done.code == 0, done.err
    rows = {row["network"]: row for row in json.loads((tmp_path / "cost.json").read_text())["cost"]}
    base = resolve(str(micro_sdxl))
    for name, module in zip(("text-encoder", "text-encoder-2"), map(base.text_encoder, base.text_specs), strict=True):
        assert rows[name]["parameters"] == sum(p.numel() for p in module.parameters())


def test_latency_is_measured_with_and_without_cfg(cli: Callable[..., Result], sdxl_plain: Path, tmp_path: Path) -> None:
    done = cli("bench", "--engine", sdxl_plain, "--only", "latency", "--steps", 1, "--batch", 1, "--rounds", 1,
               "--no-memory", "--no-peers", "--cold-starts", 0, "--json", tmp_path / "bench.json")  # fmt: skip
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / "bench.json").read_text())["latency"]
    assert {row["method"] for row in rows} >= {"cfg", "unguided"}


def test_fidelity_is_that_of_the_bundles_images(
    cli: Callable[..., Result], sdxl_plain: Path, sdxl_guided: Path, prompts: Path, tmp_path: Path
) -> None:
    """The reported PSNR equals that of images generated with both bundles."""
    done = cli("bench", "--engine", sdxl_plain, "--engine", sdxl_guided, "--only", "fidelity", "--steps", 2,
               "--guidance", 3, "--images", 3, "--prompts", prompts, "--json", tmp_path / "bench.json")  # fmt: skip
    assert done.code == 0, done.err
    rows = {row["method"]: row for row in json.loads((tmp_path / "bench.json").read_text())["fidelity"]}
    texts, pixels = prompts.read_text().splitlines(), {}
    for folder, method in ((sdxl_plain, "cfg"), (sdxl_guided, "guided")):
        pipe = Pipeline.load(folder, provider="cpu", threads=1)
        images = pipe(texts, steps=2, guidance=3.0, seed=[0, 1, 2], method=method)
        pixels[method] = np.stack([image.pixels for image in images]).astype(float)
    psnr = 10 * np.log10(255**2 / ((pixels["cfg"] - pixels["guided"]) ** 2).mean((1, 2, 3)))
    assert rows["guided"]["psnr_to_cfg_db"]["value"] == pytest.approx(psnr.mean(), abs=0.2)


def test_a_peer_generates_the_engines_latents(micro_sdxl: Path, sdxl_plain: Path) -> None:
    """The peer is diffusers' pipeline with pooled text and zeros for the empty prompt."""
    pipe, peer = Pipeline.load(sdxl_plain, provider="cpu", threads=1), load("diffusers", str(micro_sdxl))
    noise, prompts = pipe.noise([1, 2]), ["a cat", "a red house"]
    ours = pipe.denoise(pipe.encode(prompts), noise, steps=3, guidance=4.0, method="cfg", schedule="ddim")
    expected = peer.denoise(peer.encode(prompts), noise, steps=3, guidance=4.0, method="diffusers", schedule="ddim")
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
