"""A torch module's parity is measured on the GPU if there is one with enough memory, else on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pnp_trt.build import modules


class Watched(torch.nn.Module):
    """Doubles its input, and records where it is moved and whether TensorFloat-32 was on when it ran."""

    def __init__(self, full: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))
        self.sent: list[Any] = []
        self.tf32: list[bool] = []
        self.full = full

    def to(self, *where: Any, **_: Any) -> Any:
        self.sent += where
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.tf32.append(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
        if self.full and len(self.sent) == 1:
            raise torch.OutOfMemoryError("no")
        return x * self.weight


@pytest.mark.parametrize("full", [False, True])
def test_the_gpu_is_tried_first(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(modules, "_GPU", "cpu:0")  # instead of a real GPU
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    module, x = Watched(full), torch.tensor([1.0, 2.0])
    assert modules.relative_error(module, {"x": x}, np.array([2.0, 4.0], np.float32)) == 0
    assert module.sent == ["cpu:0", "cpu"] and module.tf32[0] is False and len(module.tf32) == 1 + full
    assert torch.backends.cudnn.allow_tf32  # restored


def test_without_a_gpu_the_module_is_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module = Watched()
    error = modules.relative_error(module, {"x": torch.tensor([1.0])}, np.array([1.0], np.float32))
    assert error == 1 and module.sent == []
