"""The timing harness on fake pipelines with a fake clock; nothing is really timed."""

from __future__ import annotations

import gc
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pnp_trt.bench.measure import latency
from pnp_trt.bench.measure.cases import cases_of
from pnp_trt.bench.measure.latency import BOUNDARY, Case, measure
from pnp_trt.bench.measure.meters import Meters
from pnp_trt.bench.measure.roofline import CallCost, Device
from pnp_trt.errors import InputError

COST_MS = {"cfg": 20.0, "cfg-two-passes": 24.0, "unguided": 10.0, "guided": 11.0}


class World:
    """A clock that advances only when a fake pipeline works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now


class Fake:
    """A pipeline whose loop takes a fixed time per step and image, times a drift shared by a whole round."""

    methods: tuple[str, ...] = ("cfg", "unguided", "guided")

    def __init__(self, world: World, name: str = "emoji", slow: float = 1.0, per_round: int = 0) -> None:
        self.world, self.name, self.slow, self.per_round = world, name, slow, per_round

    def encode(self, prompts: list[str]) -> np.ndarray:
        self.world.now += 1e-3
        return np.zeros((len(prompts), 77, 4), np.float32)

    def noise(self, seeds: list[int]) -> np.ndarray:
        self.world.now += 1.0  # must never be counted
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


class Plain(Fake):
    """A fake teacher with the baselines, whose steps are at the timesteps 999, 899, …"""

    methods = ("cfg", "unguided")
    baselines = ("cfg-two-passes", "cfg-interval")
    on_gpu = True

    def schedule(self, steps: int, name: str | None = None) -> SimpleNamespace:
        return SimpleNamespace(timesteps=999 - 100 * np.arange(steps))

    def guided_interval(self) -> tuple[int, int]:
        return 600, 800  # two steps of five

    def denoise(self, context: np.ndarray, noise: np.ndarray, **options: Any) -> np.ndarray:
        low, high = self.guided_interval()
        if options["method"] != "cfg-interval":
            return super().denoise(context, noise, **options)
        steps = options.pop("steps")
        inside = sum(low <= t <= high for t in self.schedule(steps).timesteps)
        super().denoise(context, noise, **options | {"method": "cfg", "steps": inside})
        return super().denoise(context, noise, **options | {"method": "unguided", "steps": steps - inside})


def cases(pipe: Fake, *methods: str) -> list[Case]:
    return [Case(pipe, method) for method in methods or pipe.methods]


def test_figures_by_hand() -> None:
    world = World()
    rows = measure(
        cases(Fake(world)), batches=(1, 4), steps=5, rounds=3, warmup=1, prompts=["a", "b"], clock=world.clock
    )
    assert [(row.method, row.batch) for row in rows] == [(m, b) for b in (1, 4) for m in ("cfg", "unguided", "guided")]
    guided = rows[5]
    assert guided.p50_ms == pytest.approx(11 * 5 * 4)
    assert guided.p90_ms == guided.p99_ms == pytest.approx(220)
    assert guided.p50_ms_per_step == pytest.approx(44)
    assert guided.p50_ms_per_image == pytest.approx((1 + 220 + 2) / 4)
    assert (guided.encode_p50_ms, guided.decode_p50_ms) == (pytest.approx(1), pytest.approx(2))
    assert guided.spread == pytest.approx(0, abs=1e-9)
    assert guided.ratio_to_cfg == pytest.approx(0.55)
    assert guided.ratio_to_cfg_interval == pytest.approx((0.55, 0.55))
    assert guided.ratio_reference == "emoji/cfg"
    assert guided.boundary == BOUNDARY
    assert rows[3].ratio_to_cfg == pytest.approx(1)
    assert len(guided.raw) == guided.rounds == 3
    assert guided.as_dict()["raw"][0]["loop_ms"] == pytest.approx(220)


def test_methods_are_interleaved_and_their_order_rotates() -> None:
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
    """The machine slows down in every round, which does not affect ratios within a round."""
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
    same, slower = by_engine["fast"], by_engine["slow"]
    assert same.ratio_to_cfg_interval[1] < slower.ratio_to_cfg_interval[0]  # type: ignore[index]


def test_a_small_slowdown_is_significant_under_a_large_drift() -> None:
    """An engine slowed by 5 %, under a much larger drift: the interval of its ratio excludes 1."""
    world = World()
    fast, slow = Fake(world, "fast", per_round=3), Fake(world, "slow", slow=1.05, per_round=3)
    slow.methods = ("unguided",)
    rows = measure(
        [Case(fast, "unguided"), Case(slow, "unguided"), Case(fast, "cfg")],
        batches=(1,), rounds=8, warmup=0, prompts=["a"], clock=world.clock,
    )  # fmt: skip
    loops = [np.array([one["loop_ms"] for one in row.raw]) for row in rows]
    ratio, low, high = latency.paired_ratio(loops[1], loops[0])
    assert ratio == pytest.approx(1.05) and 1 < low <= high
    assert rows[0].spread > 0.3  # the drift hides the difference in unpaired times
    assert rows[1].ratio_to_cfg_interval[0] > rows[0].ratio_to_cfg_interval[1]  # type: ignore[index]


def test_baselines_by_hand() -> None:
    world = World()
    pipe = Plain(world)
    rows = measure(cases_of([pipe]), batches=(2,), steps=5, rounds=2, warmup=0, prompts=["a"], clock=world.clock)
    by_method = {row.method: row for row in rows}
    assert list(by_method) == ["cfg", "cfg-two-passes", "cfg-interval", "cfg-fewer-steps", "unguided"]
    assert {name: row.evaluations for name, row in by_method.items()} == {
        "cfg": 10, "cfg-two-passes": 10, "cfg-interval": 7, "cfg-fewer-steps": 4, "unguided": 5,
    }  # fmt: skip
    assert {name: row.p50_ms for name, row in by_method.items()} == pytest.approx(
        {"cfg": 200, "cfg-two-passes": 240, "cfg-interval": 140, "cfg-fewer-steps": 80, "unguided": 100}
    )
    assert by_method["cfg-fewer-steps"].steps == 2 and by_method["cfg"].steps == 5
    assert by_method["cfg-fewer-steps"].ratio_to_cfg == pytest.approx(0.4)
    assert {name: row.guided_interval for name, row in by_method.items() if row.guided_interval} == {
        "cfg-interval": (600, 800)
    }
    assert by_method["cfg"].images_per_s == pytest.approx(2 / 0.203)
    assert by_method["cfg-interval"].as_dict()["guided_interval"] == [600, 800]
    for row in rows:  # without meters they are not measured
        assert (row.least_ms, row.share_of_least, row.peak_memory_bytes, row.energy_j_per_image) == (None,) * 4


def test_meters_fill_their_fields() -> None:
    world = World()
    measured: list[tuple[str, int, int]] = []

    def memory(case: Case, *, batch: int, steps: int, **_: Any) -> int | None:
        measured.append((case.label, batch, steps))
        return 1000 * batch

    peaks = Device("fake", peak_macs_per_s=1e9, peak_bytes_per_s=1e9, how="it is a fake")
    meters = Meters(
        memory, lambda: 50 * world.now, peaks, lambda case: CallCost(macs=4_000_000, weight_bytes=1_000_000)
    )
    rows = measure(
        cases_of([Plain(world)]), batches=(1, 2), steps=5, rounds=1, warmup=0, prompts=["a"], clock=world.clock,
        meters=meters,
    )  # fmt: skip
    cfg = rows[0]
    assert cfg.peak_memory_bytes == 1000 and ("emoji/cfg-fewer-steps", 2, 5) in measured
    assert cfg.least_ms == pytest.approx(5 * 2 * 4)  # MACs: 5 steps, 2 rows, 4 ms each; bytes take 1 ms
    assert cfg.share_of_least == pytest.approx(40 / 100)
    assert {row.method: row.least_ms for row in rows[5:]} == pytest.approx(
        {"cfg": 80, "cfg-two-passes": 80, "cfg-interval": 56, "cfg-fewer-steps": 32, "unguided": 40}
    )
    assert cfg.energy_j_per_image is not None
    assert cfg.energy_j_per_image == pytest.approx(50 * 1.103)  # 50 W over noise, text, loop and decode
    assert rows[5].energy_j_per_image == pytest.approx(50 * (1 + 0.203) / 2)


def test_figures_that_do_not_apply_are_none() -> None:
    world = World()
    host = Fake(world)  # does not run on a GPU, so a GPU's energy is not its own
    peaks = Device("fake", 1e9, 1e9, "it is a fake")
    for work in (lambda case: None, lambda case: CallCost(1, 1, "int8")):  # a peak of fp32 does not bound int8
        meters = Meters(None, lambda: world.now, peaks, work)
        (row,) = measure(
            [Case(host, "guided")], batches=(1,), rounds=1, prompts=["a"], clock=world.clock, meters=meters
        )
        assert (row.least_ms, row.share_of_least, row.energy_j_per_image, row.peak_memory_bytes) == (None,) * 4


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


def test_progress_counts_to_the_end_and_garbage_collection_is_enabled_again() -> None:
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
    with pytest.raises(InputError, match="no method 'cfg-interval'; it has cfg, unguided, guided"):
        measure([Case(pipe, "cfg-interval")], prompts=["a"])
    with pytest.raises(InputError, match="no method 'guided'; it has cfg, unguided, cfg-two-passes, cfg-interval"):
        measure([Case(Plain(World()), "guided")], prompts=["a"])
    with pytest.raises(InputError, match="given 2 times"):
        measure([Case(pipe, "cfg"), Case(pipe, "cfg")], prompts=["a"])


def test_no_torch_is_imported() -> None:
    parts = ", ".join(
        f"pnp_trt.bench.measure.{name}" for name in ("latency", "cost", "footprint", "peers", "coldstart")
    )
    code = f"import sys, {parts}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
