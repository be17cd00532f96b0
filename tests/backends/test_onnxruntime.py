"""CPU sessions of ONNX Runtime when memory is short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from benchmarks.openvino import inputs_of
from pnp_trt.backends.onnxruntime import backend
from pnp_trt.backends.onnxruntime.backend import OrtNetwork


@pytest.mark.parametrize(("free", "packed"), [(0.0, False), (float("inf"), True)], ids=["short", "enough"])
def test_weights_are_prepacked_only_if_memory_suffices(
    free: float, packed: bool, micro_bundles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = micro_bundles / "guided" / "unet.onnx"
    usual = OrtNetwork(path, "cpu", 1)
    inputs = inputs_of(usual, 2)
    expected = usual(**inputs)
    entries: dict[str, str] = {}

    class Options(ort.SessionOptions):
        def add_session_config_entry(self, key: str, value: str) -> None:
            entries[key] = value
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(ort, "SessionOptions", Options)
    monkeypatch.setattr(backend, "_LARGE", 0)
    monkeypatch.setattr(backend.memory, "free", lambda: free)
    np.testing.assert_allclose(OrtNetwork(path, "cpu", 1)(**inputs), expected, rtol=1e-4, atol=1e-5)
    assert ("session.disable_prepacking" in entries) == (not packed)
