"""The GPU training on a CPU: its parts against transformers, diffusers and linear algebra, and small runs."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.emoji import gpu_steps, gpu_train
from benchmarks.emoji.train import scheduler_config
from pnp_trt.assets import ROOT as ASSETS
from pnp_trt.build.swap.lora import LayerNames, Lora, load, merge
from pnp_trt.models.bases import resolve
from pnp_trt.models.guides.load import load_guide
from pnp_trt.models.guides.tiny import TinyGuide


def test_text_states_equal_transformers() -> None:
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(ASSETS / "emoji/text_encoder").float().eval()
    ids = torch.randint(0, 49_000, (3, 77), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(gpu_train.text_states(encoder, ids), encoder(ids)[0], atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_orthogonalized_matrices_keep_their_singular_vectors(shape: tuple[int, int]) -> None:
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    result = gpu_train.orthogonalized(x).double()
    # in the basis of x's own singular vectors the result is nearly diagonal, with values near one
    core = u.mT @ result @ vh.mT
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


def test_trajectories_equal_diffusers() -> None:
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
    assert (states.k == 0).all()  # all trajectories start again


def test_own_trajectories_follow_the_student() -> None:
    torch.manual_seed(0)
    states = gpu_train.GuideStates(fake_data(), torch.zeros(4, 77, 8), torch.zeros(3, 77, 8), batch=8, own=1.0)
    start = states.x.clone()
    student, teacher = torch.zeros(8, 8, 16, 16), torch.full((8, 8, 16, 16), 100.0)
    states.advance(teacher, student)
    a, b = states.abar[states.times[states.row, 0]], states.abar[states.times[states.row, 1]]
    assert torch.allclose(states.x, (b / a).sqrt()[:, None, None, None] * start, rtol=1e-5)


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random training data; each part runs one optimizer step and no images are sampled."""
    rng = np.random.default_rng(0)
    arrays = {"empty": rng.integers(0, 49_000, (1, 77)).astype(np.uint16)}
    arrays["prompts"] = rng.integers(0, 49_000, (4, 77)).astype(np.uint16)
    for name, variants in (("base", 5), ("flat", 2), ("3d", 2)):
        arrays[f"{name}.pixels"] = rng.integers(0, 255, (2, variants, 64, 64, 3)).astype(np.uint8)
        arrays[f"{name}.ids"] = rng.integers(0, 49_000, (2, gpu_train.CAPTION_FORMS, 77)).astype(np.uint16)
    np.savez(tmp_path / "pack.npz", **arrays)
    monkeypatch.setattr(gpu_train, "sample_grid", lambda *a, **k: None)
    monkeypatch.setattr(gpu_train, "CPU_STEPS", 1)
    monkeypatch.setattr("sys.argv", ["gpu_train", "train"])
    return tmp_path / "pack.npz"


def test_unpack_installs_the_weights_of_a_run(packed: Path, tmp_path: Path) -> None:
    gpu_train.main(
        ["train", "--data", str(packed), "--out", str(tmp_path / "out"), "--batch", "2",
         "--assets", str(ASSETS)]
    )  # fmt: skip
    report = json.loads((tmp_path / "out/train.json").read_text())
    assert set(report["parts"]) == {"base", "decoder", "guide tiny", "flat", "3d"}
    assert all(p["steps"] == 1 and not p["captured"] for p in report["parts"].values())
    expected = set(load_file(ASSETS / "emoji/unet/diffusion_pytorch_model.safetensors"))
    tensors = load_file(tmp_path / "out/unet.safetensors")
    assert set(tensors) == expected and all(v.dtype == torch.float16 and v.isfinite().all() for v in tensors.values())

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


SMALL = ["--base", "0", "--decoder", "0", "--tiny", "0", "--fine-tunes", "0", "--batch", "4"]


