"""The estimate of a run's duration, with fake clocks."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from pnp_trt.bench.measure.latency import Case
from pnp_trt.bench.measure.pace import ProgressMeter, about, trial


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Pipe:
    """A fake pipeline whose step takes 0.1 s, and 0.05 s more for each image."""

    clock: Clock
    name: str = "p"
    methods: tuple[str, ...] = ("cfg",)
    loops: list[tuple[int, int]] = field(default_factory=list)

    def encode(self, prompts: list[str]) -> np.ndarray:
        return np.zeros((len(prompts), 2, 2), np.float32)

    def noise(self, seeds: list[int], size: object = None) -> np.ndarray:
        return np.zeros((len(seeds), 1, 2, 2), np.float32)

    def denoise(self, context: np.ndarray, noise: np.ndarray, *, steps: int, **_: object) -> np.ndarray:
        self.loops.append((len(noise), steps))
        self.clock.now += steps * (0.1 + 0.05 * len(noise))
        return noise

    def decode(self, latents: np.ndarray) -> np.ndarray:
        raise AssertionError("a trial decodes nothing")


@pytest.mark.parametrize("largest", [2, 4, 32])
def test_a_trial_separates_the_fixed_time_from_the_time_per_image(largest: int) -> None:
    clock = Clock()
    pipe = Pipe(clock)
    pace = trial(Case(pipe, "cfg"), ["a cat"], 3.0, largest, clock)
    assert pace.seconds(images=8, steps=10) == pytest.approx(10 * (0.1 + 0.05 * 8))
    assert {batch for batch, _ in pipe.loops} == {1, min(4, largest)}


def test_an_engine_of_batch_size_1_is_tried_at_1() -> None:
    clock = Clock()
    assert trial(Case(Pipe(clock), "cfg"), ["a"], 3.0, 1, clock).seconds(1, 4) == pytest.approx(0.6)


def test_the_time_left_follows_the_measured_pace() -> None:
    clock, reports = Clock(), []
    meter = ProgressMeter({"a": 10.0, "b": 30.0}, lambda *what: reports.append(what), clock)
    assert meter.total == meter.left == 40
    meter.begin("a", "timing a")
    assert reports[-1] == ("timing a (about 40 s left)", 0, 40)
    meter.within(1, 2)
    assert reports[-1][1] == 5
    clock.now = 20.0  # twice as slow as estimated
    meter.end("a")
    # the remaining 30 s times (20 + 2) / (10 + 2), as if a twentieth of the run had matched the estimate
    assert meter.left == pytest.approx(55)
    meter.begin("b", "timing b")
    assert reports[-1] == ("timing b (about 55 s left)", 10, 40)
    meter.end("b")
    assert meter.left == 0


def test_jobs_of_an_earlier_process_do_not_affect_the_pace() -> None:
    clock = Clock()
    meter = ProgressMeter({"a": 100.0, "b": 10.0, "c": 10.0}, None, clock)
    meter.end("a", resumed=True)
    assert meter.left == 20
    clock.now = 30.0
    meter.end("b")
    assert meter.left == pytest.approx(10 * (30 + 6) / (10 + 6))


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "about 1 s"), (61, "about 61 s"), (600, "about 10 min"),
                                               (9000, "about 2.5 h")])  # fmt: skip
def test_durations_are_given_in_readable_units(seconds: float, text: str) -> None:
    assert about(seconds) == text
