"""ONNX Runtime: the embedded default, on CPU and CUDA."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, PnpError


def cuda_driver_present() -> bool:
    """Whether the NVIDIA driver library loads (without it the CUDA provider only prints warnings)."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def providers(wanted: str = "auto") -> list[str]:
    """Execution providers for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        InputError: for another word, or for ``cuda`` where none is usable.
    """
    import onnxruntime as ort

    usable = "CUDAExecutionProvider" in ort.get_available_providers() and cuda_driver_present()
    if wanted == "cpu" or (wanted == "auto" and not usable):
        return ["CPUExecutionProvider"]
    if wanted not in ("auto", "cuda"):
        raise InputError(f"provider is '{wanted}'; known: auto, cpu, cuda")
    if not usable:
        raise InputError(
            "provider 'cuda' was asked for and no NVIDIA driver was found; use --provider cpu, see pnp-trt doctor"
        )
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


class Network:
    """One ONNX graph, run by one session per batch size.

    Fixing the batch lets ONNX Runtime fold every shape computation away, which is a tenth of a small
    network's time.  Sessions are made when a batch size is first seen, and the last few are kept.
    """

    KEEP = 4

    def __init__(self, path: Path, provider: str = "auto", threads: int | None = None) -> None:
        self.path = path
        self._providers = providers(provider)
        self._threads = threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads or 0
        self._sessions: dict[int, Any] = {}
        self._lock = threading.Lock()

    def session(self, batch: int) -> Any:
        """The session for ``batch``."""
        import onnxruntime as ort

        with self._lock:
            if batch not in self._sessions:
                options = ort.SessionOptions()
                options.intra_op_num_threads = self._threads
                options.log_severity_level = 3
                options.add_free_dimension_override_by_name("batch", batch)
                try:
                    made = ort.InferenceSession(str(self.path), options, providers=self._providers)
                except Exception as e:  # ONNX Runtime raises several types of its own
                    raise PnpError(f"ONNX Runtime cannot load {self.path}: {e}") from e
                while len(self._sessions) >= self.KEEP:
                    self._sessions.pop(next(iter(self._sessions)))
                self._sessions[batch] = made
            return self._sessions[batch]

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        """The first output for named inputs that share their first dimension."""
        batch = len(next(iter(inputs.values())))
        return self.session(batch).run(None, inputs)[0]
