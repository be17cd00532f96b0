"""Inference runtimes behind one interface (``base``); each package imports its runtime lazily."""

from __future__ import annotations

from ..registry import Registry
from .base import Backend

#: backend classes by name
BACKENDS: Registry[type[Backend]] = Registry(
    "backends",
    "backend",
    {
        "onnxruntime": "pnp_trt.backends.onnxruntime.backend:OnnxRuntime",
        "tensorrt-rtx": "pnp_trt.backends.tensorrt.backend:TensorRtRtx",
        "tensorrt": "pnp_trt.backends.tensorrt.backend:TensorRt",
        "torch": "pnp_trt.backends.torch.backend:Torch",
    },
)


def get(name: str) -> Backend:
    """The backend of this name.

    Raises:
        InputError: listing the known ones.
    """
    return BACKENDS.get(name)()
