"""SDXL's additional conditions in half precision: concatenated tensors have one dtype, as TensorRT requires."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pnp_trt.models.bases import resolve
from pnp_trt.models.student import Teacher
from pnp_trt.precision.recipes import FP16, convert


def test_concatenated_tensors_have_one_dtype(micro_sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = resolve(str(micro_sdxl))
    teacher = convert(Teacher(base.unet()), FP16)
    seen: list[set[torch.dtype]] = []
    real = torch.concat

    def concat(tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
        seen.append({t.dtype for t in tensors})
        return real(tensors, dim=dim)

    monkeypatch.setattr(torch, "concat", concat)
    added = base.golden_added(torch.Generator().manual_seed(0), 1, (32, 32))
    with torch.no_grad():
        out = teacher(torch.zeros(1, 4, 8, 8), torch.tensor([5]), torch.zeros(1, 77, 32), **added)
    assert out.dtype == torch.float32 and seen == [{torch.float32}]
