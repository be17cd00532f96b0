"""The engine: images equal the pipeline's, the queue is bounded, jobs can be cancelled, and it stops cleanly."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest

from pnp_trt.errors import Cancelled, InputError, PnpError
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.serve.engine import Busy, Engine, Expired, Job, Stopping, Watcher


class Gate(Watcher):
    """Pauses the engine after a network call until the gate is opened."""

    def __init__(self) -> None:
        self.arrived, self.open = threading.Event(), threading.Event()
        self.rows: list[tuple[int, int, int]] = []
        self.over: list[tuple[str, PnpError | None]] = []

    def stepped(self, rows: int, padded: int, calls: int, seconds: float) -> None:
        self.rows.append((rows, padded, calls))
        self.arrived.set()
        assert self.open.wait(60)

    def ended(self, job: Job, error: PnpError | None) -> None:
        self.over.append((job.id, error))


@pytest.fixture(scope="module")
def pipeline(micro_bundles: Path) -> Pipeline:
    return Pipeline.load(micro_bundles / "guided", provider="cpu", threads=1)


@pytest.fixture
def held(pipeline: Pipeline) -> Iterator[tuple[Engine, Gate]]:
    """An engine with two slots and a queue for two more, paused after its first call."""
    gate = Gate()
    engine = Engine(pipeline, slots=2, queue_size=2, watcher=gate)
    yield engine, gate
    gate.open.set()
    engine.stop(drain=False)


def test_images_of_concurrent_clients_equal_those_of_the_pipeline(pipeline: Pipeline) -> None:
    engine = Engine(pipeline, slots=4)
    requests = [
        {"prompts": [f"a red apple {i}"] * (1 + i % 2), "seed": list(range(i, i + 1 + i % 2)), "steps": 1 + i % 5,
         "guidance": 1.0 + i % 4, "schedule": ("ddim", "dpm++", "euler")[i % 3]}
        for i in range(12)
    ]  # fmt: skip
    jobs: dict[int, Job] = {}

    def client(mine: range) -> None:
        for i in mine:
            jobs[i] = engine.submit(pipeline.prepare(**requests[i]))

    threads = [threading.Thread(target=client, args=(range(k, 12, 3),)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, request in enumerate(requests):
        served, alone = jobs[i].future.result(60), pipeline(**request)
        assert [p.parameters for p in served] == [p.parameters for p in alone]
        for one, other in zip(served, alone, strict=True):
            np.testing.assert_array_equal(one.pixels, other.pixels)
        progress = jobs[i].progress()
        assert progress.over and progress.steps_done == progress.steps == requests[i]["steps"] * len(alone)
    assert engine.images == 0 and not engine.jobs()
    assert engine.stop() and not engine.alive
    with pytest.raises(Stopping, match="is being stopped"):
        engine.submit(pipeline.prepare("late"))


def test_a_full_queue_refuses_at_once_and_states_when_to_retry(pipeline: Pipeline, held: tuple[Engine, Gate]) -> None:
    engine, gate = held
    jobs = [engine.submit(pipeline.prepare("a cat", steps=3, seed=seed)) for seed in range(3)]
    assert gate.arrived.wait(60)
    with pytest.raises(Busy, match="3 images in its queue and room for 4") as refused:
        engine.submit(pipeline.prepare(["a cat"] * 2, steps=3, seed=[0, 1]))  # requests are not split
    assert refused.value.retry_after >= 1
    jobs.append(engine.submit(pipeline.prepare("a cat", steps=3, seed=3)))
    with pytest.raises(InputError, match="5 images were requested at once; at most 4"):
        engine.submit(pipeline.prepare(["a"] * 5, seed=list(range(5))))
    with pytest.raises(InputError, match="cannot do 'cfg-interval' step by step"):
        engine.submit(pipeline.prepare("a cat", method="cfg-interval"))
    gate.open.set()
    wait([job.future for job in jobs], 60)
    assert all(len(job.future.result()) == 1 for job in jobs) and len(gate.over) == 4
    assert max(rows for rows, _, _ in gate.rows) == 2


def test_cancel_and_deadline_free_the_slot_and_end_the_future(pipeline: Pipeline, held: tuple[Engine, Gate]) -> None:
    engine, gate = held
    running, waiting = (engine.submit(pipeline.prepare(["a cat"] * 2, steps=50, seed=[0, 1])) for _ in range(2))
    assert gate.arrived.wait(60)
    assert running.progress().running == 2 and waiting.progress().steps_done == 0 and engine.waiting == 2
    assert engine.jobs() == [running, waiting]
    preview = engine.preview(running)
    engine.cancel(running)
    engine.cancel(waiting)
    late = engine.preview(waiting)
    gate.open.set()
    image = preview.result(60)
    assert image is not None and image.shape == (*pipeline.size, 3) and image.dtype == np.uint8
    assert late.result(60) is None
    for job in (running, waiting):
        with pytest.raises(Cancelled, match=r"cancelled after \d+ of 50 steps"):
            job.future.result(60)
    expired = engine.submit(pipeline.prepare("a cat", steps=1000), deadline=0.01)
    with pytest.raises(Expired, match=r"was not done within 0.01 s: \d+ of 1000 steps"):
        expired.future.result(60)
    engine.cancel(expired)  # has no effect on an ended job
    assert len(engine.submit(pipeline.prepare("a cat", steps=2)).future.result(60)) == 1 and engine.images == 0


@pytest.mark.parametrize("drain", [True, False])
def test_stop_finishes_or_cancels_all_jobs(pipeline: Pipeline, held: tuple[Engine, Gate], drain: bool) -> None:
    engine, gate = held
    jobs = [engine.submit(pipeline.prepare("a cat", steps=4, seed=seed)) for seed in range(4)]
    assert gate.arrived.wait(60)
    stopping = threading.Thread(target=engine.stop, kwargs={"drain": drain})
    stopping.start()
    while engine.alive:
        pass
    if not drain:
        while engine._inbox.qsize() < 5:  # wait for the cancellations and the wake-up
            pass
    gate.open.set()
    stopping.join(60)
    assert not stopping.is_alive()
    done = [job.future.exception(60) for job in jobs]
    assert all(error is None for error in done) if drain else all(isinstance(error, Cancelled) for error in done)


def test_a_failure_ends_only_the_affected_jobs(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(pipeline, slots=2)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "decode", lambda latents: (_ for _ in ()).throw(PnpError("not finite; rebuild it")))
        with pytest.raises(PnpError, match="not finite"):
            engine.submit(pipeline.prepare("a cat", steps=2)).future.result(60)
    with monkeypatch.context() as patch:
        patch.setattr(engine._loop, "step", lambda: 1 / 0)
        with pytest.raises(PnpError, match="unexpected ZeroDivisionError"):
            engine.submit(pipeline.prepare("a cat", steps=2)).future.result(60)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "encode", lambda *_: (_ for _ in ()).throw(RuntimeError("out of everything")))
        with pytest.raises(PnpError, match="unexpected RuntimeError: out of everything"):
            engine.submit(pipeline.prepare(["a cat"] * 3, steps=2, seed=[0, 1, 2])).future.result(60)
    assert len(engine.submit(pipeline.prepare("a cat", steps=2)).future.result(60)) == 1
    assert engine.images == 0 and engine.stop()
