"""Step-level batching: every image is bit-equal to a run of its own, whatever shares its calls; no request starves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pnp_trt.backends.onnxruntime.backend import OrtNetwork
from pnp_trt.errors import Cancelled, InputError, PnpError
from pnp_trt.runtime.pipeline import Pipeline, Prepared
from pnp_trt.sampling.loop import HostLoop
from pnp_trt.sampling.network import Bound, Description, Network
from pnp_trt.sampling.schedules import SCHEDULES, Schedule, make
from pnp_trt.sampling.step_loop import Run, StepLoop, Ticket

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
SHAPE = (4, 2, 3)


def predict(sample: np.ndarray, timestep: np.ndarray, text: np.ndarray) -> np.ndarray:
    """A network in which every row depends only on its own inputs."""
    return np.sin(sample + text[:, None, None, None]) + timestep[:, None, None, None].astype(np.float32) / 1000


class ToyBound(Bound):
    def __init__(self, network: Toy, batch: int, size: tuple[int, int], shares: bool) -> None:
        self.network, self.shares = network, shares
        self.inputs = {
            "sample": np.full((batch, SHAPE[0], *size), np.nan, np.float32),  # unwritten inputs spoil the result
            "timestep": np.zeros(batch, np.int64),
            "text": np.zeros(batch, np.float32),
        }

    def write(self, **inputs: np.ndarray) -> None:
        for name, array in inputs.items():
            assert array.shape == self.inputs[name].shape
            np.copyto(self.inputs[name], array)

    def run(self) -> None:
        self.network.batches.append(len(self.inputs["sample"]))
        if self.network.fails == len(self.network.batches):
            raise PnpError("the toy broke; try again")
        self.made = predict(self.inputs["sample"], self.inputs["timestep"], self.inputs["text"])
        assert np.isfinite(self.made).all()

    def read(self) -> np.ndarray:
        return self.made.copy()

    def host_input(self, name: str) -> np.ndarray | None:
        return self.inputs[name] if self.shares else None


class Toy(Network):
    def __init__(self, shares: bool = True, fails: int = 0) -> None:
        self.batches: list[int] = []
        self.shares, self.fails = shares, fails

    def describe(self) -> Description:
        return Description({}, {}, "cpu")

    @contextlib.contextmanager
    def bind(self, batch: int, size: tuple[int, int] | None = None) -> Iterator[Bound]:
        assert size is not None
        yield ToyBound(self, batch, size, self.shares)


def alone(run: Run) -> np.ndarray:
    """Return the final latents of the loop over whole batches."""
    bound = ToyBound(Toy(), len(run.inputs), run.start.shape[1:], True)
    bound.write(text=np.array([row["text"] for row in run.inputs], np.float32))
    w = np.array([run.w], np.float32) if len(run.inputs) == 2 else None
    return HostLoop(bound, run.table, (1, *run.start.shape), w).run(run.start[None])[0]


def a_run(table: Schedule, seed: int = 0, rows: int = 1, size: tuple[int, int] = SHAPE[1:]) -> Run:
    draw = np.random.default_rng(seed)
    start = draw.standard_normal((SHAPE[0], *size), np.float32) * np.float32(table.init_scale)
    return Run(table, start, tuple({"text": np.float32(draw.standard_normal())} for _ in range(rows)), 1 + seed % 7)


def submit(loop: StepLoop, run: Run) -> Ticket:
    return loop.submit(lambda: run, len(run.table), len(run.inputs))


def finish(loop: StepLoop, limit: int = 10_000) -> None:
    while loop.waiting or loop.running:
        loop.step()
        limit -= 1
        assert limit, "the loop does not end"


REQUEST = st.tuples(
    st.sampled_from(sorted(SCHEDULES)), st.integers(1, 9), st.integers(0, 99), st.sampled_from([1, 2]),
    st.sampled_from([SHAPE[1:], (4, 4)]), st.integers(0, 6), st.sampled_from([1.0, 0.6]),
)  # fmt: skip


@settings(max_examples=40)
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=9),
    slots=st.integers(2, 5),
    powers=st.booleans(),
    shares=st.booleans(),
    cancelled=st.sets(st.integers(0, 8)),
)
def test_every_run_is_bit_equal_to_running_alone(
    requests: list[tuple[str, int, int, int, tuple[int, int], int, float]],
    slots: int,
    powers: bool,
    shares: bool,
    cancelled: set[int],
) -> None:
    toy = Toy(shares)
    loop = StepLoop(toy, slots, (1, 2, 4, 8) if powers else None)
    tickets: list[tuple[Run, Ticket]] = []
    for number, (name, steps, seed, rows, size, gap, strength) in enumerate(requests):
        table = make(name, SCHEDULER, steps)
        run = a_run(table.start(strength) if int(steps * strength) else table, seed, rows, size)
        tickets.append((run, submit(loop, run)))
        for _ in range(gap):
            loop.step()
            assert loop.rows_running <= slots
        if number in cancelled and loop.cancel(tickets[-1][1]):
            assert tickets[-1][1] not in loop.running and not loop.cancel(tickets[-1][1])
    finish(loop)
    for number, (run, ticket) in enumerate(tickets):
        assert ticket.over
        if ticket.error is not None:
            assert number in cancelled and isinstance(ticket.error, Cancelled) and ticket.latents is None
        else:
            assert ticket.latents is not None and ticket.steps_done == ticket.steps
            np.testing.assert_array_equal(ticket.latents, alone(run))
    assert loop.calls == len(toy.batches) and sum(toy.batches) == loop.rows_used + loop.rows_padded
    assert set(toy.batches) <= set(loop.buckets)


@settings(max_examples=12)
@given(
    slots=st.integers(1, 4),
    ageing=st.sampled_from([0.5, 1.0]),
    length=st.integers(2, 25),
    rows=st.sampled_from([1, 2]),
    short=st.integers(1, 4),
)
def test_no_request_starves_under_an_endless_stream_of_shorter_ones(
    slots: int, ageing: float, length: int, rows: int, short: int
) -> None:
    rows = min(rows, slots)
    loop = StepLoop(Toy(), slots, ageing=ageing)
    brief = a_run(make("ddim", SCHEDULER, short))
    for _ in range(slots):
        submit(loop, brief)
    loop.step()
    long = submit(loop, a_run(make("ddim", SCHEDULER, length), 5, rows))
    # requests after length / ageing calls do not overtake it, and earlier ones end soon after that
    bound = length / ageing + short * (slots + 2) * (length / ageing * slots + slots)
    while not long.running and not long.over:
        for _ in range(slots):  # more requests arrive than are served
            submit(loop, brief)
        loop.step()
        assert loop.calls <= bound


def test_a_short_request_overtakes_a_long_one_until_that_is_old_enough() -> None:
    loop = StepLoop(Toy(), 1)
    first = submit(loop, a_run(make("ddim", SCHEDULER, 6)))
    loop.step()
    long, brief = (submit(loop, a_run(make("ddim", SCHEDULER, steps), steps)) for steps in (30, 4))
    while not brief.over:
        loop.step()
    assert first.over and not long.running and (first.began, brief.began, brief.ended) == (0, 6, 10)
    late = submit(loop, a_run(make("ddim", SCHEDULER, 25), 1))
    finish(loop)
    assert long.began == 10 and late.began == 40  # shorter by 5 steps, and 10 calls younger


def test_a_request_of_two_rows_is_not_overtaken_by_those_of_one() -> None:
    loop = StepLoop(Toy(), 2)
    running = submit(loop, a_run(make("ddim", SCHEDULER, 5)))
    loop.step()
    pair = submit(loop, a_run(make("ddim", SCHEDULER, 3), 1, rows=2))
    single = submit(loop, a_run(make("ddim", SCHEDULER, 3), 2))
    loop.step()
    assert not pair.running and not single.running  # one row stays free for a while
    finish(loop)
    assert running.ended == pair.began == 5 and single.began == 8
    with pytest.raises(InputError, match="takes 2 rows of the batch and there are 1 slots"):
        submit(StepLoop(Toy(), 1), a_run(make("ddim", SCHEDULER, 3), rows=2))


def test_cancelling_frees_the_slot_for_a_waiting_request() -> None:
    loop = StepLoop(Toy(), 1)
    running, waiting = (submit(loop, a_run(make("dpm++", SCHEDULER, 9), seed)) for seed in (0, 1))
    for _ in range(3):
        loop.step()
    assert loop.cancel(running) and "cancelled after 3 of 9 steps" in str(running.error)
    assert not running.running and running.estimate() is None
    loop.step()
    assert waiting.running and waiting.began == 3 and waiting.steps_done == 1
    assert loop.cancel(waiting) and not loop.running and loop.step() == [] and loop.calls == 4


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_estimate_is_the_clean_latent_if_the_network_predicts_the_true_noise(name: str, strength: float) -> None:
    """This holds for the estimate after every step."""
    table = make(name, SCHEDULER, 8).start(strength)
    draw = np.random.default_rng(3)
    clean, noise = draw.standard_normal((2, *SHAPE), np.float32)

    class Knows(Toy):
        @contextlib.contextmanager
        def bind(self, batch: int, size: tuple[int, int] | None = None) -> Iterator[Bound]:
            assert size is not None
            bound = ToyBound(self, batch, size, True)
            bound.run = lambda: setattr(bound, "made", noise[None])  # type: ignore[method-assign]
            yield bound

    loop = StepLoop(Knows(), 1)
    start = (table.image_scale[0] * clean + table.noise_scale[0] * noise).astype(np.float32)
    ticket = submit(loop, Run(table, start, ({"text": np.float32(0)},)))
    assert ticket.estimate() is None
    while not ticket.over:
        loop.step()
        estimate = ticket.estimate()
        assert estimate is not None
        last = ticket.steps_done == len(table)
        np.testing.assert_allclose(estimate, clean, atol=0.1 if last else 2e-3)  # the last level has some noise left


def test_a_failure_ends_only_the_requests_of_its_call() -> None:
    loop = StepLoop(Toy(fails=2), 4)
    small, large = (submit(loop, a_run(make("ddim", SCHEDULER, 3), 0, 1, size)) for size in ((2, 3), (4, 4)))
    ended = loop.step()
    assert ended == [large] and "the toy broke" in str(large.error) and small.running

    def broken() -> Run:
        raise InputError("no such text; give another")

    bad = loop.submit(broken, 3)
    wrong = loop.submit(lambda: a_run(make("ddim", SCHEDULER, 4)), 3)
    assert set(loop.step()) == {bad, wrong}
    assert "no such text" in str(bad.error) and "the run has 4 steps" in str(wrong.error)
    finish(loop)
    assert small.error is None and small.latents is not None


@pytest.mark.parametrize(("slots", "buckets"), [(0, None), (4, (1, 2)), (2, (0, 2)), (2, ())])
def test_invalid_slots_and_buckets_are_refused(slots: int, buckets: tuple[int, ...] | None) -> None:
    with pytest.raises(InputError):
        StepLoop(Toy(), slots, buckets)


# -- on ONNX Runtime ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def guided(micro_bundles: Path) -> Pipeline:
    return Pipeline.load(micro_bundles / "guided", provider="cpu", threads=1)


@pytest.fixture(scope="module")
def plain(micro_bundles: Path) -> Pipeline:
    return Pipeline.load(micro_bundles / "plain", provider="cpu", threads=1)


def serve(pipeline: Pipeline, requests: list[Prepared], slots: int, gaps: list[int], powers: bool) -> list[np.ndarray]:
    """Return the images of requests that arrive ``gaps`` calls apart."""
    loop = pipeline.step_loop(slots, (1, 2, 4, 8) if powers else None)
    tickets: list[Ticket] = []
    for prepared, gap in zip(requests, gaps, strict=False):
        tickets.append(loop.submit(lambda p=prepared: pipeline.run(p, 0), len(prepared.table), prepared.rows))
        for _ in range(gap):
            loop.step()
    finish(loop)
    return [pipeline.decode(ticket.latents[None])[0] for ticket in tickets if ticket.latents is not None]


IMAGE = np.random.default_rng(7).integers(0, 256, (32, 32, 3), np.uint8)
ASKED = st.fixed_dictionaries(
    {"prompts": st.sampled_from(["a red apple", "a panda", ""]), "steps": st.integers(1, 6), "seed": st.integers(0, 9),
     "guidance": st.sampled_from([1.0, 2.5, 7.0]), "schedule": st.sampled_from(sorted(SCHEDULES))}
)  # fmt: skip


@settings(max_examples=8)
@given(asked=st.lists(ASKED, min_size=2, max_size=7), gaps=st.lists(st.integers(0, 3), min_size=7, max_size=7),
       slots=st.integers(1, 6), powers=st.booleans())  # fmt: skip
def test_guided_images_equal_those_of_the_pipeline(
    guided: Pipeline, asked: list[dict], gaps: list[int], slots: int, powers: bool
) -> None:
    served = serve(guided, [guided.prepare(**each) for each in asked], slots, gaps, powers)
    for each, pixels in zip(asked, served, strict=True):
        (lone,) = guided(**each)
        np.testing.assert_array_equal(pixels, lone.pixels)
        assert guided.prepare(**each).parameters(0) == lone.parameters


@settings(max_examples=8)
@given(asked=st.lists(st.tuples(ASKED, st.sampled_from(["cfg", "unguided"]), st.sampled_from([None, 0.5, 1.0]),
                                st.sampled_from([None, "blue"])), min_size=2, max_size=6),
       gaps=st.lists(st.integers(0, 3), min_size=6, max_size=6), slots=st.integers(2, 6))  # fmt: skip
def test_cfg_unguided_and_image_to_image_share_calls_with_text_to_image(
    plain: Pipeline, asked: list[tuple[dict, str, float | None, str | None]], gaps: list[int], slots: int
) -> None:
    given = [
        each | {"method": method, "negative": negative if method == "cfg" else None}
        | ({} if strength is None or each["steps"] < 2 else {"init": IMAGE, "strength": strength})
        for each, method, strength, negative in asked
    ]  # fmt: skip
    served = serve(plain, [plain.prepare(**each) for each in given], slots, gaps, powers=False)
    for each, pixels in zip(given, served, strict=True):
        np.testing.assert_array_equal(pixels, plain(**each)[0].pixels)


def test_one_engine_with_a_guide_serves_the_three_methods_in_one_call(guided: Pipeline, plain: Pipeline) -> None:
    requests = [
        {"prompts": prompt, "steps": 5, "seed": seed, "guidance": 4.0, "method": method}
        for seed, (prompt, method) in enumerate([("a red apple", "cfg"), ("a panda", "guided"), ("", "unguided")])
    ]
    together = serve(guided, [guided.prepare(**request) for request in requests], 4, [0, 1, 0], powers=False)
    for request, pixels in zip(requests, together, strict=True):
        (lone,) = serve(guided, [guided.prepare(**request)], 4, [0], powers=False)
        np.testing.assert_array_equal(pixels, lone)
        if request["method"] != "guided":  # unlike the plain engine's, this graph adds residuals of 0
            apart = np.abs(pixels.astype(int) - plain(**request)[0].pixels.astype(int))
            assert apart.max() <= 1
    for request, pixels in zip(requests, together, strict=True):  # the pipeline takes the same methods
        np.testing.assert_array_equal(pixels, guided(**request)[0].pixels)
    with pytest.raises(InputError, match="cannot do 'cfg-interval' step by step; it can do: guided, cfg, unguided"):
        guided.run(guided.prepare("a cat", method="cfg-interval"), 0)


def test_buckets_are_batches_of_the_engine(guided: Pipeline) -> None:
    assert guided.step_loop(3).buckets == (1, 2, 3) and guided.step_loop(99).slots == guided.max_batch
    with pytest.raises(InputError, match="a bucket is 64"):
        guided.step_loop(4, (1, 64))


@pytest.mark.parametrize(
    ("kept", "slots", "buckets"),
    [(8, 8, tuple(range(1, 9))), (4, 8, (1, 2, 4, 8)), (4, 16, (2, 4, 8, 16)), (3, 5, (2, 3, 5))],
)
def test_buckets_are_limited_to_the_loaded_sessions_if_each_batch_has_its_own(
    kept: int, slots: int, buckets: tuple[int, ...]
) -> None:
    network = OrtNetwork(Path("none.onnx"), "cpu", 1)
    network.max_loaded = kept
    assert network.batches(slots) == tuple(range(1, slots + 1))
    network._providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert network.batches(slots) == buckets


def test_changing_batch_sizes_create_no_new_session(guided: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """One session runs every batch size, so the weights are in memory only once."""
    created: list[tuple[object, ...]] = []
    network = guided._unet
    assert isinstance(network, OrtNetwork)
    monkeypatch.setattr(network, "_loaded", {})
    load = network._load
    monkeypatch.setattr(network, "_load", lambda *shape: (created.append(shape), load(*shape))[1])
    loop = guided.step_loop(8)
    assert loop.buckets == tuple(range(1, 9))
    for seed in range(9):
        prepared = guided.prepare("a cat", steps=1 + seed % 4, seed=seed)
        loop.submit(lambda p=prepared: guided.run(p, 0), len(prepared.table))  # type: ignore[misc]
        loop.step()
    finish(loop)
    assert created == [(None, (8, 8), None)] and loop.calls > 9
