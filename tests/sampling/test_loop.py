"""The host's loop: bit-equal to the schedule's own steps, and no allocation of a latent's size in a step."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pnp_trt.errors import Cancelled
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.sampling.loop import HostLoop
from pnp_trt.sampling.network import Bound
from pnp_trt.sampling.schedules import SCHEDULES, Schedule, make

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}


class Toy(Bound):
    """A network of plain arithmetic; ``shares`` states whether the host may write into its inputs' memory."""

    def __init__(self, shape: tuple[int, ...], shares: bool) -> None:
        self.inputs = {"sample": np.zeros(shape, np.float32), "timestep": np.zeros(shape[:1], np.int64)}
        self.shares = shares
        self.made = np.zeros(shape, np.float32)
        self.runs = 0

    def write(self, **inputs: np.ndarray) -> None:
        for name, array in inputs.items():
            assert array.shape == self.inputs[name].shape
            np.copyto(self.inputs[name], array)

    def run(self) -> None:
        self.runs += 1
        self.made[:] = predict(self.inputs["sample"], self.inputs["timestep"])

    def read(self) -> np.ndarray:
        return self.made.copy()

    def host_input(self, name: str) -> np.ndarray | None:
        return self.inputs[name] if self.shares else None

    def output(self) -> np.ndarray:
        return self.made if self.shares else self.read()


def predict(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    share = np.float32(0.1) * np.arange(len(x), dtype=np.float32)[:, None, None, None]
    return np.sin(x + share) + t[:, None, None, None].astype(np.float32) / np.float32(1000)


def by_the_book(table: Schedule, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    """Run the loop with the methods of ``Schedule``."""
    previous: Any = None
    for i, t in enumerate(table.timesteps):
        shown = table.scaled(i, x)
        if w is None:
            output = predict(shown, np.full(len(x), t))
        else:
            both = predict(np.concatenate([shown, shown]), np.full(2 * len(x), t))
            u, c = both[: len(x)], both[len(x) :]
            output = u + w[:, None, None, None] * (c - u)
        x, previous = table.step(i, x, output, previous)
    return x


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(SCHEDULES)), steps=st.integers(1, 30), twice=st.booleans(), shares=st.booleans(),
    seed=st.integers(0, 99), strength=st.sampled_from([1.0, 0.7]),
)  # fmt: skip
def test_the_loop_is_bit_equal_to_the_schedules_steps(
    name: str, steps: int, twice: bool, shares: bool, seed: int, strength: float
) -> None:
    table = make(name, SCHEDULER, steps)
    if int(steps * strength) > 0:
        table = table.start(strength)
    draw = np.random.default_rng(seed)
    start = draw.standard_normal((2, 4, 3, 5), np.float32) * np.float32(table.init_scale)
    w = np.array([2.0, 7.5], np.float32) if twice else None
    toy = Toy((4, 4, 3, 5) if twice else (2, 4, 3, 5), shares)
    loop = HostLoop(toy, table, start.shape, w)
    original = start.copy()
    first = loop.run(start)
    np.testing.assert_array_equal(first, by_the_book(table, start, w))
    np.testing.assert_array_equal(start, original)
    again = loop.run(start)  # no state of the first run is left
    np.testing.assert_array_equal(again, first)
    assert again is not first and toy.runs == 2 * len(table)


def test_a_step_allocates_no_memory_of_a_latents_size() -> None:
    shape = (1, 4, 64, 64)
    table = make("dpm++", SCHEDULER, 6)
    toy = Toy(shape, shares=True)
    toy.run = lambda: None  # type: ignore[method-assign]
    loop = HostLoop(toy, table, shape)
    start = np.zeros(shape, np.float32)
    peaks: list[int] = []

    def watch(*_: int) -> None:
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()

    tracemalloc.start()
    try:
        loop.run(start, watch)
    finally:
        tracemalloc.stop()
    assert max(peaks) < start.nbytes // 4


def test_a_callback_that_returns_false_cancels_the_loop() -> None:
    toy = Toy((1, 4, 2, 2), shares=True)
    loop = HostLoop(toy, make("ddim", SCHEDULER, 9), (1, 4, 2, 2))
    with pytest.raises(Cancelled, match="cancelled after 4 of 9 steps"):
        loop.run(np.zeros((1, 4, 2, 2), np.float32), lambda done, _: done < 4)
    assert toy.runs == 4


def test_onnx_runtime_reads_and_writes_the_hosts_memory(micro_bundles: Path) -> None:
    pipeline = Pipeline.load(micro_bundles / "guided", provider="cpu")
    with pipeline._unet.bind(2, (4, 4)) as bound:
        shown = bound.host_input("sample")
        assert shown is not None
        address, out = shown.ctypes.data, bound.output().ctypes.data
    with pipeline._unet.bind(2, (4, 4)) as again:  # the same buffers for every image
        reused = again.host_input("sample")
        assert reused is not None and reused.ctypes.data == address and again.output().ctypes.data == out
        with pipeline._unet.bind(2, (4, 4)) as second:  # and others for a concurrent image
            other = second.host_input("sample")
            assert other is not None and other.ctypes.data != address
