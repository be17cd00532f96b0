"""ONNX Runtime on the CPU and CUDA providers."""

from __future__ import annotations

from ..needs import Needs

NEEDS = Needs("fp32 and fp16, on the CPU or a GPU")
