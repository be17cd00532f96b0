"""The largest values of a U-Net and a guide: against a layer whose output is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import float16_range


class Scaled(nn.Module):
    """A layer that doubles, then one that takes 50 away."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.less = nn.Linear(1, 1), nn.Linear(1, 1)
        for layer, weight, bias in ((self.twice, 2.0, 0.0), (self.less, 1.0, -50.0)):
            nn.init.constant_(layer.weight, weight)
            nn.init.constant_(layer.bias, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.less(self.twice(x))


def test_the_largest_value_is_of_the_part_that_is_asked_for() -> None:
    model, x = Scaled(), torch.tensor([[-30.0]])
    assert float16_range.largest(model, model, {"x": x}) == 110.0  # 2 · -30 - 50
    assert float16_range.largest(model, model.twice, {"x": x}) == 60.0
    assert not model.twice._forward_hooks


def test_a_record(micro_base: Path, micro_guide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    float16_range.main(["--base", str(micro_base), "--guide", str(micro_guide), "--json", str(out)])
    found = json.loads(out.read_text())
    assert found["float16_largest"] == 65504 and 0 < found["largest"]["unet"] < 65504
    assert list(found["largest"]["guide"]) == ["2", "7.5"] and found["largest"]["guide"]["2"] > 0
    assert "float16 ends at 65,504" in capsys.readouterr().out
