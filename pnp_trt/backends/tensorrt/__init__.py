"""TensorRT and TensorRT for RTX: compiling, loading and refitting engines."""

from __future__ import annotations

from ..needs import Needs

NEEDS = Needs("compiles on the GPU that runs it", "tensorrt", "nothing")
NEEDS_RTX = Needs("compiles for any RTX GPU on any machine", "rtx", "compiles")
