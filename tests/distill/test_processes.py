"""Two processes with gloo give the result of one process within rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(micro_base: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\na blue car\nthe yellow house on a hill\n")
    arguments = [
        "-m", "pnp_trt", "distill", "guidance", "--base", str(micro_base), "--prompts", str(prompts), "--rank", "4",
        "--num-states", "160", "--steps", "12", "--batch", "8", "--lr", "1e-3", "--grid-steps", "0",
    ]  # fmt: skip
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for out, command in (
        ("one", [sys.executable, *arguments]),
        ("two", [*launch, "--mixed_precision", "no", "--dynamo_backend", "no", *arguments]),
        # the third run also splits each process's share of the batch in two
        ("four", [*launch, "--mixed_precision", "no", "--dynamo_backend", "no", *arguments, "--accumulate", "2"]),
    ):
        done = subprocess.run(
            [*command, "--out", str(tmp_path / out)], env=environment, capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("parameters,") == 1  # only the first process reports
    one, two, four = (load_file(tmp_path / o / "diffusion_pytorch_model.safetensors") for o in ("one", "two", "four"))
    moved = 0.0
    for key in one:
        assert (one[key] - two[key]).abs().max() < 2e-5, key
        assert (one[key] - four[key]).abs().max() < 2e-5, key
        moved = max(moved, float(one[key].abs().max()))
    assert moved > 1e-3
