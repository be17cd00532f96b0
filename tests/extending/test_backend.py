"""A backend from outside the package, with ``build``, ``verify`` and ``sample``.

Oracle: ONNX Runtime's images of the same base, prompt and seed; ONNX's reference evaluator shares no kernel with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pnp_trt.runtime.pipeline import Pipeline

from ..conftest import Result


def test_build_verify_and_sample(
    pnp_trt: Callable[..., Result], micro_base: Path, micro_bundles: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    done = pnp_trt(
        "build", "--base", micro_base, "--guide", "none", "--backend", "onnx-reference", "--out", bundle
    )  # fmt: skip
    assert done.code == 0, done.err
    done = pnp_trt("verify", bundle)
    assert done.code == 0, done.err
    done = pnp_trt("sample", "a red cat", "--engine", bundle, "--steps", 2, "--seed", 3, "--quiet", "--out", tmp_path)
    assert done.code == 0, done.err
    pixels = np.asarray(Image.open(done.out.strip()).convert("RGB"))
    plain = Pipeline.load(micro_bundles / "plain", provider="cpu", threads=1)
    expected = plain("a red cat", steps=2, seed=3)[0].pixels
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 1
    refused = pnp_trt(
        "build", "--base", micro_base, "--guide", "none", "--backend", "onnx-reference", "--precision", "fp16",
        "--out", tmp_path / "no",
    )  # fmt: skip
    assert refused.code == 2 and "'onnx-reference' does not support fp16; it supports: fp32" in refused.err


def test_doctor_lists_the_backend(pnp_trt: Callable[..., Result]) -> None:
    checks = {check["name"]: check for check in json.loads(pnp_trt("doctor", "--json").out)["checks"]}
    assert checks["--backend onnx-reference"]["state"] == "ok"
