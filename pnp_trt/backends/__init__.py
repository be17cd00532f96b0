"""Inference runtimes behind one small interface (``base``); each module imports its runtime lazily."""

from __future__ import annotations

import importlib

from ..errors import InputError
from .base import Backend

#: name → (module, class)
_KNOWN = {
    "onnxruntime": ("onnxruntime.backend", "OnnxRuntime"),
    "tensorrt-rtx": ("tensorrt.backend", "TensorRtRtx"),
    "tensorrt": ("tensorrt.backend", "TensorRt"),
    "torch": ("torch.backend", "Torch"),
}

BACKENDS: tuple[str, ...] = tuple(_KNOWN)


def get(name: str) -> Backend:
    """The backend of this name.

    Raises:
        InputError: listing the known ones.
    """
    if name not in _KNOWN:
        raise InputError(f"backend is '{name}'; known: {', '.join(BACKENDS)}")
    module, kind = _KNOWN[name]
    backend: Backend = getattr(importlib.import_module(f"{__name__}.{module}"), kind)()
    return backend
