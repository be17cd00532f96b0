"""A precision recipe from outside the package, through ``pnp-trt build``.

Oracle: rounding to bfloat16 by integer arithmetic on the bits of the base's weights (half to even).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import load_file

from pnp_trt.bundle.store import read_manifest

from ..conftest import Result


def rounded(values: np.ndarray) -> np.ndarray:
    """Round float32 values to 8 significant bits, ties to even."""
    bits = values.view(np.uint32).astype(np.uint64)
    even = (bits >> 16) & 1
    return (((bits + 0x7FFF + even) >> 16) << 16).astype(np.uint32).view(np.float32)


def test_build_and_sample(pnp_trt: Callable[..., Result], micro_base: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    done = pnp_trt("build", "--base", micro_base, "--guide", "none", "--precision", "bf16-rounded", "--out", bundle)
    assert done.code == 0, done.err
    manifest = read_manifest(bundle)
    assert manifest.precision == "bf16-rounded" and manifest.parity.limit == 2e-2
    assert all(1e-5 < error < 2e-2 for error in manifest.parity.relative_error.values())
    graph = onnx.load(bundle / "unet.onnx")
    weights = {i.name.removeprefix("unet."): numpy_helper.to_array(i) for i in graph.graph.initializer}
    base = load_file(micro_base / "unet" / "diffusion_pytorch_model.safetensors")
    same = [name for name, value in base.items() if name in weights and weights[name].shape == value.shape]
    assert len(same) > 20
    for name in same:
        np.testing.assert_array_equal(weights[name], rounded(base[name]))
    assert any((rounded(base[name]) != base[name]).any() for name in same)
    done = pnp_trt("sample", "a cat", "--engine", bundle, "--steps", 2, "--quiet", "--out", tmp_path / "images")
    assert done.code == 0 and Path(done.out.strip()).is_file(), done.err
    refused = pnp_trt("build", "--base", micro_base, "--precision", "bf17", "--out", tmp_path / "no")
    assert refused.code == 2 and "fp32, fp16, bf16, int8, int8-weights, fp8, bf16-rounded" in refused.err
