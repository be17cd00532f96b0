"""The timing harness on fakes with a clock of their own: nothing here is timed for real."""

from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np
import pytest

from pnp_trt.bench.latency import BOUNDARY, Case, measure
from pnp_trt.errors import InputError

COST_MS = {"cfg": 20.0, "unguided": 10.0, "guided": 11.0}


class World:
    """A clock that only moves when a fake works, at a speed that changes from round to round."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now


class Fake:
    """A pipeline whose loop takes a fixed time per step and picture, times a drift shared by a whole round."""

    methods: tuple[str, ...] = ("cfg", "unguided", "guided")

    def __init__(self, world: World, name: str = "emoji", slow: float = 1.0, per_round: int = 0) -> None:
        self.world, self.name, self.slow, self.per_round = world, name, slow, per_round

    def encode(self, prompts: list[str]) -> np.ndarray:
        self.world.now += 1e-3
        return np.zeros((len(prompts), 77, 4), np.float32)

    def noise(self, seeds: list[int]) -> np.ndarray:
        self.world.now += 1.0  # must never be billed
        return np.zeros((len(seeds), 4, 8, 8), np.float32)

    def denoise(
        self, context: np.ndarray, noise: np.ndarray, *, steps: int, guidance: np.ndarray | float, method: str
    ) -> np.ndarray:
        assert not gc.isenabled()
        assert len(context) == len(noise)
        drift = 1 + len(self.world.calls) // self.per_round if self.per_round else 1
        self.world.calls.append(f"{self.name}/{method}")
        self.world.now += 1e-3 * COST_MS[method] * self.slow * steps * len(noise) * drift
        return noise

    def decode(self, latents: np.ndarray) -> np.ndarray:
        self.world.now += 2e-3
        return np.zeros((len(latents), 64, 64, 3), np.uint8)


def cases(pipe: Fake, *methods: str) -> list[Case]:
    return [Case(pipe, method) for method in methods or pipe.methods]


def test_numbers_by_hand() -> None:
    world = World()
    rows = measure(
        cases(Fake(world)), batches=(1, 4), steps=5, rounds=3, warmup=1, prompts=["a", "b"], clock=world.clock
    )
    assert [(row.method, row.batch) for row in rows] == [(m, b) for b in (1, 4) for m in ("cfg", "unguided", "guided")]
    guided = rows[5]
    assert guided.p50_ms == pytest.approx(11 * 5 * 4)
    assert guided.p90_ms == guided.p99_ms == pytest.approx(220)
    assert guided.p50_ms_per_step == pytest.approx(44)
    assert guided.p50_ms_per_picture == pytest.approx((1 + 220 + 2) / 4)
    assert (guided.encode_p50_ms, guided.decode_p50_ms) == (pytest.approx(1), pytest.approx(2))
    assert guided.spread == pytest.approx(0, abs=1e-9)
    assert guided.ratio_to_cfg == pytest.approx(0.55)
    assert guided.ratio_to_cfg_interval == pytest.approx((0.55, 0.55))
    assert guided.ratio_reference == "emoji/cfg"
    assert guided.boundary == BOUNDARY
    assert rows[3].ratio_to_cfg == pytest.approx(1)
    assert len(guided.raw) == guided.rounds == 3
    assert guided.as_dict()["raw"][0]["loop_ms"] == pytest.approx(220)


def test_order_is_interleaved_and_rotates() -> None:
    world = World()
    rows = measure(cases(Fake(world)), batches=(1,), rounds=4, warmup=2, prompts=["a"], clock=world.clock)
    names = [call.split("/")[1] for call in world.calls]
    assert names[:6] == ["cfg", "cfg", "unguided", "unguided", "guided", "guided"]
    assert names[6:] == [
        *("cfg", "unguided", "guided"),
        *("unguided", "guided", "cfg"),
        *("guided", "cfg", "unguided"),
        *("cfg", "unguided", "guided"),
    ]
    assert [one["position"] for one in rows[0].raw] == [0, 2, 1, 0]


def test_ratio_is_paired_by_round() -> None:
    """The machine gets slower every round; the ratio, taken within the round, does not see it."""
    world = World()
    pipe = Fake(world, per_round=3)
    rows = measure(cases(pipe), batches=(1,), rounds=5, warmup=0, prompts=["a"], clock=world.clock)
    assert rows[2].ratio_to_cfg == pytest.approx(0.55)
    assert rows[2].ratio_to_cfg_interval == pytest.approx((0.55, 0.55))
    assert rows[2].spread > 0.3
    assert rows[2].p90_ms > rows[2].p50_ms


def test_a_slowed_engine_is_reported_slower() -> None:
    world = World()
    fast, slow = Fake(world, "fast"), Fake(world, "slow", slow=1.3)
    rows = measure(
        cases(fast) + cases(slow, "guided"), batches=(1,), rounds=5, warmup=0, prompts=["a"], clock=world.clock
    )
    by_engine = {row.engine: row for row in rows if row.method == "guided"}
    assert by_engine["slow"].p50_ms == pytest.approx(1.3 * by_engine["fast"].p50_ms)
    assert by_engine["slow"].ratio_to_cfg == pytest.approx(1.3 * 0.55)
    assert by_engine["slow"].ratio_reference == "fast/cfg"


def test_each_engine_is_compared_with_its_own_cfg() -> None:
    world = World()
    rows = measure(
        cases(Fake(world, "one")) + cases(Fake(world, "two", slow=2)),
        batches=(1,),
        rounds=2,
        prompts=["a"],
        clock=world.clock,
    )
    assert [row.ratio_reference for row in rows] == ["one/cfg"] * 3 + ["two/cfg"] * 3
    assert rows[5].ratio_to_cfg == pytest.approx(0.55)


def test_without_cfg_there_is_no_ratio() -> None:
    world = World()
    (row,) = measure(cases(Fake(world), "guided"), batches=(1,), rounds=1, prompts=["a"], clock=world.clock)
    assert row.ratio_to_cfg is None
    assert row.ratio_to_cfg_interval is None
    assert row.ratio_reference is None


def test_engines_of_another_base_are_not_compared() -> None:
    world = World()
    emoji, other = Fake(world, "emoji"), Fake(world, "other")
    emoji.base, other.base = "emoji", "sd15"  # type: ignore[attr-defined]
    rows = measure(
        cases(emoji, "cfg") + cases(other, "guided"), batches=(1,), rounds=1, prompts=["a"], clock=world.clock
    )
    assert rows[1].ratio_to_cfg is None


def test_the_bootstrap_is_seeded() -> None:
    def run(seed: int) -> tuple[float, float] | None:
        world = World()
        pipe = Fake(world, per_round=4)  # drifts out of step with the rounds, so the ratios differ
        return measure(cases(pipe), batches=(1,), rounds=9, warmup=0, prompts=["a"], clock=world.clock, seed=seed)[
            2
        ].ratio_to_cfg_interval

    first = run(0)
    assert first == run(0)
    assert first is not None
    assert first[0] < first[1]


def test_progress_counts_to_the_end_and_the_collector_comes_back() -> None:
    world = World()
    seen: list[tuple[int, int]] = []
    measure(
        cases(Fake(world)),
        batches=(1, 2),
        rounds=2,
        warmup=1,
        prompts=["a"],
        clock=world.clock,
        progress=lambda done, total, what: seen.append((done, total)),
    )
    assert seen == [(i + 1, 18) for i in range(18)]
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cases": []}, "nothing to time"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"steps": 0}, "steps must be from 1 to 1000, got 0"),
        ({"steps": 1001}, "got 1001"),
        ({"batches": (0,)}, "Batch sizes"),
        ({"batches": ()}, "Batch sizes"),
        ({"warmup": -1}, "warmup"),
        ({"guidance": float("nan")}, "finite"),
        ({"prompts": []}, "at least one prompt"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    world = World()
    arguments = {"cases": cases(Fake(world)), "prompts": ["a"], "clock": world.clock} | change
    with pytest.raises(InputError, match=message):
        measure(arguments.pop("cases"), **arguments)
    assert not world.calls


def test_unknown_and_repeated_cases_are_refused() -> None:
    pipe = Fake(World())
    with pytest.raises(InputError, match="'emoji' has no method 'dpm'; it has cfg, unguided, guided"):
        measure([Case(pipe, "dpm")], prompts=["a"])
    with pytest.raises(InputError, match="given 2 times"):
        measure([Case(pipe, "cfg"), Case(pipe, "cfg")], prompts=["a"])


def test_no_torch_is_imported() -> None:
    code = "import sys, pnp_trt.bench.latency, pnp_trt.bench.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
