"""The rivals of the guides: their effect on a U-Net, training in a few steps, the measurement, and the page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, UNet2DConditionModel  # noqa: E402  (needs torch)
from safetensors.torch import load_file  # noqa: E402

from benchmarks.emoji import gpu_train  # noqa: E402
from benchmarks.emoji.rivals import RIVALS, measure, report  # noqa: E402
from benchmarks.emoji.rivals.__main__ import main  # noqa: E402
from benchmarks.emoji.rivals.base import Rival  # noqa: E402
from benchmarks.emoji.rivals.sharpener import Sharpener  # noqa: E402
from benchmarks.emoji.rivals.train import load, train  # noqa: E402
from benchmarks.emoji.rivals.world import World  # noqa: E402
from benchmarks.emoji.train import scheduler_config  # noqa: E402
from pnp_trt.assets import ROOT as ASSETS  # noqa: E402
from pnp_trt.errors import InputError  # noqa: E402
from tests.test_words import findings, prose  # noqa: E402

NAMES = RIVALS.names()
#: rivals with about as many parameters as the tiny guide's 198,416
EQUAL = ("tiny", "w-embedding", "sharpener", "adapters", "additive")


def bundled_unet(base: str = "emoji") -> Any:
    unet = UNet2DConditionModel.from_pretrained(ASSETS / "emoji/unet").float().requires_grad_(False).eval()
    if base != "emoji":
        unet.load_state_dict(load_file(ASSETS / f"fine-tunes/{base}.safetensors"))
    return unet


@pytest.fixture(scope="module")
def unet() -> Any:
    return bundled_unet()


def inputs(count: int = 2) -> tuple[Any, ...]:
    """Return x, t, and the states of text and of the empty prompt."""
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(count, 8, 16, 16, generator=g), torch.randn(count, 77, 128, generator=g)
    t = torch.linspace(900, 40, count).long()
    return x, t, text, torch.randn(1, 77, 128, generator=g).expand(count, -1, -1)


def awake(name: str, unet: Any) -> Rival:
    """Return a rival whose last projections are not zero, so that it changes the output."""
    torch.manual_seed(1)
    rival = RIVALS[name].from_unet(unet)
    with torch.no_grad():
        for p in rival.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return rival


@pytest.mark.parametrize("name", NAMES)
def test_a_rival_changes_nothing_at_w_1_and_before_training(name: str, unet: Any) -> None:
    x, t, text, empty = inputs()
    with torch.no_grad():
        plain = unet(x, t, text).sample
        assert torch.equal(RIVALS[name].from_unet(unet)(unet, x, t, text, empty, torch.tensor([3.0, 5.0])), plain)
        rival = awake(name, unet)
        output = rival(unet, x, t, text, empty, torch.tensor([1.0, 5.0]))
    assert torch.allclose(output[0], plain[0], atol=1e-6)
    assert (output[1] - plain[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_each_sample_has_its_own_w(name: str, unet: Any) -> None:
    x, t, text, empty = inputs()
    rival = awake(name, unet)
    w = torch.tensor([2.0, 7.0])
    with torch.no_grad():
        both = rival(unet, x, t, text, empty, w)
        second = rival(unet, x[1:], t[1:], text[1:], empty[1:], w[1:])
    assert torch.allclose(both[1:], second, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_whole_rival_but_not_the_unet(name: str, unet: Any) -> None:
    x, t, text, empty = inputs()
    rival = awake(name, unet)
    rival(unet, x, t, text, empty, torch.tensor([3.0, 5.0])).square().sum().backward()
    without = [n for n, p in rival.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # in attention, one number added to all keys of a query changes nothing
    assert [n for n in without if not n.endswith("k.bias")] == []
    assert all(p.grad is None for p in unet.parameters())
    assert not any(m._forward_hooks for m in unet.modules())


@pytest.mark.parametrize("name", EQUAL)
def test_the_numbers_of_parameters_are_equal(name: str, unet: Any) -> None:
    assert sum(p.numel() for p in RIVALS[name].from_unet(unet).parameters()) == pytest.approx(198_416, rel=0.02)


def test_the_w_embedding_equals_changed_weights_at_one_w(unet: Any) -> None:
    """At a fixed w, the LoRA and the added embedding equal a U-Net with other weights and another bias."""
    x, t, text, empty = inputs()
    w = torch.full((2,), 3.0)
    rival: Any = awake("w-embedding", unet)
    other = bundled_unet()
    gate = (3.0 - 1) / 4
    with torch.no_grad():
        for name, change in zip(rival.names, rival.changes, strict=True):
            up, down = change.up.weight, change.down.weight
            weight = other.get_submodule(name).weight
            weight += gate * torch.einsum("or,r...->o...", up.flatten(1), down)
        angles = 3.0 * 4 * 100.0 ** (-torch.arange(16) / 16)
        features = torch.cat([angles.sin(), angles.cos()])
        other.time_embedding.linear_2.bias += gate * rival.embed(features)
        expected = other(x, t, text).sample
        output = rival(unet, x, t, text, empty, w)
    assert torch.allclose(output, expected, atol=2e-5)


def test_the_sharpener_equals_its_formula() -> None:
    """Linear layers and attention, written out in loops."""
    torch.manual_seed(0)
    part = Sharpener(8, inner=6, heads=2).double()
    torch.nn.init.normal_(part.leave.weight)
    text, negative = torch.randn(1, 4, 8).double(), torch.randn(1, 5, 8).double()
    a, b = part.enter(text[0]).clamp(min=0), part.enter(negative[0]).clamp(min=0)
    rows = []
    for i in range(4):
        heads = []
        for h in (slice(0, 3), slice(3, 6)):
            q = part.q(a[i])[h]
            weights = torch.stack([torch.exp(q @ part.k(b[j])[h] / 3**0.5) for j in range(5)])
            heads.append(sum(weights[j] / weights.sum() * part.v(b[j])[h] for j in range(5)))
        rows.append(part.leave(part.out(torch.cat(heads)).clamp(min=0)))
    assert torch.allclose(part(text, negative)[0], torch.stack(rows))


def test_the_unet_gets_the_sharpened_text_except_for_the_start_token(unet: Any) -> None:
    x, t, text, empty = inputs()
    rival: Any = awake("sharpener", unet)
    with torch.no_grad():
        states = text + rival.sharpener(text, empty) * torch.tensor([0.5, 1.5])[:, None, None]
        states[:, 0] = text[:, 0]
        expected = unet(x, t, states).sample
        assert torch.allclose(rival(unet, x, t, text, empty, torch.tensor([3.0, 7.0])), expected, atol=1e-5)


def test_additive_adapters_add_one_vector_to_all_positions(unet: Any) -> None:
    x, t, text, empty = inputs()
    rival: Any = awake("additive", unet)
    seen: list[Any] = []
    name = rival.beside.names[-1]
    plain = unet.get_submodule(name).register_forward_hook(lambda _, i, o: seen.append(o))
    with torch.no_grad():
        rival(unet, x, t, text, empty, torch.tensor([3.0, 3.0]))
        added = rival.beside.adapters[-1](None, torch.tensor([3.0, 3.0]), unet.time_embedding(unet.time_proj(t)), text)
    plain.remove()
    assert added.shape == (2, 1, 128) and len(seen) == 1 and seen[0].shape == (2, 64, 128)


@pytest.mark.parametrize(("name", "part"), [("tiny+offsets", "tiny"), ("tiny+sharpener+offsets", "tiny+sharpener")])
def test_joint_rivals_reduce_to_their_parts(name: str, part: str, unet: Any) -> None:
    """Without the guide's and the sharpener's changes, the additive adapters remain, and the reverse."""
    x, t, text, empty = inputs()
    w = torch.tensor([3.0, 6.0])
    joint: Any = RIVALS[name].from_unet(unet)
    offsets: Any = awake("additive", unet)
    other = awake(part, unet)
    with torch.no_grad():
        joint.offsets.load_state_dict(offsets.beside.state_dict())
        assert torch.allclose(joint(unet, x, t, text, empty, w), offsets(unet, x, t, text, empty, w), atol=1e-6)
        joint = RIVALS[name].from_unet(unet)
        joint.load_state_dict(other.state_dict(), strict=False)
        assert torch.allclose(joint(unet, x, t, text, empty, w), other(unet, x, t, text, empty, w), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_rival_works_on_a_fine_tune(name: str, unet: Any) -> None:
    x, t, text, empty = inputs(1)
    rival, tuned = awake(name, unet), bundled_unet("emoji-flat")
    rival.check(tuned)
    with torch.no_grad():
        output = rival(tuned, x, t, text, empty, torch.tensor([3.0]))
        assert (output - tuned(x, t, text).sample).abs().max() > 1e-3
        assert (output - rival(unet, x, t, text, empty, torch.tensor([3.0]))).abs().max() > 1e-3


def test_a_rival_of_another_shape_is_refused(unet: Any) -> None:
    other = UNet2DConditionModel.from_config({**unet.config, "cross_attention_dim": 64})
    with pytest.raises(InputError, match="cross_attention_dim = 128, but this one has 64"):
        RIVALS["sharpener"].from_unet(unet).check(other)


# ----------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    arrays = {"empty": rng.integers(0, 49_000, (1, 77)), "prompts": rng.integers(0, 49_000, (4, 77))}
    for name in ("base", "flat", "3d"):
        arrays[f"{name}.pixels"] = rng.integers(0, 255, (2, 2, 64, 64, 3)).astype(np.uint8)
        arrays[f"{name}.ids"] = rng.integers(0, 49_000, (2, gpu_train.CAPTION_FORMS, 77))
    path = tmp_path_factory.mktemp("rivals") / "pack.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def trained(pack: Path) -> Path:
    out = pack.parent / "out"
    main(["train", "--data", str(pack), "--out", str(out), "--steps", "3", "--batch", "4"])
    return out


def test_training_writes_every_rival_and_its_record(trained: Path, unet: Any) -> None:
    record = json.loads((trained / "train.json").read_text())
    assert set(record["rivals"]) == set(NAMES) and record["parameters_of_unet"] == 6_852_552
    for name in NAMES:
        entry = record["rivals"][name]
        assert (entry["steps"], entry["batch"], len(entry["log"])) == (3, 4, 1) and entry["log"][0]["loss"] < 1.0
        rival = load(name, unet, trained)
        assert not any(p.requires_grad for p in rival.parameters())
        fresh = RIVALS[name].from_unet(unet).state_dict()
        moved = {k for k, v in rival.state_dict().items() if not torch.equal(v, fresh[k])}
        assert moved and all(v.isfinite().all() for v in rival.state_dict().values())


def test_the_data_is_read_at_once(pack: Path, tmp_path: Path) -> None:
    """Forked processes would share the position in an open file, so the file is closed, and can be removed."""
    copy = tmp_path / "pack.npz"
    shutil.copy(pack, copy)
    world = World(ASSETS, copy, torch.device("cpu"))
    copy.unlink()
    with np.load(pack) as file:
        assert all(np.array_equal(world.held[name], file[name]) for name in file.files)


def test_training_skips_trained_rivals(
    trained: Path, pack: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in trained.glob("*.safetensors")}
    monkeypatch.setattr(gpu_train.Trainer, "run", lambda *_: pytest.fail("trained again"))
    train(ASSETS, pack, trained, 3, 4)
    assert capsys.readouterr().out.count("trained already") == len(NAMES)
    assert {p.name: p.stat().st_mtime_ns for p in trained.glob("*.safetensors")} == before


def test_other_settings_require_new_training(trained: Path, pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_train.Trainer, "run", lambda *_: pytest.fail("trained again"))
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        train(ASSETS, pack, trained, 3, 4, only=["sharpener"], rates={"sharpener": 2e-3})


def test_a_pilot_chooses_the_rate(pack: Path, tmp_path: Path) -> None:
    """All rates of this pilot are far too high, so the lowest has the lowest loss."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RIVALS["additive"], "lr", 3.0)
        patch.setattr("benchmarks.emoji.rivals.train.PILOT_BATCHES", 1)
        record = train(ASSETS, pack, tmp_path, 2, 4, only=["additive"], pilot=2)["rivals"]["additive"]
        assert set(record["pilot_loss"]) == {"1", "3", "9"}
        assert f"{record['lr']:.2g}" == min(record["pilot_loss"], key=record["pilot_loss"].get) == "1"
        patch.setattr(gpu_train.Trainer, "run", lambda *_: pytest.fail("trained again"))
        train(ASSETS, pack, tmp_path, 2, 4, only=["additive"], pilot=2)


