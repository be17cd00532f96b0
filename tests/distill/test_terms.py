"""Options of stage 1: each has its effect, and invalid values are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pnp_trt.distill.guidance import GuidanceConfig, GuidanceObjective, distill, make_student
from pnp_trt.distill.monitor import held_out_error
from pnp_trt.distill.run import TeacherModel
from pnp_trt.distill.states import Collection, StateConfig, States
from pnp_trt.distill.steps import StepsConfig
from pnp_trt.distill.steps import distill as distill_steps
from pnp_trt.distill.train import TrainConfig, make_accelerator, training_attention
from pnp_trt.errors import InputError
from pnp_trt.models.bases import resolve
from pnp_trt.models.guides import GUIDES, Guide
from pnp_trt.models.guides.load import load_guide
from pnp_trt.models.student import Student
from pnp_trt.models.teacher import BaseModel

from ..conftest import Result

PROMPTS = ["a red apple", "a blue car", "the yellow house on a hill"]


@pytest.fixture(scope="module")
def teacher(micro_base: Path) -> TeacherModel:
    return TeacherModel.load(str(micro_base), PROMPTS, torch.device("cpu"))


@pytest.fixture(scope="module")
def states(teacher: TeacherModel, tmp_path_factory: pytest.TempPathFactory) -> States:
    config = StateConfig(count=60, steps=5, batch=4)
    folder = tmp_path_factory.mktemp("s")
    collection = Collection(teacher.unet, teacher.scheduler, teacher.conditions, config, folder, {})
    collection.make(range(config.shards))
    return collection.read()


def config(**changes: Any) -> GuidanceConfig:
    small = changes.get("guide", "tiny") == "tiny"
    settings: dict[str, Any] = dict(
        options={"rank": 8, "embed_dim": 8} if small else {}, states=StateConfig(count=60, steps=5, batch=4),
        train=TrainConfig(batch=8),
    )  # fmt: skip
    return GuidanceConfig("micro", Path("p"), Path("o"), **(settings | changes))


def stirred(guide: Guide) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(torch.randn_like(p) * 0.05)


def gradient(teacher: TeacherModel, states: States, settings: GuidanceConfig) -> tuple[float, torch.Tensor]:
    torch.manual_seed(0)
    student = make_student(teacher, settings)
    stirred(student.guide)
    objective = GuidanceObjective(states, list(range(60)), teacher, settings)
    with training_attention(torch.device("cpu")):
        loss = objective.loss(student, objective.batch(3, 0, 1))
        loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in student.guide.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "changes",
    [{"weighting": "none"}, {"weighting": "w"}, {"weighting": "guidance"}, {"w_distribution": "log-uniform"},
     {"feature_matching": 0.1}],
    ids=str,
)  # fmt: skip
def test_every_term_changes_the_loss(teacher: TeacherModel, states: States, changes: dict[str, Any]) -> None:
    plain, direction = gradient(teacher, states, config())
    other, turned = gradient(teacher, states, config(**changes))
    assert other != plain and torch.isfinite(turned).all()
    cosine = torch.nn.functional.cosine_similarity(direction, turned, dim=0)
    assert 0.05 < cosine < 0.99999  # another weighting of the same objective


def test_feature_matching_vanishes_for_a_student_that_matches(teacher: TeacherModel, states: States) -> None:
    """At w = 1 the features of both the guided teacher and the student are the conditional ones."""
    from pnp_trt.distill.features import feature_error

    student = make_student(teacher, config())
    stirred(student.guide)
    rows = torch.arange(8)
    with torch.no_grad():
        # both sides read the states, which were stored in half precision
        assert float(feature_error(student, teacher, states, rows, torch.ones(8))) < 1e-9
        assert float(feature_error(student, teacher, states, rows, torch.full((8,), 5.0))) > 1e-6


@pytest.mark.parametrize("guide", ["tiny", "full"])
def test_gradient_checkpointing_changes_no_gradient(teacher: TeacherModel, states: States, guide: str) -> None:
    plain = gradient(teacher, states, config(guide=guide))
    try:
        saved = gradient(teacher, states, config(guide=guide, train=TrainConfig(batch=8, gradient_checkpointing=True)))
    finally:
        teacher.unet.disable_gradient_checkpointing()
    assert saved[0] == pytest.approx(plain[0], rel=1e-6)
    assert torch.allclose(plain[1], saved[1], rtol=1e-4, atol=1e-7)


def test_an_untrained_guide_has_a_residual_of_one(teacher: TeacherModel, states: States) -> None:
    student = make_student(teacher, config())
    error = held_out_error(student, states, list(range(60)))
    assert error["residual"] == pytest.approx(1.0, abs=0.02)  # the stored predictions are rounded to half
    assert {b["t_from"] for b in error["bins"]} == {0, 200, 400, 600, 800}


def test_learning_rate_schedules() -> None:
    cosine = TrainConfig(steps=1000, lr=1.0, warmup=10)
    assert [cosine.rate(0), cosine.rate(4)] == pytest.approx([0.1, 0.5], rel=1e-3)
    assert cosine.rate(10) == pytest.approx(1.0, abs=1e-3) and cosine.rate(999) == pytest.approx(0.02, abs=1e-3)
    constant = TrainConfig(steps=1000, lr=1.0, warmup=10, schedule="constant")
    assert {constant.rate(s) for s in (10, 500, 999)} == {1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"guide": "huge"}, "known: tiny, full"), ({"weighting": "x"}, "known: x0, guidance, w, none"),
     ({"w_distribution": "x"}, "known: uniform, log-uniform"), ({"w_min": 0.5}, "must start at 1"),
     ({"prompts": None}, "pass --prompts FILE, or --images DIR"), ({"feature_matching": -1.0}, "must be 0 or above"),
     ({"states": StateConfig("forward")}, "with --images"), ({"grid_steps": -1}, r"0 \(none\) to 1000")],
)  # fmt: skip
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    prompts = changes.pop("prompts", Path("p"))
    with pytest.raises(InputError, match=message):
        GuidanceConfig("micro", prompts, Path("o"), **changes).check()


def test_precisions_can_change_between_runs(micro_base: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(PROMPTS))
    losses = {}
    for precision in ("no", "bf16", "no"):
        run = GuidanceConfig(
            str(micro_base), prompts, tmp_path / f"{precision}-{len(losses)}", options={"rank": 4}, grid_steps=0,
            states_dir=tmp_path / "states", states=StateConfig(count=20, steps=5, batch=2),
            train=TrainConfig(steps=3, batch=4, mixed_precision=precision),
        )  # fmt: skip
        losses[precision, len(losses)] = distill(run)["final_loss"]
    assert losses["no", 0] == losses["no", 2] != losses["bf16", 1]
    assert losses["bf16", 1] == pytest.approx(losses["no", 0], rel=0.5)  # bf16 rounds this teacher's predictions


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has fp16")
def test_a_precision_that_the_device_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="mixed precision 'fp16' needs a GPU and there is none; use no, bf16 or auto"):
        make_accelerator("fp16")
    with pytest.raises(InputError, match="known: no, bf16, fp16, auto"):
        make_accelerator("fp8")


def test_options_that_a_guide_does_not_take_are_refused(teacher: TeacherModel) -> None:
    with pytest.raises(InputError, match="the full guide does not take these options: .*rank"):
        make_student(teacher, config(guide="full", options={"rank": 4}))


@pytest.mark.parametrize(("base", "guide"), [("micro_sdxl", "tiny"), ("micro_sdxl", "full")])
def test_sdxl_end_to_end(base: str, guide: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(PROMPTS))
    report = distill(
        GuidanceConfig(
            str(request.getfixturevalue(base)), prompts, tmp_path / "g", guide=guide, grid_steps=2,
            options={"rank": 4} if guide == "tiny" else {},
            states=StateConfig(count=20, steps=5, batch=2, negative=0.5), train=TrainConfig(steps=3, batch=4),
        )
    )  # fmt: skip
    assert report["parameters"]["guide"] > 0 and (tmp_path / "g" / "grid.png").stat().st_size > 1000
    assert any((tmp_path / "g" / "logs").iterdir())


def test_adding_a_sharpener_keeps_the_weights_of_the_guide(micro_base: Path, tmp_path: Path) -> None:
    """The error with negative prompts falls, the guide's own weights are unchanged, and stage 2 keeps the sharpener."""
    torch.manual_seed(0)
    own = GUIDES["tiny"].from_unet(resolve(str(micro_base)).unet(), rank=4, embed_dim=8)
    stirred(own)
    own.save_pretrained(tmp_path / "own")
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(PROMPTS))
    run = GuidanceConfig(
        str(micro_base), prompts, tmp_path / "g", grid_steps=0, sharpen=str(tmp_path / "own"),
        options={"sharpener_width": 8}, states=StateConfig(count=40, steps=5, batch=4, negative=1.0),
        train=TrainConfig(steps=30, batch=8, lr=0.01, ema=0.5),
    )  # fmt: skip
    report = distill(run)
    sharpened = load_guide(str(tmp_path / "g"))
    assert (
        all(torch.equal(sharpened.state_dict()[k], v) for k, v in own.state_dict().items())
        and sharpened.negative_prompts
    )
    teacher = TeacherModel.load(str(micro_base), PROMPTS, torch.device("cpu"))
    collected = Collection(teacher.unet, teacher.scheduler, teacher.conditions, run.states, tmp_path / "g" / "states",
                           report["identity"]).read()  # fmt: skip
    rows = list(range(40))
    before, after = (
        held_out_error(Student(teacher.unet, g), collected, rows)["residual"] for g in (own.eval(), sharpened)
    )
    assert after < before
    assert report["settings"]["sharpen"] == str(tmp_path / "own") and "sharpen_sha256" in report["settings"]
    steps = StepsConfig(str(tmp_path / "g"), tmp_path / "s", 2, 4, trajectories=4, grid=False,
                        train=TrainConfig(steps=2, batch=4, checkpoint_every=2))  # fmt: skip
    distill_steps(steps)
    halved = load_guide(str(tmp_path / "s" / "steps-2"))
    assert all(torch.equal(v, sharpened.state_dict()[k]) for k, v in halved.state_dict().items() if "sharpener" in k)
    assert not all(torch.equal(v, sharpened.state_dict()[k]) for k, v in halved.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"sharpen": "emoji-tiny"}, "a sharpener learns from states with a negative prompt; pass --negative 1"),
     ({"options": {"sharpener_width": 8}}, "a sharpener learns from states with a negative prompt"),
     ({"sharpen": "emoji-tiny", "options": {"rank": 4}, "states": StateConfig(negative=1.0)}, "keeps its design")],
)  # fmt: skip
def test_invalid_sharpener_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**changes).check()