def test_guides_alone_are_continued_halved_and_installed(packed: Path, tmp_path: Path) -> None:
    assets, out, results = tmp_path / "assets", tmp_path / "out", tmp_path / "r.json"
    for name in ("emoji", "fine-tunes", "guides"):
        shutil.copytree(ASSETS / name, assets / name)
    former = {"device": "one", "date": "then", "batch": 7, "command": ["a"], "seconds": 1.0, "parts": {
        "base": {"steps": 5}, "guide tiny": {"steps": 9}}}  # fmt: skip
    results.write_text(json.dumps(former))
    before = {p: p.read_bytes() for p in assets.rglob("*.safetensors") if "guides" not in p.parts}
    gpu_train.main(["train", "--data", str(packed), "--out", str(out), "--assets", str(assets), *SMALL,
                    "--continue-guide", "9", "--gain", "1", "--halve", "9", "--full", "9"])  # fmt: skip
    parts = json.loads((out / "train.json").read_text())["parts"]
    assert list(parts) == ["guide tiny", "guide full", "halve 16", "halve 8", "halve 4"]
    bundled = load_file(ASSETS / "guides/emoji-tiny/diffusion_pytorch_model.safetensors")
    continued = load_file(out / "guide-tiny.safetensors")
    # one step at the warm-up's rate changes little, so training continued from the bundled weights
    assert all((continued[k] - v).abs().max() < 1e-3 for k, v in bundled.items())
    assert any(not torch.equal(continued[k], v) for k, v in bundled.items())

    gpu_train.main(["unpack", "--from", str(out), "--assets", str(assets), "--results", str(results)])
    assert {p: p.read_bytes() for p in before} == before  # this run trained neither base nor fine-tunes
    merged = json.loads(results.read_text())
    assert merged["parts"]["base"] == {"steps": 5, "device": "one", "date": "then", "batch": 7}
    assert merged["parts"]["guide tiny"]["steps"] == 1 and merged["command"][0] == ["a"] and len(merged["command"]) == 2
    gain = parts["guide tiny"]["gain"]["gain"]
    record = json.loads((assets / "guides/emoji-tiny/distill.json").read_text())
    assert record["gain"]["gain"] == gain == list(load_guide(str(assets / "guides/emoji-tiny")).config.gain)
    origin = hashlib.sha256((ASSETS / "guides/emoji-tiny/diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    assert record["continued_from"] == origin
    stage1 = hashlib.sha256((assets / "guides/emoji-tiny/diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    for last, steps in ((32, 16), (16, 8), (8, 4)):
        folder = assets / f"guides/emoji-tiny-{steps}"
        guide = load_guide(str(folder))
        assert guide.sampling_steps == steps and list(guide.config.gain) == gain
        source = load_file(out / f"guide-tiny-{steps}.safetensors")
        assert all(torch.equal(v, source[k]) for k, v in guide.state_dict().items())
        record = json.loads((folder / "distill.json").read_text())
        assert (record["stage"], record["from"], record["to"]) == ("steps", last, steps)
        assert record["settings"]["guide"] == stage1 and record["fresh_states"]["residual"] > 0

    gpu_train.main(["guides", "--from", str(out), "--assets", str(assets), "--out", str(tmp_path / "guides")])
    assert {p.name for p in (tmp_path / "guides").iterdir()} == {"tiny", "tiny-16", "tiny-8", "tiny-4", "full"}
    full, source = load_guide(str(tmp_path / "guides/full")), load_file(out / "guide-full.safetensors")
    assert all(torch.equal(v, source[k].float()) for k, v in full.state_dict().items())
    assert json.loads((tmp_path / "guides/full/distill.json").read_text())["settings"]["guide"] == "full"


def test_plug_can_load_the_step_lora(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    gpu_train.main(["train", "--data", str(packed), "--out", str(out), *SMALL, "--step-lora", "9"])
    assert list(json.loads((out / "train.json").read_text())["parts"]) == [
        "step lora 16", "step lora 8", "guide step lora",
    ]  # fmt: skip
    unet = resolve("emoji").unet()
    lora = load(Lora.parse(str(out / "step-lora-8.safetensors")), LayerNames({"unet": unet}))
    assert set(lora.changes["unet"]) == set(gpu_steps.lora_layers(unet))
    gpu_train.main(["guides", "--from", str(out), "--out", str(tmp_path / "guides")])
    guide, source = load_guide(str(tmp_path / "guides/step-lora-8")), load_file(out / "guide-step-lora.safetensors")
    assert guide.sampling_steps == 8 and all(torch.equal(v, source[k]) for k, v in guide.state_dict().items())
    record = json.loads((tmp_path / "guides/step-lora-8/distill.json").read_text())
    assert record["teacher_lora"] == "step-lora-8.safetensors"


def test_a_new_lora_changes_nothing_and_merges_as_in_plug(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = resolve("emoji").unet()
    unet = gpu_steps.add_lora(copy.deepcopy(plain))
    x, t, text = torch.randn(2, 8, 16, 16), torch.tensor([10, 900]), torch.randn(2, 77, 128)
    with torch.no_grad():
        assert torch.allclose(unet(x, t, text).sample, plain(x, t, text).sample, atol=1e-5)
        trained = {n: p for n, p in unet.named_parameters() if p.requires_grad}
        for p in trained.values():
            p.add_(torch.randn_like(p) * 0.05)
    assert all(n.endswith((".a", ".b")) for n in trained)
    state = {k: v.half().contiguous() for k, v in gpu_steps.lora_state(unet).items()}
    assert any("time_emb_proj" in k for k in state) and any("attn2.to_k" in k for k in state)
    save_file(state, tmp_path / "lora.safetensors")
    merged = gpu_steps.merge_lora(unet).state_dict()
    assert merged.keys() == plain.state_dict().keys()
    expected = copy.deepcopy(plain)
    lora = load(Lora.parse(str(tmp_path / "lora.safetensors")), LayerNames({"unet": expected}))
    merge(expected, "unet", [lora])
    changed = {n for n, weight in plain.state_dict().items() if not torch.equal(merged[n], weight)}
    assert {n.removesuffix(".weight") for n in changed} == set(gpu_steps.lora_layers(plain))
    for name, weight in expected.state_dict().items():
        assert torch.allclose(merged[name], weight, atol=1e-6), name


@pytest.mark.parametrize("steps", [16, 8, 4])
def test_one_step_to_the_target_equals_two_steps_of_diffusers(steps: int) -> None:
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    states = gpu_steps.HalvedStates(fake_data().latents, torch.zeros(4, 77, 8), 32, steps, own=0.0)
    assert set(states.k.tolist()) == set(range(steps))  # every batch holds all steps

    def student(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * x) + t[:, None, None, None] / 1000 + w[:, None, None, None] / 9

    landed, target = states.landing(student)
    twice, once = DDIMScheduler(**scheduler_config()), DDIMScheduler(**scheduler_config())
    twice.set_timesteps(2 * steps)
    once.set_timesteps(steps)
    x, t, text, w = states.batch()
    for i in range(len(x)):
        latent, row = x[i : i + 1], slice(i, i + 1)
        k = int(states.k[i])
        # diffusers rounds both grids separately: its grid of twice as many steps differs by up to one timestep
        for timestep in (int(t[i]), int(states.times[1, k])):
            assert min(abs(timestep - twice.timesteps)) <= 1
            latent = twice.step(
                student(latent, torch.tensor([timestep]), text[row], w[row]), timestep, latent
            ).prev_sample
        assert (latent - landed[row]).norm() < 0.02 * landed[row].norm()
        assert int(t[i]) == int(once.timesteps[k])
        alone = once.step(target[row], int(t[i]), x[row]).prev_sample
        assert torch.allclose(alone, landed[row], atol=1e-3 * landed[row].abs().max().item())


def test_halved_trajectories_follow_the_previous_or_the_new_student() -> None:
    torch.manual_seed(0)
    states = gpu_steps.HalvedStates(fake_data().latents, torch.zeros(4, 77, 8), 8, 4)
    states.student.copy_(torch.arange(8) < 4)
    x, k, w = states.x.clone(), states.k.clone(), states.w.clone()
    landed, prediction = torch.full_like(x, 5.0), torch.randn_like(x)
    states.advance(landed, prediction)
    going = k < 3
    assert torch.equal(states.x[going & ~states.student], landed[going & ~states.student])
    scale, out = states.scales[2, k].unbind(-1)
    own = scale[:, None, None, None] * x + out[:, None, None, None] * prediction
    assert torch.allclose(states.x[:4][going[:4]], own[:4][going[:4]])
    assert torch.equal(states.k, torch.where(going, k + 1, 0)) and torch.equal(states.w == w, going)


def test_stagger_spreads_trajectories_over_the_steps() -> None:
    states = gpu_train.GuideStates(fake_data(), torch.zeros(4, 77, 8), torch.zeros(3, 77, 8), batch=32, counts=(8,))
    states.stagger()
    assert states.k.tolist() == 2 * list(range(8))
    assert len(set(states.batch()[1][16:].tolist())) == 8


def test_negative_prompts_stay_with_their_trajectories() -> None:
    torch.manual_seed(0)
    prompts = torch.arange(40.0)[:, None, None].expand(40, 77, 8)
    states = gpu_train.NegativeStates(fake_data(), prompts, torch.zeros(3, 77, 8), batch=16)
    states.k.copy_(torch.tensor([0, 0, 0, 0, 7, 7, 7, 7]))
    states.row.fill_(0)  # row 0 has 8 steps: the last four trajectories end
    before = states.negatives()[8:, 0, 0].clone()
    whole = torch.zeros(16, 8, 16, 16)
    states.advance(whole, whole)
    after = states.negatives()[8:, 0, 0]
    assert torch.equal(after[:4], before[:4]) and (after[4:] != before[4:]).any()
    first = {float(v) for _ in range(20) for v in states.negatives()[:8, 0, 0]}
    assert len(first) > 20  # noised images get new negative prompts in every batch


def test_the_sharpener_is_trained_alone_and_added_to_the_bundled_guide(packed: Path, tmp_path: Path) -> None:
    out, guides = tmp_path / "out", tmp_path / "guides"
    gpu_train.main(["train", "--data", str(packed), "--out", str(out), *SMALL, "--sharpen", "9",
                    "--sharpener-width", "8"])  # fmt: skip
    report = json.loads((out / "train.json").read_text())["parts"]["sharpener"]
    assert report["loss_on_fresh_states"].keys() == {"with", "without"}
    gpu_train.main(["guides", "--from", str(out), "--out", str(guides)])
    guide, bundled = load_guide(str(guides / "tiny-sharpened")), load_guide("emoji-tiny")
    trained, own = load_file(out / "sharpener.safetensors"), dict(guide.state_dict())
    assert guide.config.sharpener_width == 8 and all(torch.equal(own[f"sharpener.{k}"], v) for k, v in trained.items())
    assert all(torch.equal(own[k], v) for k, v in bundled.state_dict().items())
    record = json.loads((guides / "tiny-sharpened/distill.json").read_text())
    assert record["stage"] == "guidance" and record["sharpener"]["steps"] == 1
    changed = json.loads((out / "train.json").read_text())
    changed["parts"]["sharpener"]["of"] = "0" * 64
    (out / "train.json").write_text(json.dumps(changed))
    with pytest.raises(RuntimeError, match="trained with a guide that differs"):
        gpu_train.main(["guides", "--from", str(out), "--out", str(guides)])


def test_the_loss_of_the_sharpener_equals_the_formula() -> None:
    """The squared error to eps(neg) + w (eps(c) − eps(neg)), with x0 weighting, divided by w."""
    from diffusers import DDIMScheduler

    from pnp_trt.models.guides.sharpener import with_new_sharpener

    torch.manual_seed(3)
    unet, text = resolve("emoji").unet(), torch.randn(5, 77, 128)
    guide = with_new_sharpener(load_guide("emoji-tiny"), 8)
    torch.nn.init.normal_(guide.sharpener.leave.weight, std=0.2)
    states, empty = gpu_train.NegativeStates(fake_data(), text, text[:3], batch=4), torch.randn(1, 77, 128)
    drawn = {}
    for name in ("batch", "negatives"):  # record the random batch of the loss
        own = getattr(states, name)
        setattr(states, name, lambda own=own, name=name: drawn.setdefault(name, own()))
    with torch.no_grad():
        loss = float(gpu_train.sharpening_loss(unet, guide, states, empty)())
        x, t, prompt, w = drawn["batch"]
        negative = drawn["negatives"]
        c, n = unet(x, t, prompt).sample, unet(x, t, negative).sample
        target = n + w[:, None, None, None] * (c - n)
        sharp = guide.sharpener(prompt, negative, empty.expand_as(prompt), w)
        assert not torch.equal(sharp, prompt)
        # the bundled guide on the sharpened text, through the public class
        from pnp_trt.models.student import Student

        prediction = Student(unet, load_guide("emoji-tiny"))(x, t, sharp, w)
    abar = DDIMScheduler(**scheduler_config()).alphas_cumprod
    by_time = ((1 - abar) / abar).clamp(max=5)
    weight = by_time[t] / by_time.mean() / w
    expected = float((((prediction - target) ** 2).mean((1, 2, 3)) * weight).mean())
    assert loss == pytest.approx(expected, rel=1e-4)
