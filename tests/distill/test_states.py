"""States: what they hold, that they are the teacher's own, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pnp_trt.distill.run import TeacherModel
from pnp_trt.distill.states import Collection, Latents, MappedRows, StateConfig, size_in_bytes, split
from pnp_trt.errors import InputError, PnpError
from pnp_trt.models.prompts import find_images, image_latents, warn_of_long_prompts
from pnp_trt.models.student import both_predictions

PROMPTS = ["a red apple", "a blue car", "the yellow house on a hill"]


def load(base: Path) -> TeacherModel:
    return TeacherModel.load(str(base), PROMPTS, torch.device("cpu"))


def gather(teacher: TeacherModel, config: StateConfig, folder: Path, **rest: Any) -> Any:
    found = collection(teacher, config, folder, **rest)
    found.make(range(config.shards))
    return found.read()


def collection(teacher: TeacherModel, config: StateConfig, folder: Path, **rest: Any) -> Collection:
    return Collection(teacher.unet, teacher.scheduler, teacher.conditions, config, folder, {"for": "test"}, **rest)


@pytest.fixture
def v_base(micro_base: Path, tmp_path: Path) -> Path:
    """The micro teacher, said to predict v."""
    folder = tmp_path / "v"
    shutil.copytree(micro_base, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    return folder


def recompute(teacher: TeacherModel, states: Any, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    pick = torch.tensor([row])
    c = teacher.conditions
    prompt, negative = states.prompt[pick], states.negative[pick]
    cpu = torch.device("cpu")
    with torch.no_grad():
        return both_predictions(
            teacher.unet, states.sample[pick].float(), states.timestep[pick], c.text(prompt, cpu),
            c.text(negative, cpu), c.added(torch.cat([negative, prompt]), cpu),
        )  # fmt: skip


@pytest.mark.parametrize("which", ["micro_base", "v_base", "micro_sdxl"])
def test_states_hold_the_teachers_two_predictions(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    teacher = load(request.getfixturevalue(which))
    states = gather(teacher, StateConfig(count=24, steps=4, batch=3, negative=0.5), tmp_path / "s")
    assert len(states) == 24 and states.sample[0].dtype == torch.float16
    assert (states.negative == teacher.conditions.empty).any() and (states.negative < teacher.conditions.empty).any()
    for row in (0, 11, 23):
        e_u, e_c = recompute(teacher, states, row)
        # the latents were rounded to half before they were stored
        assert torch.allclose(states.unconditional[row].float(), e_u[0], atol=2e-2)
        assert torch.allclose(states.conditional[row].float(), e_c[0], atol=2e-2)


def test_a_trajectory_follows_guidance(micro_base: Path, tmp_path: Path) -> None:
    """With w = 1 the next state is DDIM's step on the conditional prediction."""
    teacher = load(micro_base)
    config = StateConfig(count=8, steps=4, batch=2, w_min=1.0, w_max=1.0)
    states = gather(teacher, config, tmp_path / "s")
    from pnp_trt.sampling.schedules import ddim_step

    for step in range(3):
        now, then = states.timestep[2 * step].item(), states.timestep[2 * step + 2].item()
        assert then < now
        scale, out = ddim_step(teacher.scheduler, now, then)
        expected = scale * states.sample[2 * step].float() + out * states.conditional[2 * step].float()
        # half precision, of latents that an untrained teacher lets grow
        assert torch.allclose(states.sample[2 * step + 2].float(), expected, rtol=1e-2, atol=5e-2)


def test_forward_states_are_noised_images_and_hold_out_whole_images(micro_base: Path, tmp_path: Path) -> None:
    teacher = load(micro_base)
    latents = torch.stack([torch.full((4, 8, 8), float(i)) for i in range(20)])
    given = Latents(latents, torch.arange(20) % 3)
    config = StateConfig("forward", count=96, steps=4, batch=6)
    states = gather(teacher, config, tmp_path / "s", images=given)
    assert len(states) == 96
    from pnp_trt.sampling.schedules import alphas_cumprod

    abar = torch.from_numpy(alphas_cumprod(teacher.scheduler)).float()[states.timestep]
    clean = (rows(states.sample).float().mean((1, 2, 3)) / abar.sqrt()).round()
    sure = states.timestep < 150  # there the mean of the noise is small beside the image's step of one
    train, held = split(config)
    shown = {int(clean[i]) for i in train if sure[i]}
    kept = {int(clean[i]) for i in held if sure[i]}
    assert shown and kept <= {19} and 19 not in shown
    _, e_c = recompute(teacher, states, 5)
    assert torch.allclose(states.conditional[5].float(), e_c[0], atol=2e-2)
    with pytest.raises(InputError, match="--images"):
        gather(teacher, config, tmp_path / "t")


def rows(values: MappedRows) -> torch.Tensor:
    """All of them."""
    return values[range(len(values))]


