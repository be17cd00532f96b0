"""The MAC counter against hand counts and against the published figures of SD 1.x."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pnp_trt.bench.measure import cost
from pnp_trt.bench.measure.networks import networks
from pnp_trt.errors import InputError

torch = pytest.importorskip("torch")

#: The public configuration of runwayml/stable-diffusion-v1-5's U-Net.
SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


class Attention(torch.nn.Module):
    """Attention only; `fused`, or spelt out as two matrix products."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.fused:
            return torch.nn.functional.scaled_dot_product_attention(query, key, value=value)
        return torch.softmax(query @ key.transpose(-1, -2), dim=-1) @ value


class OnPermuted(torch.nn.Module):
    """A linear layer on a non-contiguous input, as after a convolution: torch may run it as a batched product."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 10, bias=False)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.linear(sample.flatten(2).transpose(1, 2))


def test_convolution_by_hand() -> None:
    module = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
    assert cost.count(module, (torch.zeros(1, 3, 16, 16),)) == cost.Cost(
        parameters=8 * 3 * 9 + 8, macs=8 * 8 * 8 * 3 * 9, macs_without_attention=8 * 8 * 8 * 3 * 9
    )


def test_grouped_convolution_by_hand() -> None:
    module = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    assert cost.count(module, (torch.zeros(1, 8, 4, 4),)).macs == 8 * 9 * 16


@pytest.mark.parametrize("bias", [True, False])
def test_linear_by_hand(bias: bool) -> None:
    counted = cost.count(torch.nn.Linear(6, 10, bias=bias), (torch.zeros(1, 7, 6),))
    assert counted == cost.Cost(60 + 10 * bias, 7 * 60, 7 * 60)


def test_linear_on_a_permuted_input_is_still_linear() -> None:
    counted = cost.count(OnPermuted(), (torch.zeros(2, 6, 4, 4),))
    assert counted.macs == counted.macs_without_attention == 2 * 16 * 60


@pytest.mark.parametrize("fused", [True, False])
def test_attention_by_hand(fused: bool) -> None:
    query, key, value = torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 9, 4), torch.zeros(1, 2, 9, 3)
    counted = cost.count(Attention(fused), {"query": query, "key": key, "value": value})
    assert counted == cost.Cost(0, macs=2 * 5 * 9 * 4 + 2 * 5 * 9 * 3, macs_without_attention=0)


def test_attention_inside_another_torch_function() -> None:
    module = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    sequence = torch.zeros(1, 5, 8)
    counted = cost.count(module, {"query": sequence, "key": sequence, "value": sequence})
    assert counted.macs_without_attention == 4 * 5 * 8 * 8
    assert counted.macs == counted.macs_without_attention + 2 * 5 * 5 * 8


def test_counting_does_not_change_the_module() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).train()
    before = module[0].weight
    cost.count(module, (torch.zeros(1, 4),))
    assert module.training
    assert module[0].weight is before
    assert before.device.type == "cpu"
    assert module[1].running_mean is not None
    assert module[1].running_mean.device.type == "cpu"


def test_wrong_shape_is_refused_in_one_sentence() -> None:
    with pytest.raises(InputError, match="Linear cannot be counted"):
        cost.count(torch.nn.Linear(4, 4), (torch.zeros(1, 5),))


def test_sd15_matches_the_published_figures() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**SD15)
    counted = cost.count(
        unet,
        {
            "sample": torch.zeros(1, 4, 64, 64),
            "timestep": torch.tensor([1]),
            "encoder_hidden_states": torch.zeros(1, 77, 768),
        },
    )
    assert counted.parameters == pytest.approx(859.52e6, rel=2e-5)
    assert counted.macs_without_attention == pytest.approx(338.61e9, rel=2e-3)
    assert counted.macs == pytest.approx(401.64e9, rel=2e-3)


def test_rows_and_methods() -> None:
    one = (torch.zeros(1, 4),)
    rows = cost.cost_rows(
        {
            "teacher": (torch.nn.Linear(4, 100), one),
            "guide-tiny": (torch.nn.Linear(4, 5), one),
            "condition-full": (torch.nn.Linear(4, 25), one),
            "guide-full": (torch.nn.Linear(4, 50), one),
            "text-encoder": (torch.nn.Linear(4, 2), one),
            "vae-decoder": (torch.nn.Linear(4, 3), one),
        }
    )
    assert rows[0] == {
        "network": "teacher",
        "parameters": 500,
        "macs": 400,
        "macs_without_attention": 400,
        "per": "step",
    }
    assert [row["per"] for row in rows] == ["step", "step", "image", "step", "image", "image"]
    cfg, _, fewer, unguided, guided, full = cost.method_rows(rows, steps=10)
    assert (cfg["method"], cfg["macs_per_step"], cfg["macs_per_image"]) == ("cfg", 800, 8000 + 8 + 12)
    assert (unguided["macs_per_step"], unguided["macs_per_image"]) == (400, 4000 + 8 + 12)
    assert (guided["guide"], guided["macs_per_step"], guided["parameters"]) == ("guide-tiny", 420, 525)
    assert (cfg["ratio_to_cfg"], unguided["ratio_to_cfg"], guided["ratio_to_cfg"]) == (1.0, 0.5, 0.525)
    assert guided["image_includes"] == ["text-encoder", "vae-decoder"]
    assert (full["macs_per_step"], full["macs_per_image"]) == (600, 6000 + 8 + 12 + 100)  # its condition runs once
    assert full["image_includes"] == ["text-encoder", "vae-decoder", "condition-full"]
    assert (fewer["steps"], fewer["macs_per_step"], fewer["ratio_to_cfg"]) == (5, 800, 0.5)


def test_methods_whose_steps_differ_by_hand() -> None:
    rows = cost.cost_rows({"teacher": (torch.nn.Linear(4, 100), (torch.zeros(1, 4),))})
    by_method = {row["method"]: row for row in cost.method_rows(rows, steps=5, guided_steps=2)}
    assert {name: row["evaluations"] for name, row in by_method.items()} == {
        "cfg": 10, "cfg-two-passes": 10, "cfg-interval": 7, "cfg-fewer-steps": 4, "unguided": 5,
    }  # fmt: skip
    assert by_method["cfg-interval"]["macs_per_image"] == 7 * 400
    assert by_method["cfg-interval"]["macs_per_step"] == 560
    assert by_method["cfg-interval"]["ratio_to_cfg"] == pytest.approx(0.7)
    assert by_method["cfg-fewer-steps"]["ratio_to_cfg"] == pytest.approx(0.4)
    assert by_method["cfg-two-passes"]["networks"] == ["teacher", "teacher"]
    assert cost.method_rows(rows, steps=1)[2]["evaluations"] == 2  # half of one step is one step
    two = cost.method_rows(rows, steps=5, evaluations=lambda steps: 2 * steps - 1)[0]  # Heun's
    assert (two["method"], two["evaluations"], two["steps"], two["ratio_to_cfg"]) == ("cfg", 18, 5, 1)


@settings(max_examples=50)
@given(steps=st.integers(1, 200), share=st.floats(0, 1))
def test_the_interval_lies_between_unguided_and_cfg(steps: int, share: float) -> None:
    rows = [{"network": "teacher", "parameters": 7, "macs": 1000, "macs_without_attention": 900}]
    by_method = {r["method"]: r for r in cost.method_rows(rows, steps=steps, guided_steps=int(share * steps))}
    assert (
        by_method["unguided"]["ratio_to_cfg"]
        <= by_method["cfg-interval"]["ratio_to_cfg"]
        <= by_method["cfg"]["ratio_to_cfg"]
    )
    assert by_method["cfg-interval"]["macs_per_image"] == 1000 * by_method["cfg-interval"]["evaluations"]


def test_the_published_table_is_matched_within_two_thousandths() -> None:
    pytest.importorskip("diffusers")
    rows = cost.cost_rows(networks("random:sd15"))
    by_figure = {row["what"]: row for row in cost.published_rows("random:sd15", rows)}
    assert {what: (row["published"], row["published_unit_printed"]) for what, row in by_figure.items()} == {
        "teacher, per step": (338.7, "TFLOPs"), "teacher x 2 (CFG), per step": (677.5, "TFLOPs"),
        "full guide, per step": (116.5, "TFLOPs"), "teacher + full guide, per step": (455.2, "TFLOPs"),
        "tiny guide, per step": (7.79, "TFLOPs"), "teacher + tiny guide, per step": (346.49, "TFLOPs"),
        "teacher, parameters": (859, "M"), "full guide, parameters": (361, "M"), "tiny guide, parameters": (8.27, "M"),
    }  # fmt: skip
    for what, row in by_figure.items():
        if "tiny" in what:
            assert row["relative_difference"] is None
            assert row["note"].startswith("not comparable")
            assert 0 < row["counted"] < row["published"]  # this project's guide is smaller
        else:
            assert abs(row["relative_difference"]) < 2e-3, what
            assert row["relative_difference"] == pytest.approx(row["counted"] / row["published"] - 1, abs=1e-5)
    assert by_figure["full guide, per step"]["counted"] == pytest.approx(116.42, abs=0.005)
    assert "109.06" in by_figure["full guide, per step"]["note"]


@pytest.mark.parametrize(("base", "teacher", "full"), [("sd21", 865.91, 364.23), ("sdxl", 2567.46, 1251.01)])
def test_other_bases_are_counted_and_have_no_published_figures(base: str, teacher: float, full: float) -> None:
    pytest.importorskip("diffusers")
    rows = cost.cost_rows(networks(f"random:{base}"))
    millions = {row["network"]: row["parameters"] / 1e6 for row in rows}
    assert {"teacher", "guide-full", "guide-tiny"} <= set(millions)
    assert millions["teacher"] == pytest.approx(teacher, rel=2e-5)  # as the public checkpoints have
    assert millions["guide-full"] == pytest.approx(full, rel=2e-5)
    assert all(row["macs"] >= row["macs_without_attention"] > 0 for row in rows)
    assert cost.published_rows(f"random:{base}", rows) == []


def test_methods_need_a_teacher_and_steps() -> None:
    with pytest.raises(InputError, match="needs the network 'teacher', got guide-tiny"):
        cost.method_rows([{"network": "guide-tiny", "parameters": 1, "macs": 1, "macs_without_attention": 1}], steps=8)
    with pytest.raises(InputError, match="at least 1"):
        cost.method_rows([], steps=0)
    with pytest.raises(InputError, match="from 0 to the 4 steps, got 5"):
        cost.method_rows([], steps=4, guided_steps=5)
    with pytest.raises(InputError, match="no network"):
        cost.cost_rows({})
