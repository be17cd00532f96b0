"""The U-Net parts of ``benchmarks.gpu``, with small networks on the CPU; the record's figures, goals and table."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import gpu_report, gpu_unet
from pnp_trt.models.random import random_base

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


#: the same with SDXL's additional conditions
MICRO_XL = MICRO | {
    "unet": MICRO["unet"] | {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 68,
        "transformer_layers_per_block": [1, 2],
    },
    "text_encoder_2": {"projection_dim": 20},
}  # fmt: skip


def check(record: dict[str, Any], cases: tuple[tuple[str, int], ...]) -> None:
    assert set(record["cases"]) == {f"{m}, batch {b}" for m, b in cases}
    for row in record["cases"].values():
        assert "failed" not in row and row["finite"] and row["captured_equals_step_by_step"], row
        assert not row["captured"] and "no CUDA graphs on cpu" in row["why_not_captured"]
        assert row["step"]["ms"] > 0 and row["iterations_a_second"] > 0 and row["tflops"] >= 0
    macs = record["macs_a_row"]
    assert macs["CFG"] == 2 * macs["unguided"] < 2 * macs["guided"]


@pytest.mark.filterwarnings("ignore")
def test_every_case_is_measured() -> None:
    reports: list[str] = []
    record = gpu_unet.measure(
        lambda f: reports.append(json.dumps(f)), 1, precision="fp32", provider="cpu", steps=3, configs=MICRO,
        layouts=("NCHW",), decode=True,
    )  # fmt: skip
    assert len(reports) > 6  # results are reported as soon as they are known
    assert {(m, b) for m in ("guided", "unguided", "CFG") for b in (1, 4)} == set(gpu_unet.CASES)
    check(record, gpu_unet.CASES)
    assert "failed" not in record["image"] and record["image"]["finite"]
    assert record["layout"] == "NCHW" and "compile" not in record["cases"]["guided, batch 1"]


@pytest.mark.filterwarnings("ignore")
def test_sdxl_has_its_additional_conditions() -> None:
    record = gpu_unet.measure(
        lambda _: None, 1, base="random:sdxl", precision="fp32", provider="cpu", cases=gpu_unet.SINGLE, steps=3,
        configs=MICRO_XL,
    )  # fmt: skip
    check(record, gpu_unet.SINGLE)
    assert record["layout"] == "NHWC" and "image" not in record and record["base"] == "random:sdxl"
    plain = gpu_unet.Models(replace(random_base("random:sd15"), configs=MICRO), "fp32", "cpu")
    wide = gpu_unet.Models(replace(random_base("random:sdxl"), configs=MICRO_XL), "fp32", "cpu")
    more = wide.inputs("guided").keys() - plain.inputs("guided").keys()
    assert more == {"text_embeds", "time_ids"} and wide.inputs("CFG")["text_embeds"][1] == ("batch", 20)
    assert wide.added["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]  # a complete image of 16 x 16 pixels, not a crop


@pytest.mark.parametrize(("base", "configs"), [("random:sd15", MICRO), ("random:sdxl", MICRO_XL)])
def test_random_weights_stay_finite_in_half_precision(base: str, configs: dict[str, Any]) -> None:
    micro = replace(random_base(base), configs=configs)
    models = gpu_unet.Models(micro, "fp16", "cpu")
    largest: list[float] = []
    for part in models.student.modules():
        part.register_forward_hook(
            lambda _, a, out: largest.append(float(out.abs().max())) if isinstance(out, torch.Tensor) else None
        )
    rows = {
        name: torch.full((1, *shape[1:]), 500) if dtype == "int64" else torch.randn(1, *shape[1:])
        for name, (dtype, shape) in models.inputs("guided").items()
    }
    with torch.no_grad():
        models.student(**{k: v if k == "timestep" else v.half() for k, v in rows.items()})
    assert all(value < 6e4 / 8 for value in largest)  # float16 ends at 65,504, and latents grow over the steps


@pytest.mark.filterwarnings("ignore")
def test_compiled_modules_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile with Dynamo and AOTAutograd alone, without a C++ compiler."""
    original = torch.compile
    broken: list[bool] = []

    def compile(module: Any, **options: Any) -> Any:
        if broken:
            raise RuntimeError("no such instruction\nand more")
        broken.extend([True] * (type(module).__name__ == "Teacher"))  # compilations after the teacher's fail
        return original(module, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile)
    reports: list[dict[str, Any]] = []
    record = gpu_unet.measure(
        lambda f: reports.append(json.loads(json.dumps(f))), 1, target="compile", precision="fp32", provider="cpu",
        cases=(("guided", 1), ("CFG", 1), ("unguided", 1)), steps=3, configs=MICRO,
    )  # fmt: skip
    guided, cfg, unguided = record["cases"].values()
    assert guided["compile"]["seconds"] > 0 and guided["captured_equals_step_by_step"] and "failed" not in guided
    assert cfg["failed"].startswith("RuntimeError: no such instruction") and "step" not in cfg
    assert unguided["failed"] == cfg["failed"]  # the case after a failed one runs
    (report,) = [f for f in reports if f["cases"].keys() == {"guided, batch 1"} and "loop_overhead" in f["cases"][
        "guided, batch 1"]][:1]  # fmt: skip
    assert report["cases"]["guided, batch 1"]["tflops"] >= 0  # a case is reported completely before the next one starts