def test_a_killed_collection_goes_on_and_can_be_grown(micro_base: Path, tmp_path: Path) -> None:
    teacher = load(micro_base)
    small, large = (StateConfig(count=n, steps=4, batch=3) for n in (12, 36))
    first = gather(teacher, small, tmp_path / "s")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").glob("shard-*")}
    grown = gather(teacher, large, tmp_path / "s")
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())
    assert torch.equal(grown.sample[range(12)], rows(first.sample))
    (tmp_path / "s" / "shard-0001.safetensors").unlink()
    again = gather(teacher, large, tmp_path / "s")
    assert torch.equal(rows(again.sample), rows(grown.sample))
    assert torch.equal(rows(again.conditional), rows(grown.conditional))
    with pytest.raises(InputError, match="holds the states of another run"):
        gather(teacher, StateConfig(count=12, steps=4, batch=3, seed=1), tmp_path / "s")


def test_a_share_of_the_processes_makes_a_share_of_the_shards(micro_base: Path, tmp_path: Path) -> None:
    teacher = load(micro_base)
    config = StateConfig(count=36, steps=4, batch=3)
    whole = gather(teacher, config, tmp_path / "whole")
    folder = tmp_path / "shared"

    shared = collection(teacher, config, folder)
    shared.make(range(0, 3, 2))
    assert sorted(p.name for p in folder.glob("shard-*")) == ["shard-0000.safetensors", "shard-0002.safetensors"]
    with pytest.raises(InputError, match="shard-0001"):
        shared.read()
    shared.make(range(1, 3, 2))
    assert torch.equal(rows(shared.read().sample), rows(whole.sample))


def test_damaged_shards_and_full_disks_are_said(
    micro_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load(micro_base)
    config = StateConfig(count=12, steps=4, batch=3)
    gather(teacher, config, tmp_path / "s")
    shard = tmp_path / "s" / "shard-0000.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(InputError, match=r"shard-0000.safetensors is damaged .*delete it"):
        gather(teacher, config, tmp_path / "s")
    assert size_in_bytes(config, (4, 8, 8)) == 12 * (3 * 2 * 256 + 24)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"need 0 MiB more .*and 0 MiB are free"):
        gather(teacher, config, tmp_path / "none")


def test_a_teacher_that_is_not_finite_is_named(micro_base: Path, tmp_path: Path) -> None:
    teacher = load(micro_base)
    with torch.no_grad():
        teacher.unet.conv_out.bias[0] = float("inf")
    with pytest.raises(PnpError, match="the teacher's prediction is not finite at timestep"):
        gather(teacher, StateConfig(count=4, steps=2, batch=2), tmp_path / "s")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"kind": "x"}, "known: trajectory, forward"), ({"count": 0}, "count of the states is 0"),
     ({"negative": 1.5}, "share of negative prompts is 1.5")],
)  # fmt: skip
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StateConfig(**changes).check()


def image(path: Path, size: tuple[int, int] = (20, 12)) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)


def test_images_that_cannot_be_used_are_listed_and_skipped(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    image(tmp_path / "b.jpg")
    image(tmp_path / "no-caption.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    image(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    lines = [{"file_name": n, "text": f"caption of {n}"} for n in ("a.png", "cut.png", "empty.png", "text.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "b.txt").write_text("  a b\n image ")
    with pytest.warns(UserWarning, match=r"4 images .* are skipped: .*empty.png \(is empty\)"):
        found = find_images(tmp_path)
    assert [f.name for f in found.files] == ["a.png", "b.jpg"]
    assert found.captions == ["caption of a.png", "a b image"]
    assert {name for name, _ in found.skipped} == {"cut.png", "empty.png", "no-caption.png", "text.png"}
    with pytest.raises(InputError, match="does not exist"):
        find_images(tmp_path / "none")
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="has no usable image"):
        find_images(tmp_path / "bare")
    (tmp_path / "metadata.jsonl").write_text("{")
    with pytest.raises(InputError, match="metadata.jsonl, line 1 is not complete JSON"):
        find_images(tmp_path)


def test_images_become_scaled_latents(micro_base: Path, tmp_path: Path) -> None:
    """Each image's latent is the float64 encoder's times the scaling factor, wherever in a batch the image is."""
    image(tmp_path / "a.png", (64, 64))
    image(tmp_path / "b.png", (100, 64))
    vae = load(micro_base).base.vae()
    side = 8 * 2 ** (len(vae.config.block_out_channels) - 1)
    files = [tmp_path / name for name in ("a.png", "b.png", "a.png")]
    z = image_latents(vae, files, side, torch.device("cpu"), batch=2)
    assert z.shape == (3, 4, 8, 8) and z.dtype == torch.float32
    square = Image.open(tmp_path / "a.png").convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    x = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)[None].double() / 127.5 - 1
    with torch.no_grad():
        exact = vae.double().encode(x).latents[0] * vae.config.scaling_factor
    # kernels may add up in another order at another batch size: a dozen convolutions of 72 products, float32's
    # roundoff for each, of values no larger than some times the output
    allowed = 12 * 72 * 2.0**-24 * float(exact.abs().max())
    for row in (0, 2):
        torch.testing.assert_close(z[row].double(), exact, rtol=0, atol=allowed)
    assert (z[1] - z[0]).abs().max() > 10 * allowed


def test_long_prompts_are_cut_with_a_warning(micro_base: Path) -> None:
    with pytest.warns(UserWarning, match="1 of 2 prompts have more than 77 tokens and are truncated"):
        assert len(warn_of_long_prompts(load(micro_base).base.tokenizer(), ["apple " * 90, "pear"])) == 1
