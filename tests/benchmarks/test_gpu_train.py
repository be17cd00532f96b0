"""The GPU recipe on a CPU: its pieces against transformers, diffusers and linear algebra, and one small run."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.emoji import gpu_train
from benchmarks.emoji.train import scheduler_config
from pnp_trt.assets import ROOT as ASSETS
from pnp_trt.models.guides.tiny import TinyGuide


def test_text_states_are_those_of_transformers() -> None:
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(ASSETS / "emoji/text_encoder").float().eval()
    ids = torch.randint(0, 49_000, (3, 77), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(gpu_train.text_states(encoder, ids), encoder(ids)[0], atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_orthogonalized_matrices_keep_their_singular_vectors(shape: tuple[int, int]) -> None:
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    made = gpu_train.orthogonalized(x).double()
    # in the basis of x's own singular vectors the result is nearly diagonal, with values near one
    core = u.mT @ made @ vh.mT
    diagonal = torch.diagonal(core, dim1=-2, dim2=-1)
    assert (diagonal > 0.5).all() and (diagonal < 1.3).all()
    assert (core - torch.diag_embed(diagonal)).abs().max() < 0.05  # bfloat16 products


def test_muon_moves_a_matrix_by_the_rate_and_leaves_vectors_to_adamw() -> None:
    layer = torch.nn.Linear(32, 16)
    before = layer.weight.detach().clone()
    rate = torch.tensor(0.01)
    optimizer = gpu_train.MuonAdamW(layer, rate, weight_decay=0.0)
    assert [p.shape for p in optimizer.parameters()] == [(16, 32), (16,)]
    layer(torch.randn(8, 32)).square().mean().backward()
    optimizer.step()
    moved = layer.weight.detach() - before
    # a matrix with singular values near one has root mean square 1/sqrt(max(shape)); 0.2 of it remains
    assert moved.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.35)


def fake_data(device: str = "cpu") -> SimpleNamespace:
    generator = torch.Generator().manual_seed(2)
    return SimpleNamespace(latents=torch.randn(3, 2, 8, 16, 16, generator=generator))


def test_trajectories_are_those_of_diffusers() -> None:
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    states = gpu_train.GuideStates(fake_data(), torch.zeros(4, 77, 8), torch.zeros(3, 77, 8), batch=8, own=0.0)
    row, count = 2, gpu_train.GuideStates.COUNTS[2]
    states.row.fill_(row)
    scheduler = DDIMScheduler(**scheduler_config())
    scheduler.set_timesteps(count)
    x = states.x.clone()
    for i, t in enumerate(scheduler.timesteps[:-1]):
        assert (states.times[states.row, states.k] == t).all()
        prediction = torch.randn_like(x)
        x = scheduler.step(prediction, t, x).prev_sample
        whole = torch.cat([torch.zeros_like(x), prediction])
        states.advance(whole, torch.full_like(whole, float("nan")))
        assert (states.k == i + 1).all()
        assert torch.allclose(states.x, x, atol=2e-4 * x.abs().max().item())
    states.advance(torch.zeros_like(whole), torch.zeros_like(whole))
    assert (states.k == 0).all()  # all of them begin anew


def test_own_trajectories_follow_the_student() -> None:
    torch.manual_seed(0)
    states = gpu_train.GuideStates(fake_data(), torch.zeros(4, 77, 8), torch.zeros(3, 77, 8), batch=8, own=1.0)
    begun = states.x.clone()
    student, teacher = torch.zeros(8, 8, 16, 16), torch.full((8, 8, 16, 16), 100.0)
    states.advance(teacher, student)
    a, b = states.abar[states.times[states.row, 0]], states.abar[states.times[states.row, 1]]
    assert torch.allclose(states.x, (b / a).sqrt()[:, None, None, None] * begun, rtol=1e-5)


def test_a_whole_run_writes_what_unpack_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    held = {"empty": rng.integers(0, 49_000, (1, 77)).astype(np.uint16)}
    held["prompts"] = rng.integers(0, 49_000, (4, 77)).astype(np.uint16)
    for name, variants in (("base", 5), ("flat", 2), ("3d", 2)):
        held[f"{name}.pixels"] = rng.integers(0, 255, (2, variants, 64, 64, 3)).astype(np.uint8)
        held[f"{name}.ids"] = rng.integers(0, 49_000, (2, gpu_train.CAPTION_FORMS, 77)).astype(np.uint16)
    np.savez(tmp_path / "pack.npz", **held)
    monkeypatch.setattr(gpu_train, "sample_grid", lambda *a, **k: None)
    monkeypatch.setattr(gpu_train, "CPU_STEPS", 1)
    monkeypatch.setattr("sys.argv", ["gpu_train", "train"])
    gpu_train.main(
        ["train", "--data", str(tmp_path / "pack.npz"), "--out", str(tmp_path / "out"), "--batch", "2",
         "--assets", str(ASSETS)]
    )  # fmt: skip
    report = json.loads((tmp_path / "out/train.json").read_text())
    assert set(report["parts"]) == {"base", "decoder", "guide tiny", "flat", "3d"}
    assert all(p["steps"] == 1 and not p["captured"] for p in report["parts"].values())
    wanted = set(load_file(ASSETS / "emoji/unet/diffusion_pytorch_model.safetensors"))
    made = load_file(tmp_path / "out/unet.safetensors")
    assert set(made) == wanted and all(v.dtype == torch.float16 and v.isfinite().all() for v in made.values())

    assets = tmp_path / "assets"
    for name in ("emoji", "fine-tunes"):
        shutil.copytree(ASSETS / name, assets / name)
    gpu_train.main(
        ["unpack", "--from", str(tmp_path / "out"), "--assets", str(assets), "--results", str(tmp_path / "r.json")]
    )
    for path, trained in (
        ("emoji/unet/diffusion_pytorch_model.safetensors", "unet"), ("fine-tunes/emoji-flat.safetensors", "flat"),
    ):  # fmt: skip
        placed, source = load_file(assets / path), load_file(tmp_path / f"out/{trained}.safetensors")
        assert all(torch.equal(placed[k], source[k]) for k in source) and set(placed) == set(source)
    folder = assets / "guides/emoji-tiny"
    record = json.loads((folder / "distill.json").read_text())
    unet = hashlib.sha256((assets / "emoji/unet/diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    assert record["teacher"]["unet"] == unet
    guide = TinyGuide.from_pretrained(folder)
    source = load_file(tmp_path / "out/guide-tiny.safetensors")
    assert guide.config.text and all(torch.equal(v, source[k]) for k, v in guide.state_dict().items())


def test_caption_forms_name_the_image_in_each_way() -> None:
    assert gpu_train.caption_forms("alien", "noto") == [
        "alien, noto style", "alien", "an alien, noto style", "an alien", "the alien, noto style", "the alien",
    ]  # fmt: skip
    assert sum(gpu_train.FORM_SHARES) == pytest.approx(1.0) and len(gpu_train.FORM_SHARES) == gpu_train.CAPTION_FORMS