def test_all_rivals_learn_from_the_same_states(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def spy(self: Any) -> dict[str, Any]:
        x, t, text, w = next(c.cell_contents for c in self.loss_of.__closure__ if isinstance(
            c.cell_contents, gpu_train.GuideStates)).batch()  # fmt: skip
        seen[self.name] = torch.cat([v.flatten().float() for v in (x, t, text, w)])
        return {"seconds": 1.0}

    monkeypatch.setattr(gpu_train.Trainer, "run", spy)
    train(ASSETS, pack, tmp_path, 3, 4, only=["sharpener", "additive"])
    assert torch.equal(seen["sharpener"], seen["additive"])


def test_training_with_negative_prompts(pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error is to eps(negative) + w (eps(c) − eps(negative)); rivals that read no negative prompt are refused."""
    out = tmp_path / "out"
    main(["train", "--data", str(pack), "--out", str(out), "--steps", "2", "--batch", "4", "--negative"])
    record = json.loads((out / "train.json").read_text())["rivals"]
    assert set(record) == {"sharpener", "tiny+sharpener", "tiny+sharpener+offsets"}
    assert all(entry["negative"] for entry in record.values())
    # the same weights trained without negative prompts are not taken for these
    plain = train(ASSETS, pack, out, 2, 4, only=["sharpener"])["rivals"]
    assert plain["sharpener"]["sha256"] != record["sharpener"]["sha256"] and not plain["sharpener"]["negative"]
    with pytest.raises(SystemExit):
        main(["train", "--data", str(pack), "--out", str(out), "--only", "tiny,sharpener", "--negative"])
    assert "(sharpener, tiny+sharpener, tiny+sharpener+offsets), not tiny" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["measure", "--data", str(pack), "--out", str(out)])
    assert "are trained with negative prompts; measure them with" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in NAMES if RIVALS[name].reads_negative])
def test_rivals_that_read_negative_prompts_change_with_them(name: str, unet: Any) -> None:
    x, t, text, empty = inputs()
    rival, w = awake(name, unet), torch.tensor([3.0, 6.0])
    with torch.no_grad():
        difference = rival(unet, x, t, text, empty, w) - rival(unet, x, t, text, -empty, w)
    assert difference.abs().max() > 1e-4


@pytest.mark.parametrize("name", [name for name in NAMES if not RIVALS[name].reads_negative])
def test_other_rivals_ignore_them(name: str, unet: Any) -> None:
    x, t, text, empty = inputs()
    rival, w = awake(name, unet), torch.tensor([3.0, 6.0])
    with torch.no_grad():
        assert torch.equal(rival(unet, x, t, text, empty, w), rival(unet, x, t, text, -empty, w))


def test_the_loss_with_negative_prompts_equals_the_formula(unet: Any) -> None:
    torch.manual_seed(5)
    text = torch.randn(5, 77, 128)
    data = type("Fake", (), {"latents": torch.randn(3, 2, 8, 16, 16)})
    states = gpu_train.NegativeStates(data, text, text[:3], batch=4)
    drawn: dict[str, Any] = {}
    for part in ("batch", "negatives"):
        own = getattr(states, part)
        setattr(states, part, lambda own=own, part=part: drawn.setdefault(part, own()))

    def predict(x: Any, t: Any, text: Any, w: Any, negative: Any) -> Any:
        return unet(x, t, text).sample + 0.1 * negative.mean()

    with torch.no_grad():
        loss = float(gpu_train.negative_loss(unet, predict, states)())
        (x, t, prompt, w), negative = drawn["batch"], drawn["negatives"]
        c, n = unet(x, t, prompt).sample, unet(x, t, negative).sample
        error = (predict(x, t, prompt, w, negative) - n - w[:, None, None, None] * (c - n)) ** 2
        abar = DDIMScheduler(**scheduler_config()).alphas_cumprod
        weights = ((1 - abar) / abar).clamp(max=5.0)
        expected = (error * (weights / weights.mean())[t][:, None, None, None] / w[:, None, None, None]).mean()
    assert loss == pytest.approx(float(expected), rel=1e-4)


def test_training_lowers_the_loss_on_its_own_states(unet: Any) -> None:
    """Ten steps on one batch of states: the sharpener's loss falls, and the base's weights do not change."""
    torch.manual_seed(0)
    x, t, text, empty = inputs(4)
    rival = RIVALS["sharpener"].from_unet(unet)
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    w = torch.full((4,), 5.0)
    with torch.no_grad():
        c, u = unet(x, t, text).sample, unet(x, t, empty).sample
        target = u + w[:, None, None, None] * (c - u)

    def loss() -> Any:
        return ((rival(unet, x, t, text, empty, w) - target) ** 2).mean()

    first = loss().item()
    # a high rate: only the first 10 of 200 warm-up steps run
    trainer = gpu_train.Trainer("x", rival, loss, 0.6, float("inf"), ema=0.0, muon=False, max_steps=10)
    assert trainer.run()["steps"] == 10
    assert loss().item() < 0.9 * first
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())


# ------------------------------------------------------------------------------------------- measuring, the page


class Eyes:
    """Fake feature extractor: mean colours of the cells of a grid."""

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        cells = pixels.reshape(len(pixels), 8, 8, 8, 8, 3).mean((2, 4)).reshape(len(pixels), -1)
        rng = np.random.default_rng(0)
        return (cells @ rng.normal(0, 1e-4, (cells.shape[1], 1280))).astype(np.float32)


@pytest.fixture(scope="module")
def measured(trained: Path, pack: Path) -> dict[str, Any]:
    results = pack.parent / "rivals.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "FeatureExtractor", lambda _device: Eyes())
        patch.setattr(measure, "SCALES", (3.0,))
        patch.setattr(measure, "ERROR_BATCH", 4)
        patch.setattr(measure, "real_images", lambda rows, _cache: np.random.default_rng(0).integers(
            0, 256, (len(rows), 64, 64, 3), dtype=np.uint8))  # fmt: skip
        arguments: dict[str, Any] = dict(
            assets=ASSETS, data=pack, out=trained, judge=ASSETS / "judge.safetensors", cache=pack.parent / "cache",
            results=results, images=4, rounds=1, steps=(2,), tuned=(2,), command="a test",
        )  # fmt: skip
        document = measure.measure(**arguments)
        patch.setattr(measure.Sampler, "draw", lambda *_: pytest.fail("sampled again"))
        again = measure.measure(**arguments)
    assert again["cells"] == document["cells"] == json.loads(results.read_text())["cells"]
    return document


def test_several_processes_measure_the_same(
    measured: dict[str, Any], trained: Path, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling, errors and measures in forked processes equal those in one."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(measure, "FeatureExtractor", lambda _device: Eyes())
    monkeypatch.setattr(measure, "SCALES", (3.0,))
    monkeypatch.setattr(measure, "ERROR_BATCH", 4)
    monkeypatch.setattr(measure, "real_images", lambda rows, _cache: np.random.default_rng(0).integers(
        0, 256, (len(rows), 64, 64, 3), dtype=np.uint8))  # fmt: skip
    document = measure.measure(
        ASSETS, pack, trained, ASSETS / "judge.safetensors", tmp_path / "cache", tmp_path / "r.json", images=4,
        rounds=1, steps=(2,), tuned=(2,), processes=2,
    )  # fmt: skip
    torch.set_num_threads(threads)
    assert document["cells"] == measured["cells"]
    assert {n: r["error"] for n, r in document["rivals"].items()} == {
        n: r["error"] for n, r in measured["rivals"].items()
    }


def test_every_rival_is_measured_on_every_base(measured: dict[str, Any]) -> None:
    pairs = {(c["method"], c["base"]) for c in measured["cells"]}
    assert pairs == {(m, b) for m in ("none", "cfg", *NAMES) for b in ("emoji", "emoji-flat", "emoji-3d")}
    at = {(c["method"], c["base"]): c for c in measured["cells"]}
    assert at["cfg", "emoji"]["evaluations"] == 4 and at["tiny", "emoji"]["evaluations"] == 2
    assert "gain_over_cfg" not in at["cfg", "emoji"] and "gain_over_none" not in at["none", "emoji"]
    pair = at["additive", "emoji-flat"], at["tiny", "emoji-flat"]
    levels = [c["distance_to_cfg"]["psnr_db"]["value"] for c in pair]
    assert pair[0]["gain_over_ours"]["psnr_db"]["value"] == pytest.approx(levels[0] - levels[1])
    kids = [c["kid"]["value"] for c in pair]
    assert pair[0]["gain_over_ours"]["kid"]["value"] == pytest.approx(kids[1] - kids[0])
    assert "gain_over_ours" not in pair[1] and "gain_over_ours" not in at["cfg", "emoji"]
    near = at["additive", "emoji-flat"]["distance_to_cfg"]["psnr_db"]
    assert 0 < near["value"] < 100 and near["count"] == 4
    assert set(measured["rivals"]["tiny"]["error"]["emoji-3d"]) >= {"all", "0-199", "800-999"}


def test_costs_are_the_sums_of_the_layers(measured: dict[str, Any]) -> None:
    rivals = measured["rivals"]
    tokens, inner, width = 77, 192, 128
    # first layer on two texts; q of one, k and v of the other; attention products; last two layers on one
    products = 2 * tokens * width * inner + 3 * tokens * inner**2 + 2 * tokens**2 * inner
    products += tokens * inner**2 + tokens * inner * width
    assert rivals["sharpener"]["macs_per_image"] == products and rivals["sharpener"]["macs_per_evaluation"] == 0
    assert rivals["tiny+sharpener"]["macs_per_image"] == products
    assert rivals["tiny+sharpener"]["macs_per_evaluation"] == rivals["tiny"]["macs_per_evaluation"] > 0
    assert rivals["adapters"]["macs_per_image"] == 0
    assert rivals["additive"]["macs_per_evaluation"] < rivals["adapters"]["macs_per_evaluation"]


def test_the_error_without_guidance_is_the_whole_residual(unet: Any) -> None:
    torch.manual_seed(0)
    data = type("Fake", (), {"latents": torch.randn(3, 2, 8, 16, 16)})
    _, _, text, empty = inputs(4)
    states = gpu_train.GuideStates(data, text, text[:3], 4, own=0.0)
    error = gpu_train.prediction_error(
        unet, lambda x, t, text, w: unet(x, t, text).sample, states, empty[:1], 1
    )["all"]  # fmt: skip
    assert error == {"residual": 1.0, "length": 0.0, "cosine": 0.0}


def test_the_page_is_written_from_the_json(measured: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(measured))
    main(["report", "--json", str(path), "--document", str(tmp_path / "rivals.md")])
    page = (tmp_path / "rivals.md").read_text()
    assert "### emoji-3d, 2 steps, w = 3" in page and "3 optimizer steps" in page
    for rival in measured["rivals"].values():
        compared = 0 if rival["title"] == RIVALS["tiny"].title else 3
        assert page.count(f"| {rival['title']} |") == 1 + 3 + 3 + compared  # cost, images, errors, differences
    kid = next(c for c in measured["cells"] if (c["method"], c["base"]) == ("cfg", "emoji-flat"))["kid"]["value"]
    assert f"{kid:.4f} [" in page
    assert findings(prose(page)) == []
    assert "full guide (16.7 ×)" in page and "tiny guide + sharpener (ours) (2.0 ×)" in page


def test_unequal_training_is_not_reported(measured: dict[str, Any], tmp_path: Path) -> None:
    other = json.loads(json.dumps(measured))
    other["rivals"]["full"]["steps"] = 5
    with pytest.raises(InputError, match="differ in training steps"):
        report.write_report(other, tmp_path / "rivals.md")
    other["rivals"]["full"] |= {"steps": 3, "pilot_steps": 9}
    with pytest.raises(InputError, match=r"pilots differ in steps: \[0, 9\]"):
        report.write_report(other, tmp_path / "rivals.md")
    with pytest.raises(InputError, match="not a record of the rivals"):
        report.write_report({"schema": "pnp-trt/emoji-tables/1"}, tmp_path / "rivals.md")


def test_missing_files_and_invalid_options_are_reported(
    pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["measure", "--data", str(pack), "--out", str(tmp_path)], "no rival is trained"),
        (["train", "--data", str(tmp_path / "none.npz")], "gpu_train pack"),
        (["train", "--data", str(pack), "--only", "smaller"], "the rival is 'smaller'; known: tiny, w-embedding"),
        (["train", "--data", str(pack), "--steps", "0"], "steps must be at least 1, got 0"),
        (["train", "--data", str(pack), "--lr", "tiny"], "must be NAME=RATE, got 'tiny'"),
        (["report", "--json", str(tmp_path / "none.json")], "rivals measure"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in " ".join(capsys.readouterr().err.split())
