"""Largest activations of a U-Net and a guide, checked on layers with known outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import float16_range


class Scaled(nn.Module):
    """A layer that doubles its input, then one that subtracts 50."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.less = nn.Linear(1, 1), nn.Linear(1, 1)
        for layer, weight, bias in ((self.twice, 2.0, 0.0), (self.less, 1.0, -50.0)):
            nn.init.constant_(layer.weight, weight)
            nn.init.constant_(layer.bias, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.less(self.twice(x))


def test_the_largest_value_is_that_of_the_requested_part() -> None:
    model, x = Scaled(), torch.tensor([[-30.0]])
    assert float16_range.largest(model, model, {"x": x}) == 110.0  # 2 · -30 - 50
    assert float16_range.largest(model, model.twice, {"x": x}) == 60.0
    assert not model.twice._forward_hooks


def test_a_record_has_the_largest_values_of_unet_and_guide(
    micro_base: Path, micro_guide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    float16_range.main(["--base", str(micro_base), "--guide", str(micro_guide), "--json", str(out)])
    record = json.loads(out.read_text())
    assert record["float16_largest"] == 65504 and 0 < record["largest"]["unet"] < 65504
    assert list(record["largest"]["guide"]) == ["2", "7.5"] and record["largest"]["guide"]["2"] > 0
    assert "float16 ends at 65,504" in capsys.readouterr().out
