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
from pnp_trt.distill.states import StateConfig
from pnp_trt.distill.train import TrainConfig, train
from pnp_trt.errors import InputError, PnpError
from pnp_trt.models.prompts import read_prompts

from ..conftest import Result


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red apple\n\na blue car\nthe yellow house on a hill\n")
    return path


def config(base: Path, prompts: Path, out: Path, steps: int = 30, **settings: Any) -> GuidanceConfig:
    return GuidanceConfig(
        str(base), prompts, out, options={"rank": 8, "embed_dim": 8}, grid_steps=4,
        states=StateConfig(count=40, steps=5, batch=4),
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


class Line:
    """An objective that any linear layer can learn, and that breaks at a step."""

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken

    def batch(self, step: int, part: int, parts: int) -> dict[str, torch.Tensor]:
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(step))
        return {"x": x[part::parts] * (float("nan") if step == self.broken else 1.0)}

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (model(batch["x"]) - batch["x"].sum(1, keepdim=True)).pow(2).mean()


def test_nan_stops_the_run_and_keeps_the_checkpoint_and_the_batch(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 1)
    with pytest.raises(PnpError, match=r"is nan at step 7.*batch is kept in .*not-finite-step-7\.safetensors"):
        train(module, module, Line(broken=7), TrainConfig(steps=20, batch=4, checkpoint_every=5), tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000005.safetensors"]
    assert load_file(tmp_path / "not-finite-step-7.safetensors")["x"].shape == (4, 2)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 1)
    train(module, module, Line(), TrainConfig(steps=20, batch=4, checkpoint_every=5, keep=2), tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-0000015.safetensors",
        "step-0000020.safetensors",
    ]


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    module, config = torch.nn.Linear(2, 1), TrainConfig(steps=20, batch=4, checkpoint_every=5)
    real = safetensors.torch.save_file

    def full(tensors: Any, path: Path, **rest: Any) -> None:
        if "0000010" in str(path):
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        real(tensors, path, **rest)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(PnpError, match=r"could not be written .*No space left.*--resume"):
        train(module, module, Line(), config, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000005.safetensors"]
    monkeypatch.undo()
    seen: list[int] = []
    train(module, module, Line(), config, tmp_path, progress=lambda step, *_: seen.append(step))
    assert seen[0] == 6  # continued from the whole one


def test_accumulated_parts_give_the_whole_batchs_step(tmp_path: Path) -> None:
    weights = []
    for accumulate in (1, 2, 4):
        torch.manual_seed(0)
        module = torch.nn.Linear(2, 1)
        train(module, module, Line(), TrainConfig(steps=12, batch=4, accumulate=accumulate), tmp_path / str(accumulate))
        weights.append(module.weight.detach().clone())
    assert torch.allclose(weights[0], weights[1], atol=1e-6) and torch.allclose(weights[0], weights[2], atol=1e-6)
    with pytest.raises(InputError, match=r"batch of 4 does not divide into 1 processes times 3 parts"):
        train(module, module, Line(), TrainConfig(steps=12, batch=4, accumulate=3), tmp_path / "3")


def test_prompts_files(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("  a  \n\n\tb\n")
    assert read_prompts(path) == ["a", "b"]
    path.write_text("\n \n")
    with pytest.raises(InputError, match="has no prompts"):
        read_prompts(path)
    path.write_text("ok\n" + "x" * 1001)
    with pytest.raises(InputError, match="line 2 has 1001 characters"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe\x00")  # a mark of UTF-16 and half a character
    with pytest.raises(InputError, match="not UTF-16 text"):
        read_prompts(path)
    path.write_bytes(b"a red \xe9pple")
    with pytest.raises(InputError, match="not UTF-8"):
        read_prompts(path)
    with pytest.raises(InputError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")


def test_the_command(cli: Callable[..., Result], micro_base: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "g"
    arguments = ["distill", "guidance", "--base", micro_base, "--prompts", prompts, "--out", out, "--num-states", 64]
    done = cli(*arguments, "--steps", 5, "--batch", 4, "--rank", 4)
    assert done.code == 0, done.err
    assert "% of the U-Net's" in done.out and "relative error on held-out" in done.out
    built = cli("build", "--base", micro_base, "--guide", out, "--backend", "torch", "--out", tmp_path / "b")
    assert built.code == 0, built.err
    for bad, message in (
        (["--guide", "huge"], "guide is 'huge'; known: tiny, full"),
        (["--lr", "0"], "the learning rate is 0"),
    ):
        refused = cli("distill", "guidance", "--prompts", prompts, "--out", tmp_path / "h", *bad)
        assert refused.code == 2 and message in refused.err
