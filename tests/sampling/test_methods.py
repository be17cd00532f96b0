"""The registry of sampling methods: their stated evaluations, and methods that are registered from outside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pnp_trt.bench.measure.cases import Case, cases_of
from pnp_trt.bench.measure.cost import method_rows
from pnp_trt.bench.report.charts import page_colours
from pnp_trt.bench.report.words import method_labels, method_legend
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.sampling.loop import Callback, HostLoop
from pnp_trt.sampling.methods import (
    INTERVAL,
    METHODS,
    HostRun,
    Method,
    baselines_of,
    guided_steps,
    methods_of,
    uses_guidance,
)
from pnp_trt.sampling.network import Bound, Description, Network
from pnp_trt.sampling.schedules import make

TABLE = make("ddim", {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}, 9)


class Counting(Network):
    """Predicts zeros and counts the rows of its batches."""

    def __init__(self) -> None:
        self.rows = 0

    def describe(self) -> Description:
        return Description({}, {}, "cpu")

    @contextlib.contextmanager
    def bind(self, batch: int, size: tuple[int, int] | None = None) -> Iterator[Bound]:
        yield CountingBound(self, batch)


class CountingBound(Bound):
    def __init__(self, network: Counting, batch: int) -> None:
        self.network, self.batch = network, batch

    def write(self, **inputs: np.ndarray) -> None:
        pass

    def run(self) -> None:
        self.network.rows += self.batch

    def read(self) -> np.ndarray:
        return np.zeros((self.batch, 4, 2, 2), np.float32)


@pytest.mark.parametrize("name", list(METHODS))
def test_stated_evaluations_equal_those_that_are_run(name: str) -> None:
    method, network = METHODS[name], Counting()
    n, interval = 3, (300, 700)
    steps = method.steps(len(TABLE))
    table = make("ddim", {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}, steps)
    start, w = np.zeros((n, 4, 2, 2), np.float32), np.full(n, 3, np.float32)
    texts = np.zeros((2 * n if method.reads_both_texts else n, 7, 5), np.float32)
    if method.sample is not None:
        method.sample(HostRun(network, table, start, w, {"encoder_hidden_states": texts}, interval), None)
    else:
        rows = max(method.batches)
        with network.bind(rows * n) as bound:
            HostLoop(bound, table, start.shape, w if method.reads_both_texts else None).run(start)
    inside = int(guided_steps(table, interval).sum()) if method.has_interval else None
    assert method.evaluations(steps, inside) * n == network.rows
    assert sum(count * rows for count, rows in method.calls(steps, inside)) * n == network.rows
    assert 0 < guided_steps(TABLE, interval).sum() < len(TABLE)


def test_methods_of_bundles_with_and_without_a_guide() -> None:
    assert methods_of(True) == ("guided",) and baselines_of(True) == ()
    assert methods_of(False) == ("cfg", "unguided") and baselines_of(False) == ("cfg-two-passes", "cfg-interval")
    assert [name for name in METHODS if not uses_guidance(name)] == ["unguided"]
    assert INTERVAL.evaluations(10, 4) == 14 and INTERVAL.evaluations(10) == 20


def _as_cfg(run: HostRun, callback: Callback | None) -> np.ndarray:
    """Run CFG in the host's loop, as one batch of two."""
    n, size = len(run.start), (run.start.shape[-2], run.start.shape[-1])
    with run.unet.bind(2 * n, size) as unet:
        unet.write(**run.inputs)
        return HostLoop(unet, run.table, run.start.shape, run.w).run(run.start, callback)


@pytest.fixture
def own() -> Iterator[Method]:
    method = Method("own", "own label", "own words", ("#111111", "#eeeeee"), "*", (2,), sample=_as_cfg)
    METHODS.register("own", method)
    yield method
    METHODS.unregister("own")


def test_a_registered_method_is_run_counted_and_shown(own: Method, micro_bundles: Path) -> None:
    pipe = Pipeline.load(micro_bundles / "plain", provider="cpu", threads=1)
    assert pipe.methods == ("cfg", "unguided", "own")
    images = [pipe("a cat", steps=3, method=name, negative="a dog")[0] for name in ("own", "cfg")]
    np.testing.assert_array_equal(images[0].pixels, images[1].pixels)
    assert images[0].parameters["method"] == "own"
    assert "own" in [case.method for case in cases_of([pipe])] and Case(pipe, "own").evaluations(5) == 10
    counted = [{"network": "teacher", "parameters": 1, "macs": 100, "macs_without_attention": 90}]
    rows = {row["method"]: row for row in method_rows(counted, steps=4)}
    assert rows["own"]["macs_per_step"] == rows["cfg"]["macs_per_step"] == 200
    assert method_labels()["own"] == "own label" and method_legend()["own"] == "own words"
    assert page_colours()["own"] == ("#111111", "#eeeeee")
    assert methods_of(False, on_host=False) == ("cfg", "unguided")  # a device's loop does not run it
