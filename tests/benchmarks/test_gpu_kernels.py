"""The sampler's kernels and captured steps on a real GPU, without an engine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import gpu


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_capture_equals_numpy_for_every_schedule() -> None:
    pytest.importorskip("cuda.bindings.runtime")
    record = gpu.kernels(rounds=2, steady=1, all_steps=(3, 8))
    assert record.pop("equal_to_numpy") == {"show": True, "update": True, "check": True, "to_bytes": True}
    assert len(record) == 10
    for row in record.values():
        assert row["equal_to_numpy"] == {"eager": True, "captured": True}
        assert row["captures"] == 1, row["why_not"]
