"""Stage 1: the guide learns, resumes exactly, and refuses what it should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pnp_trt.distill.guidance import GuidanceConfig, distill
from pnp_trt.distill.states import StateConfig, read_prompts
from pnp_trt.distill.train import TrainConfig, train
from pnp_trt.errors import InputError, PnpError

from ..conftest import Result


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red apple\n\na blue car\nthe yellow house on a hill\n")
    return path


def config(base: Path, prompts: Path, out: Path, steps: int = 30, **settings: Any) -> GuidanceConfig:
    return GuidanceConfig(
        str(base), prompts, out, rank=8, embed_dim=8,
        states=StateConfig(trajectories=8, steps=5, batch=4),
        train=TrainConfig(steps=steps, batch=8, lr=5e-3, warmup=5, checkpoint_every=10, **settings),
    )  # fmt: skip


def test_the_guide_learns_and_its_report_says_so(micro_base: Path, prompts: Path, tmp_path: Path) -> None:
    report = distill(config(micro_base, prompts, tmp_path / "guide", steps=120))
    assert report["held_out"]["residual"] < 0.9  # 1 is a guide that does nothing
    assert report["states"] == 40
    on_disk = json.loads((tmp_path / "guide" / "distill.json").read_text())
    assert on_disk["held_out"] == report["held_out"]
    assert (tmp_path / "guide" / "diffusion_pytorch_model.safetensors").exists()


def test_a_resumed_run_gives_bit_equal_weights(
    micro_base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = "diffusion_pytorch_model.safetensors"
    distill(config(micro_base, prompts, tmp_path / "whole"))

    def die(stage: str, done: int, total: int, note: str) -> None:
        if stage == "guide" and done == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(config(micro_base, prompts, tmp_path / "broken"), progress=die)
    assert not (tmp_path / "broken" / weights).exists()
    seen: list[int] = []
    distill(
        config(micro_base, prompts, tmp_path / "broken"), resume=True,
        progress=lambda stage, done, total, note: seen.append(done) if stage == "guide" else None,
    )  # fmt: skip
    assert seen[0] == 11  # continued after the checkpoint at 10, not from the start
    a, b = load_file(tmp_path / "whole" / weights), load_file(tmp_path / "broken" / weights)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_states_are_kept_and_not_collected_again(
    micro_base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(config(micro_base, prompts, tmp_path / "g"))
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "g" / "states").glob("*.safetensors")}
    distill(config(micro_base, prompts, tmp_path / "g"), resume=True)
    assert len(times) == 2 and times == {p: p.stat().st_mtime_ns for p in times}


def test_a_folder_of_another_run_is_refused(micro_base: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "g"
    distill(config(micro_base, prompts, out))
    with pytest.raises(InputError, match="continue it with --resume"):
        distill(config(micro_base, prompts, out))
    with pytest.raises(InputError, match="other settings"):
        distill(config(micro_base, prompts, out, steps=31), resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("mine")
    with pytest.raises(InputError, match="holds no run of this kind"):
        distill(config(micro_base, prompts, tmp_path / "mine"))


def test_nan_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 1)

    def loss_of(step: int) -> torch.Tensor:
        value = module(torch.ones(1, 2)).pow(2).mean()
        return value * float("nan") if step == 7 else value

    with pytest.raises(PnpError, match=r"the loss is nan at step 7.*--resume"):
        train(module, loss_of, TrainConfig(steps=20, checkpoint_every=5), tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000005.safetensors"]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 1)
    train(
        module,
        lambda step: module(torch.ones(1, 2)).pow(2).mean(),
        TrainConfig(steps=20, checkpoint_every=5, keep=2),
        tmp_path,
    )
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-0000015.safetensors",
        "step-0000020.safetensors",
    ]


def test_prompts_files(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("  a  \n\n\tb\n")
    assert read_prompts(path) == ["a", "b"]
    path.write_text("\n \n")
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(path)
    path.write_text("ok\n" + "x" * 1001)
    with pytest.raises(InputError, match="line 2 has 1001 characters"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_prompts(path)
    with pytest.raises(InputError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")


def test_the_command(cli: Callable[..., Result], micro_base: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "g"
    arguments = ["distill", "guidance", "--base", micro_base, "--prompts", prompts, "--out", out, "--trajectories", 4]
    done = cli(*arguments, "--steps", 5, "--batch", 4, "--rank", 4)
    assert done.code == 0, done.err
    assert "% of the U-Net's" in done.out and "left unexplained" in done.out
    built = cli("build", "--base", micro_base, "--guide", out, "--out", tmp_path / "bundle")
    assert built.code == 0, built.err
    for bad, message in ((["--guide", "huge"], "guide is 'huge'; known: tiny"), (["--lr", "0"], "--lr is 0")):
        refused = cli("distill", "guidance", "--prompts", prompts, "--out", tmp_path / "h", *bad)
        assert refused.code == 2 and message in refused.err
