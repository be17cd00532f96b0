"""Rows of the fidelity part: which ones a plan has, their references, their cost and their measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pnp_trt.bench.engines import counted_guide
from pnp_trt.bench.fidelity_rows import Cell, Studio, cells_of, macs_per_image, plan_rows, verdict
from pnp_trt.bench.metrics import fidelity
from pnp_trt.bench.metrics.tasks import Task
from pnp_trt.bench.plan import Plan
from pnp_trt.bench.report.image_grid import headline
from pnp_trt.bench.results import decode_images
from pnp_trt.bench.work import Work
from pnp_trt.bundle.manifest import Base, GuideRecord


@dataclass
class Pipe:
    """A fake pipeline that generates noise around a grey level, which depends on method and steps."""

    name: str
    methods: tuple[str, ...]
    baselines: tuple[str, ...] = ()
    sampling_steps: int | None = None
    drawn: list[tuple[str, int, float]] = field(default_factory=list)

    @property
    def bundle(self) -> Any:
        return SimpleNamespace(manifest=SimpleNamespace(seal=self.name, guide=None, base=Base("micro", {})))

    @staticmethod
    def evaluations(steps: int, schedule: str | None = None) -> int:
        return steps

    def __call__(
        self, prompts: list[str], *, steps: int, seed: list[int], method: str, guidance: float, **_: Any
    ) -> Any:
        self.drawn.append((method, steps, guidance))
        out = []
        for s in seed:
            grain = np.random.default_rng(s).integers(0, 40, (8, 8, 3))
            out.append(
                SimpleNamespace(pixels=(grain + {"cfg": 100, "guided": 103}.get(method, 140) + steps).astype(np.uint8))
            )
        return out


class Eyes:
    """A fake extractor of two features: mean and standard deviation."""

    key = "eyes"
    efficientnet = None

    @staticmethod
    def look(pixels: np.ndarray, prompts: Any) -> dict[str, np.ndarray]:
        flat = pixels.reshape(len(pixels), -1).astype(np.float32) / 255
        return {"features": np.stack([flat.mean(1), flat.std(1)], 1)}


TEACHER = Pipe("plain", ("cfg", "unguided"), ("cfg-two-passes",))
GUIDED = Pipe("guided", ("guided",))


def test_rows_cover_methods_steps_and_w_and_unguided_images_are_generated_once() -> None:
    plan = Plan(steps=(4, 8), guidance=(3.0, 2.0))
    rows, left_out = plan_rows([TEACHER, GUIDED], plan)  # type: ignore[list-item]
    assert not left_out and len(rows) == 2 * 2 * 4
    cells = cells_of(rows)
    assert len([c for c in cells if c.method == "unguided"]) == 2  # one per number of steps
    assert {(c.method, c.steps) for c in cells if c.guidance == 2.0} == {
        ("cfg", 2), ("cfg", 4), ("cfg", 8), ("guided", 4), ("guided", 8),
    }  # fmt: skip
    best = Cell("plain", "cfg", 8, 2.0)
    for row in (r for r in rows if r.guidance == 2.0):
        assert row.best == (None if row.cell == best else best)
    fewer = [r for r in rows if r.method == "cfg-fewer-steps" and r.guidance == 3.0]
    assert [(r.cell.steps, r.teacher.steps) for r in fewer if r.teacher] == [(2, 4), (4, 8)]


def test_a_stage_2_guide_is_evaluated_only_at_its_own_steps() -> None:
    fast = Pipe("fast", ("guided",), sampling_steps=8)
    rows, left_out = plan_rows([TEACHER, fast], Plan(steps=(4, 8), guidance=(3.0, 2.0)))  # type: ignore[list-item]
    assert {r.cell.steps for r in rows if r.method == "guided"} == {8}
    assert left_out == [
        {"what": "fidelity of fast at 4 steps", "why": "its guide was distilled for 8 steps only"}
    ]  # listed once for both scales


def test_rows_without_a_teacher_have_no_reference() -> None:
    rows, _ = plan_rows([GUIDED], Plan(steps=(4,), guidance=(3.0,)))  # type: ignore[list-item]
    assert [(r.method, r.teacher, r.best) for r in rows] == [("guided", None, None)]


@pytest.fixture
def studio() -> Any:
    prompts = tuple("abcdef")
    rng = np.random.default_rng(0)
    task = Task(prompts, tuple(range(6)), ("x", "y"), ("xx", "yy"), (90, 91), "letters",
                real=rng.random((9, 2)).astype(np.float32))  # fmt: skip
    plan = Plan(steps=(4, 8), guidance=(3.0, 2.0))
    with Work(None, {}) as work:
        yield Studio([TEACHER, GUIDED], plan, task, Eyes(), work)  # type: ignore[list-item, arg-type]


def test_measures_equal_those_of_the_fidelity_module(studio: Studio) -> None:
    rows, _ = plan_rows(list(studio.pipes.values()), studio.plan)
    cost = [{"network": "teacher", "macs": 100}, {"network": "text-encoder", "macs": 7}]
    row = next(r for r in rows if r.method == "guided" and r.cell.steps == 4)
    measured = studio.measure(row, cost)
    mine = studio.images(row.cell)
    best = studio.images(Cell("plain", "cfg", 8, 3.0))
    real = studio.task.real
    assert real is not None
    assert measured["kid"] == fidelity.kid(real, mine["features"]).as_dict()
    assert measured["kid_gain_over_cfg"] == fidelity.kid_gain(real, best["features"], mine["features"]).as_dict()
    assert measured["psnr_to_cfg_db"]["value"] == pytest.approx(20 * np.log10(255 / 3))  # off by 3 everywhere
    assert measured["feature_cosine_to_cfg"]["count"] == measured["images"] == 6
    assert (measured["evaluations"], measured["macs_per_image"], measured["reference_steps"]) == (4, 407, 4)
    teacher = studio.measure(next(r for r in rows if r.method == "cfg" and r.cell.steps == 8), cost)
    assert teacher["evaluations"] == 16 and "psnr_to_cfg_db" not in teacher and "kid_gain_over_cfg" not in teacher
    assert verdict([teacher], studio.task, studio.eyes) == (True, None)


def test_each_cell_is_generated_once(studio: Studio) -> None:
    TEACHER.drawn.clear()
    rows, _ = plan_rows(list(studio.pipes.values()), studio.plan)
    for row in rows:
        studio.measure(row)
    assert len(TEACHER.drawn) == len(set(TEACHER.drawn)) == len([c for c in cells_of(rows) if c.engine == "plain"])


def test_the_grid_starts_with_the_headline_and_has_each_set_of_images_once(studio: Studio) -> None:
    rows, _ = plan_rows(list(studio.pipes.values()), studio.plan)
    grid = studio.grid(rows)
    labels = [(r["method"], r["steps"], r["guidance"]) for r in grid["rows"]]
    assert labels[:3] == [("cfg", 8, 3.0), ("guided", 8, 3.0), ("unguided", 8, None)]
    assert len(labels) == len(set(labels)) == 10 and grid["columns"] == ["x", "y"]
    shown = studio.images(Cell("plain", "cfg", 8, 3.0))["shown"]
    assert (decode_images(grid)[0][1] == shown).all()  # PNG is lossless
    assert [(r["method"], r["steps"]) for r in headline(grid)["rows"]] == [("cfg", 8), ("guided", 8), ("unguided", 8)]
    assert headline(grid)["caption"] == "xx, 8 steps" and grid["caption"] == "xx, 4 and 8 steps"


def test_macs_by_hand_and_none_if_unknown() -> None:
    cost = [
        {"network": n, "macs": m} for n, m in
        (("teacher", 1000), ("guide-tiny", 10), ("guide-full", 300), ("condition-full", 50), ("vae-decoder", 5),
         ("text-encoder", 2))
    ]  # fmt: skip
    assert macs_per_image(cost, 8, 4, "") == 8 * 1000 + 7
    assert macs_per_image(cost, 4, 4, "guide-tiny") == 4 * 1010 + 7
    assert macs_per_image(cost, 4, 4, "guide-full") == 4 * 1300 + 50 + 7
    assert macs_per_image(cost, 4, 4, None) is macs_per_image([], 4, 4, "") is None
    assert macs_per_image(cost[:1], 4, 4, "guide-tiny") is None


def test_a_guide_counts_as_one_of_the_counted_networks_or_as_none() -> None:
    def manifest(guide: str | None, base: str = "emoji") -> Any:
        return SimpleNamespace(guide=None if guide is None else GuideRecord(guide, "0" * 64), base=Base(base, {}))

    assert counted_guide(manifest(None)) == ""
    assert counted_guide(manifest("emoji-tiny")) == counted_guide(manifest("emoji-tiny-8", "emoji-3d")) == "guide-tiny"
    assert counted_guide(manifest("emoji-tiny", "somebody/else")) is None
    assert counted_guide(manifest("a-guide-that-is-gone")) is None
