"""PyTorch modules, eager or compiled."""

from __future__ import annotations

from ..needs import Needs

NEEDS = Needs("PyTorch, as a reference and for GPUs without TensorRT", "build")
