"""Stage 2: the target of a halved step, and the files that runs leave behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pnp_trt.distill.steps import StepsConfig, distill
from pnp_trt.distill.train import TrainConfig
from pnp_trt.errors import InputError
from pnp_trt.models.bases import resolve
from pnp_trt.models.guides.load import load_guide
from pnp_trt.models.student import Student
from pnp_trt.sampling.schedules import ddim, ddim_step

from ..conftest import Result


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red apple\na blue car\nthe yellow house on a hill\n")
    return path


def config(base: Path, guide: Path, prompts: Path, out: Path, **changes: Any) -> StepsConfig:
    settings: dict[str, Any] = dict(
        to=2, start=8, base=str(base), prompts=prompts, trajectories=16, batch_runs=4, grid=False,
        train=TrainConfig(steps=60, batch=8, lr=1e-3, warmup=5, ema=0.9, checkpoint_every=20),
    )  # fmt: skip
    return StepsConfig(str(guide), out, **(settings | changes))


def test_every_halving_is_saved_and_reduces_the_error(
    micro_base: Path, micro_guide: Path, prompts: Path, tmp_path: Path
) -> None:
    reports = distill(config(micro_base, micro_guide, prompts, tmp_path / "out", grid=True))
    assert [(r["from"], r["to"]) for r in reports] == [(8, 4), (4, 2)]
    for r in reports:
        folder = tmp_path / "out" / f"steps-{r['to']}"
        assert r["held_out"]["after"] < r["held_out"]["before"]
        assert load_guide(str(folder)).config.sampling_steps == r["to"]
        assert (folder / "grid.png").exists()
        assert r["states"] == 16 * r["to"]


def test_the_target_equals_two_steps_of_the_previous_student(
    micro_base: Path, micro_guide: Path, prompts: Path, tmp_path: Path
) -> None:
    distill(config(micro_base, micro_guide, prompts, tmp_path / "out", to=4))
    stored = load_file(tmp_path / "out" / "steps-4" / "states" / "shard-0001.safetensors")
    base = resolve(str(micro_base))
    scheduler = base.scheduler_config()
    student = Student(base.unet(), load_guide(str(micro_guide)))
    from pnp_trt.models.conditioning import encode_prompts

    context = encode_prompts(base, prompts.read_text().split("\n")[:3], torch.device("cpu"))
    schedule = ddim(scheduler, 4)
    whole = ddim(scheduler, 8).timesteps
    for k, t in enumerate(schedule.timesteps.tolist()):
        pick = slice(4 * k, 4 * k + 4)
        x, w = stored["sample"][pick].float(), stored["w"][pick]
        text = context.states[stored["prompt"][pick]]
        middle = int(whole[2 * k + 1])  # from the previous student's timesteps
        landed = x
        after = t - 250
        for now, then in ((t, middle), (middle, after)):
            scale, out = ddim_step(scheduler, now, then)
            with torch.no_grad():
                landed = scale * landed + out * student(landed, torch.full((4,), now), text, w)
        once = float(schedule.x_scale[k]) * x + float(schedule.output_scale[k]) * stored["target"][pick].float()
        # tolerance of half precision, for latents that grow because the teacher is untrained
        assert (once - landed).norm() < 3e-3 * landed.norm(), k
        if k < 3:  # the trajectory continues from there
            assert (stored["sample"][4 * k + 4 : 4 * k + 8].float() - landed).norm() < 3e-3 * landed.norm()


def test_a_resumed_run_gives_bit_equal_weights(
    micro_base: Path, micro_guide: Path, prompts: Path, tmp_path: Path
) -> None:
    def die(stage: str, done: int, total: int, note: str) -> None:
        if stage == "4 to 2 steps" and done == 33:
            raise KeyboardInterrupt

    distill(config(micro_base, micro_guide, prompts, tmp_path / "whole"))
    broken = config(micro_base, micro_guide, prompts, tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        distill(broken, progress=die)
    with pytest.raises(InputError, match="continue it with --resume"):
        distill(broken)
    modified = (tmp_path / "broken" / "steps-4" / "distill.json").stat().st_mtime_ns
    distill(broken, resume=True)
    assert (tmp_path / "broken" / "steps-4" / "distill.json").stat().st_mtime_ns == modified
    for steps in (4, 2):
        weights = f"steps-{steps}/diffusion_pytorch_model.safetensors"
        a, b = load_file(tmp_path / "whole" / weights), load_file(tmp_path / "broken" / weights)
        assert all(torch.equal(a[k], b[k]) for k in a)


@given(to=st.integers(1, 16), doublings=st.integers(1, 4))
def test_every_stage_of_a_chain_halves_the_steps(to: int, doublings: int) -> None:
    chain = StepsConfig("g", Path("o"), to=to, start=to * 2**doublings).chain()
    assert chain[-1] == to and len(chain) == doublings
    assert all(a == 2 * b for a, b in zip([to * 2**doublings, *chain], chain, strict=False))


@pytest.mark.parametrize(("start", "to"), [(32, 5), (32, 32), (8, 16), (50, 16), (32, 0), (32, -1)])
def test_steps_that_do_not_halve_are_refused(start: int, to: int) -> None:
    with pytest.raises(InputError, match=f"{start} steps cannot be halved to {to}"):
        StepsConfig("g", Path("o"), to=to, start=start).chain()


@settings(max_examples=30)
@given(t=st.integers(1, 999), after=st.integers(-1, 998), kind=st.sampled_from(["epsilon", "v_prediction"]))
def test_a_ddim_step_on_the_true_prediction_keeps_image_and_noise(t: int, after: int, kind: str) -> None:
    if after >= t:
        return
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": kind}
    from pnp_trt.sampling.schedules import alphas_cumprod

    abar = alphas_cumprod(config)
    a, p = abar[t], abar[after] if after >= 0 else 1.0
    x0, eps = 0.7, -1.3
    x = np.sqrt(a) * x0 + np.sqrt(1 - a) * eps
    output = eps if kind == "epsilon" else np.sqrt(a) * eps - np.sqrt(1 - a) * x0
    scale, out = ddim_step(config, t, after)
    assert scale * x + out * output == pytest.approx(np.sqrt(p) * x0 + np.sqrt(1 - p) * eps, abs=1e-5)


def test_the_steps_command(
    cli: Callable[..., Result], micro_base: Path, micro_guide: Path, prompts: Path, tmp_path: Path
) -> None:
    arguments = ["distill", "steps", "--guide", micro_guide, "--out", tmp_path / "o", "--to", 2, "--from", 4]
    refused = cli(*arguments)
    assert refused.code == 2 and "does not state which base it was distilled for; pass --base" in refused.err
    arguments += ["--base", micro_base, "--prompts", prompts, "--steps", 4, "--batch", 4, "--trajectories", 4]
    done = cli(*arguments, "--no-grid")
    assert done.code == 0, done.err
    assert "4 to 2 steps" in done.out and "pnp-trt build" in done.out
    assert json.loads((tmp_path / "o" / "steps-2" / "distill.json").read_text())["stage"] == "steps"
    again = cli(*arguments, "--no-grid")
    assert again.code == 2 and "--resume" in again.err