def _write_images(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    for i in range(4):
        Image.fromarray(np.full((16, 16, 3), 60 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{i}.png", "text": PROMPTS[i % 3]}) for i in range(4))
    )


def test_images_are_noised_unless_trajectories_are_requested(
    cli: Callable[..., Result], micro_base: Path, tmp_path: Path
) -> None:
    _write_images(tmp_path)
    run = ["distill", "guidance", "--base", micro_base, "--images", tmp_path, "--num-states", "20", "--rank", "4",
           "--steps", "1", "--batch", "4", "--grid-steps", "0"]  # fmt: skip
    for words, kind in (([], "forward"), (["--states", "trajectory"], "trajectory")):
        done = cli(*run, *words, "--out", tmp_path / kind)
        assert done.code == 0, done.err
        assert json.loads((tmp_path / kind / "run.json").read_text())["settings"]["states"]["kind"] == kind


def test_noised_images_give_exactly_the_requested_number_of_states(
    cli: Callable[..., Result], micro_base: Path, tmp_path: Path
) -> None:
    """Trajectories are complete, with 20 states each; noised images need no rounding up."""
    _write_images(tmp_path)
    run = ["distill", "states", "--base", micro_base, "--images", tmp_path, "--num-states", "3"]
    for kind, count in (("forward", 3), ("trajectory", 20)):
        done = cli(*run, "--states", kind, "--states-dir", tmp_path / kind)
        assert done.code == 0, done.err
        (shard,) = (tmp_path / kind).glob("*.safetensors")
        assert len(load_file(shard)["timestep"]) == count


def test_bases_in_half_precision_are_trained_in_float32(
    cli: Callable[..., Result], micro_base: Path, micro_guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random bases of real size are float16, but training and visualising must run in float32."""
    for name in ("unet", "vae", "text_encoder"):
        own = getattr(BaseModel, name)
        monkeypatch.setattr(BaseModel, name, lambda self, *spec, own=own: own(self, *spec).half())
    _write_images(tmp_path)
    done = cli("distill", "guidance", "--base", micro_base, "--images", tmp_path, "--num-states", 1, "--rank", 4,
               "--steps", 1, "--batch", 1, "--grid-steps", 1, "--out", tmp_path / "guide")  # fmt: skip
    assert done.code == 0, done.err
    done = cli("visualize", "a red apple", "--base", micro_base, "--guide", micro_guide, "--steps", 1,
               "--out", tmp_path / "look")  # fmt: skip
    assert done.code == 0, done.err


def test_forward_states_from_a_folder_of_images(micro_base: Path, tmp_path: Path) -> None:
    _write_images(tmp_path)
    run = GuidanceConfig(
        str(micro_base), None, tmp_path / "g", tmp_path, options={"rank": 4}, grid_steps=0,
        states=StateConfig("forward", count=20, steps=5, batch=2), train=TrainConfig(steps=3, batch=4),
    )  # fmt: skip
    report = distill(run)
    assert report["states"] == 20 and "pictures" in report["identity"]
    (tmp_path / "q.txt").write_text("something else")
    with pytest.raises(InputError, match="4 captions of the images are not in the prompts file"):
        distill(GuidanceConfig(str(micro_base), tmp_path / "q.txt", tmp_path / "h", tmp_path, states=run.states))
