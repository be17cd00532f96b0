"""The serving part: queues with fake costs, costs of a real engine, and the rows of the results document."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serving as script
from pnp_trt.bench import results
from pnp_trt.bench.measure import queues
from pnp_trt.bench.report import page as report

from ..conftest import Result
from . import fake_document

#: a device that is two thirds idle at batch size 1
CALLS = {n: 0.008 + 0.004 * n for n in range(1, 9)}
COSTS = queues.Costs(CALLS, CALLS, 0.003, 0.01)
#: the same with batch sizes 1 and 8 only
PADDED = queues.Costs({n: CALLS[n] for n in (1, 8)}, {n: CALLS[n] for n in (1, 8)}, 0.003, 0.01)


@pytest.mark.parametrize("name", sorted(script.POLICIES))
@pytest.mark.parametrize("burst", [1, 5])
def test_every_request_is_served_once_and_in_order(name: str, burst: int) -> None:
    requests = queues.arrivals(120, 2.0, 3, (4, 9, 30), burst)
    served = script.POLICIES[name](COSTS, requests)
    assert [r.steps for r in served.requests] == [r.steps for r in requests]
    for request in served.requests:
        assert request.at <= request.began < request.done < math.inf
    steps = sum(r.steps for r in requests)
    assert served.rows == steps * (2 if name == "cfg" else 1)
    figures = queues.figures(served)
    assert figures["latency_s"]["p50"] <= figures["latency_s"]["p95"] <= figures["latency_s"]["p99"]
    assert [each["steps"] for each in figures["latency_s_by_steps"]] == [4, 30]
    assert (figures["padding_share"] > 0) == (name == "step-buckets")


@pytest.mark.parametrize("policy", ["whole", "step", "cfg"])
def test_padding_rows_are_counted(policy: str) -> None:
    """Three images in calls of eight rows leave five for padding, or two with CFG's two rows per image."""
    figures = queues.figures(queues.POLICIES[policy](PADDED, [queues.QueuedRequest(0.0, 10) for _ in range(3)]))
    assert figures["padding_share"] == (0.25 if policy == "cfg" else 0.625)
    alone = queues.figures(queues.POLICIES["one"](PADDED, [queues.QueuedRequest(0.0, 10)]))
    assert alone["latency_s"]["p99"] == pytest.approx(0.003 + 10 * CALLS[1] + 0.01) and alone["padding_share"] == 0


def test_short_requests_overtake_long_ones_and_cfg_takes_twice_the_rows() -> None:
    steps = (8, 20, 50)
    capacity = queues.capacity(COSTS, 80, steps, queues.POLICIES)
    rows = queues.rows(COSTS, 80, steps, queues.POLICIES, capacity)
    assert len(rows) == 2 * 3 * 4
    cell = {row["policy"]: row for row in rows if (row["arrivals"], row["load"]) == ("poisson", 0.8)}
    short = {policy: row["latency_s_by_steps"][0]["p95"] for policy, row in cell.items() if row["latency_s"]}
    assert short["step"] < short["whole"]
    assert capacity["step"] > 1.5 * capacity["cfg"] and capacity["step"] > 1.5 * capacity["one"]
    assert cell["cfg"]["latency_s"] is cell["one"]["latency_s"] is None  # above their capacity
    assert cell["step"]["rate_per_s"] == pytest.approx(0.8 * capacity["step"], abs=1e-3)


def test_the_serving_part_measures_an_engine_with_a_guide(
    engines: Path, cli: Callable[..., Result], tmp_path: Path
) -> None:
    options = ("--only", "serving", "--provider", "cpu", "--rounds", 2, "--requests", 30, "--steps", 3, "--steps", 7)
    page, file = tmp_path / "b.html", tmp_path / "b.json"
    both = ("--engine", "plain", "--engine", "guided")
    done = cli("bench", *options, *both, "--guidance", 2, "--guidance", 5, "--json", file, "--html", page)
    assert done.code == 0, done.err
    assert "this run takes about" in done.err and "step by step" in done.out
    doc = results.read(file)
    (entry,) = doc["serving"]
    assert (entry["engine"], entry["slots"], entry["steps"], entry["guidance"]) == ("guided", 8, [3, 7], [2.0, 5.0])
    assert [call["batch"] for call in entry["calls"]] == list(range(1, 9))
    assert all(call["whole_s"] > 0 < call["step_s"] for call in entry["calls"]) and entry["text_s"] > 0
    assert {row["policy"] for row in entry["queues"]} == {"one", "whole", "step", "cfg"} == set(entry["capacity_per_s"])
    assert {"what": "serving of plain", "why": "it has no guide whose images could be compared with CFG's"} in doc[
        "left_out"
    ]
    assert doc["latency"] == doc["cost"] == doc["fidelity"] == []
    text = page.read_text()
    assert 'id="figure-serving"' in text and "a network call by each batch" in text
    for arguments, message in (
        (("--engine", "plain"), "there is no guide in plain, but --only serving compares"),
        (("--requests", 1), "requests is 1; it must be between 20 and 100,000"),
        (("--engine", "guided", "--size", "32x32"), "leave --size out"),
    ):
        refused = cli("bench", *options, *arguments)
        assert refused.code == 2 and message in refused.err


def test_documents_without_the_serving_part_are_read(tmp_path: Path) -> None:
    old: dict[str, Any] = fake_document.make(batches=(1,), rounds=3)
    del old["serving"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old), encoding="utf-8")
    assert report.render_html(results.read(path), tmp_path / "old.html").read_text().count("figure-serving") == 0
    assert not any("step by step" in sentence for sentence in report.sentences(old))


def test_sentences_state_the_measured_figures() -> None:
    doc = fake_document.make(batches=(1,), rounds=3)
    entry = doc["serving"][0]
    rates = entry["capacity_per_s"]
    text = " ".join(report.sentences(doc))
    assert "emoji-tiny: at 80 % load (Poisson) an image takes" in text and "for whole requests (p50 / p95)" in text
    assert f"guided serves {rates['step'] / rates['cfg']:.2f} times as many images as CFG" in text
