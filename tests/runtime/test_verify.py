"""Comparison with golden outputs, also for networks that do not take every batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pnp_trt.bundle.golden_file import difference
from pnp_trt.bundle.manifest import CompileRecord, NetworkParity, NetworkRecord
from pnp_trt.bundle.profiles import Profile
from pnp_trt.errors import PnpError
from pnp_trt.runtime.verify import compare, gate


class Doubler:
    """A network that doubles latents, and accepts only batches that its profiles cover."""

    def __init__(self, profiles: list[Profile]) -> None:
        self.profiles = profiles
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        assert any(p.holds(len(latents), (latents.shape[2], latents.shape[3])) for p in self.profiles)
        self.seen.append(latents.shape)
        return 2 * latents


class Backend:
    """A backend that always loads the same network."""

    def __init__(self, network: Doubler) -> None:
        self.network = network

    def load(self, file: Path, entry: Any, options: Any) -> Doubler:
        return self.network


def test_rows_are_repeated_if_no_profile_takes_a_single_one() -> None:
    profiles = [Profile.parse("b2-8@8"), Profile.parse("b4@16")]
    network = Doubler(profiles)
    record = NetworkRecord(
        graph="unet.onnx", precision="fp32", inputs={}, outputs={}, parity=NetworkParity(0.0, 1e-4, 2),
        file="unet.engine", profiles=tuple(profiles),
    )  # fmt: skip
    networks = {"unet": record}
    generator = np.random.default_rng(0)
    small, large = generator.normal(size=(2, 4, 8, 8)), generator.normal(size=(2, 4, 16, 16))
    golden: Any = {"unet": ({"latents": small}, 2 * small), "unet@16x16": ({"latents": large}, 2 * large + 1)}
    errors = compare(Backend(network), Path(), networks, golden)  # type: ignore[arg-type]
    assert [s[0] for s in network.seen] == [2, 2, 4, 4]
    assert errors["unet"] == 0 and errors["unet@16x16"] > 0.1


def test_zeros_equal_only_zeros_and_nan_equals_nothing() -> None:
    zeros, ones, bad = np.zeros(3), np.ones(3), np.full(3, np.nan)
    assert difference(zeros, zeros) == 0 and difference(ones, ones) == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        assert (
            difference(ones, zeros) == np.inf and np.isnan(difference(bad, zeros)) and np.isnan(difference(zeros, bad))
        )


def test_tensor_float32_has_the_tolerance_of_float16() -> None:
    """A decoder beyond float16's range computes in TensorFloat-32, which has float16's mantissa."""

    def record(**notes: Any) -> dict[str, NetworkRecord]:
        parity = NetworkParity(0.0, 1e-4, 1)
        return {"vae_decoder": NetworkRecord("v.onnx", "fp32", {}, {}, parity, "off by nan in fp16",
                                             compiled=CompileRecord(notes=notes))}  # fmt: skip

    assert record()["vae_decoder"].float32_for_range
    assert not NetworkRecord("v.onnx", "fp32", {}, {}, NetworkParity(0.0, 1e-4, 1)).float32_for_range
    gate({"vae_decoder": 1e-3}, record(tensor_float32=True), "x")
    for errors, notes in (({"vae_decoder": 6e-3}, {"tensor_float32": True}), ({"vae_decoder": 1e-3}, {}),
                          ({"vae_decoder": float("nan")}, {"tensor_float32": True})):  # fmt: skip
        with pytest.raises(PnpError, match="the vae_decoder differs from PyTorch"):
            gate(errors, record(**notes), "x")
