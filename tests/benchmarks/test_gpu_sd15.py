"""SD 1.5's part of ``benchmarks.gpu``, in small and on the CPU; its record's figures, goals and table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import gpu_report, gpu_sd15

MICRO: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel", "sample_size": 8, "in_channels": 4, "out_channels": 4,
        "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 32,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "vae": {
        "_class_name": "AutoencoderKL", "block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "sample_size": 16,
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_every_case_is_measured() -> None:
    said: list[str] = []
    found = gpu_sd15.measure(
        lambda f: said.append(json.dumps(f)), 1, precision="fp32", provider="cpu", batches=(1, 2), steps=3,
        configs=MICRO,
    )  # fmt: skip
    assert len(said) > 6  # what is known is told as it becomes known
    assert set(found["cases"]) == {f"{m}, batch {b}" for m in ("guided", "unguided", "CFG") for b in (1, 2)}
    for row in found["cases"].values():
        assert "failed" not in row and row["finite"] and row["captured_equals_step_by_step"]
        assert not row["captured"] and "no CUDA graphs on cpu" in row["why_not_captured"]
        assert row["step"]["ms"] > 0 and row["tflops"] >= 0
    assert found["macs_a_row"]["CFG"] == 2 * found["macs_a_row"]["unguided"] < 2 * found["macs_a_row"]["guided"]
    assert "failed" not in found["picture"] and found["picture"]["finite"]


def case(ms: float, loop: float, macs: int) -> dict[str, Any]:
    row: dict[str, Any] = {"step": {"ms": ms}, "loop_ms_captured": loop, "loop_ms_step_by_step": 2 * loop}
    return row | gpu_sd15.rates(row, 20) | gpu_sd15.shares(row, macs, 800.0)


def test_figures_and_goals() -> None:
    cases = {
        "guided, batch 1": case(4.0, 80.4, 400 * 10**9), "unguided, batch 1": case(3.9, 79.0, 400 * 10**9),
        "guided, batch 4": case(8.0, 161.0, 1600 * 10**9),
    }  # fmt: skip
    assert cases["guided, batch 1"]["iterations_a_second"] == 250 and cases["guided, batch 1"]["tflops"] == 200
    assert cases["guided, batch 1"]["loop_overhead"] == 0.005 and cases["guided, batch 4"]["share_of_roof"] == 0.5
    part = {"ran": True, "complete": True, "precision": "fp16", "steps": 20, "cases": cases}
    assert [g["state"] for g in gpu_report.goals({"torch-sd15": part})] == ["met"] * 4
    cases["unguided, batch 1"]["step"]["ms"] = 3.5
    cases["guided, batch 1"] |= {"iterations_a_second": 199.9, "loop_overhead": 0.01}
    del cases["guided, batch 4"]
    states = [g["state"] for g in gpu_report.goals({"torch-sd15": part})]
    assert states == ["missed"] * 3 + ["not measured"]
    assert [g["state"] for g in gpu_report.goals({})] == ["not measured"] * 4


def test_the_table_shows_what_there_is() -> None:
    cases = {"guided, batch 1": case(4.0, 80.4, 400 * 10**9), "CFG, batch 1": {"failed": "OutOfMemoryError: no"}}
    document = {
        "gpu": {"name": "NVIDIA Test 9", "sm": "sm_99"}, "goals": gpu_report.goals({}),
        "parts": {
            "roof": {"ran": True, "complete": False, "why": "it took more than 5 s", "fp16_matmul_tflops": 790.0},
            "torch-sd15": {"ran": True, "complete": True, "precision": "fp16", "steps": 20, "cases": cases},
            "trt-sd15": {"ran": False, "why": "missing here: tensorrt"},
            "tests": {"ran": True, "complete": True, "modules": {
                "a.py": {"exit": 0, "said": ["3 passed"]}, "b.py": "stopped after 9 s",
            }},
        },
    }  # fmt: skip
    shown = gpu_report.table(document)
    for wanted in (
        "790.0 fp16 TFLOP/s", "roof: stopped: it took more than 5 s", "250.0", "0.0050", "failed: OutOfMemoryError",
        "trt-sd15: not run: missing here: tensorrt", "a.py: 3 passed", "b.py: stopped", "not measured",
    ):  # fmt: skip
        assert wanted in shown