def case(ms: float, loop: float, macs: int) -> dict[str, Any]:
    row: dict[str, Any] = {"step": {"ms": ms}, "loop_ms_captured": loop, "loop_ms_step_by_step": 2 * loop}
    return row | gpu_unet.rates(row) | gpu_unet.overhead(row, 20) | gpu_unet.shares(row, macs, 800.0)


def test_figures_and_goals() -> None:
    cases = {
        "guided, batch 1": case(4.0, 80.4, 400 * 10**9), "unguided, batch 1": case(3.9, 79.0, 400 * 10**9),
        "guided, batch 4": case(8.0, 161.0, 1600 * 10**9),
    }  # fmt: skip
    assert cases["guided, batch 1"]["iterations_a_second"] == 250 and cases["guided, batch 1"]["tflops"] == 200
    assert cases["guided, batch 1"]["loop_overhead"] == 0.005 and cases["guided, batch 4"]["share_of_roof"] == 0.5
    part = {"ran": True, "complete": True, "precision": "fp16", "steps": 20, "cases": cases}
    assert [(g["state"], g["by"]) for g in gpu_report.goals({"torch-sd15": part})] == [("met", "eager")] * 4
    # for each goal, the better of eager and compiled counts
    slow = {name: case(row["step"]["ms"] + 2, row["loop_ms_captured"] + 60, 10**11) for name, row in cases.items()}
    both = {"torch-sd15": part | {"cases": slow}, "torch-sd15-compiled": part}
    assert [(g["state"], g["by"]) for g in gpu_report.goals(both)] == [
        ("met", "compiled"), ("met", "eager"), ("met", "compiled"), ("met", "compiled"),
    ]  # fmt: skip
    assert gpu_report.goals(both)[1]["found"] == round(6.0 / 5.9, 4)
    cases["unguided, batch 1"]["step"]["ms"] = 3.5
    cases["guided, batch 1"] |= {"iterations_a_second": 199.9, "loop_overhead": 0.01}
    del cases["guided, batch 4"]
    states = [g["state"] for g in gpu_report.goals({"torch-sd15": part})]
    assert states == ["missed"] * 3 + ["not measured"]
    assert [(g["state"], g["by"]) for g in gpu_report.goals({})] == [("not measured", None)] * 4


def test_the_table_shows_measured_failed_and_skipped_parts() -> None:
    cases = {"guided, batch 1": case(4.0, 80.4, 400 * 10**9), "CFG, batch 1": {"failed": "OutOfMemoryError: no"}}
    document = {
        "gpu": {"name": "NVIDIA Test 9", "sm": "sm_99"}, "goals": gpu_report.goals({}),
        "parts": {
            "roof": {"ran": True, "complete": False, "why": "it took more than 5 s", "fp16_matmul_tflops": 790.0},
            "torch-sd15": {"ran": True, "complete": True, "precision": "fp16", "steps": 20, "cases": cases},
            "torch-sdxl": {
                "ran": True, "complete": False, "why": "it took more than 75 s", "precision": "fp16", "steps": 10,
                "cases": {"CFG, batch 1": {"step": {"ms": 34.5}, "compile": {"seconds": 61.25}}},
            },
            "trt-sd15": {"ran": False, "why": "missing packages: tensorrt"},
            "tests": {"ran": True, "complete": True, "modules": {
                "a.py": {"exit": 0, "said": ["3 passed"]}, "b.py": "stopped after 9 s",
            }},
        },
    }  # fmt: skip
    shown = gpu_report.table(document)
    for text in (
        "790.0 fp16 TFLOP/s", "roof: stopped: it took more than 5 s", "250.0", "0.0050", "failed: OutOfMemoryError",
        "trt-sd15: not run: missing packages: tensorrt", "a.py: 3 passed", "SDXL, fp16", "34.500", "61.2",
        "it took more than 75 s", "b.py: stopped", "not measured",
    ):  # fmt: skip
        assert text in shown
