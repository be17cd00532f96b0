"""The serving part of a run: measured costs of an engine's calls by batch size, and queues simulated with them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ...runtime.pipeline import Pipeline
from ...runtime.text import Text
from ...sampling.methods import GUIDED
from ...sampling.schedules import ddim
from ...sampling.step_loop import SLOTS, StepLoop
from . import queues

PROMPTS = ("a red apple", "a panda", "a red heart, noto style", "a lighthouse", "a blue car", "a green tree")
#: consecutive steps per timing, for both batching policies, and total steps of the requests in the timed loops
TIMED_STEPS, LONGEST = 4, 1000
BOUNDARY = (
    "a network call by each batch and each batching policy, a text encoding and a decoding were timed; the queues were "
    "then served by the server's own loop on a clock that these medians drive, HTTP and image files not included"
)


def measure(
    pipeline: Pipeline,
    *,
    rounds: int,
    requests: int,
    steps: Sequence[int],
    guidance: Sequence[float],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure one row of the document's ``serving``.

    Args:
        pipeline: pipeline of an engine with a guide.
        rounds: rounds of the timed calls.
        requests: number of requests in each queue.
        steps, guidance: values that the requests mix.
        progress: called as progress(rounds done, total rounds).
    """
    measured = costs(pipeline, rounds, guidance, progress=progress)
    policies = {name: policy for name, policy in queues.POLICIES.items() if name != "cfg" or measured.slots > 1}
    capacities = queues.capacity(measured, requests, steps, policies)
    return {
        "engine": pipeline.name, "slots": measured.slots, "rounds": rounds, "requests": requests, "burst": queues.BURST,
        "steps": list(steps), "guidance": list(guidance), "boundary": BOUNDARY,
        "calls": [
            {"batch": n, "whole_s": measured.whole[n], "step_s": measured.step[n]} for n in measured.step
        ],
        "text_s": measured.text, "decode_s": measured.decode, "capacity_per_s": capacities,
        "queues": queues.rows(measured, requests, steps, policies, capacities),
    }  # fmt: skip


def costs(
    pipeline: Pipeline,
    rounds: int,
    guidance: Sequence[float],
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int], None] | None = None,
) -> queues.Costs:
    """Return medians of ``rounds``, at most 199; batch sizes and policies alternate, so that other load affects all.

    Args:
        guidance: scales w, mixed in every batch.
        clock: returns seconds.
        progress: called as progress(rounds done, total rounds).
    """
    loops = _full_loops(pipeline, guidance)
    whole: dict[int, list[float]] = {n: [] for n in loops}
    step: dict[int, list[float]] = {n: [] for n in loops}
    text: list[float] = []
    decode: list[float] = []
    states = pipeline.encode([PROMPTS[1]])
    for done in range(min(rounds, LONGEST // (TIMED_STEPS + 1) - 1)):
        for n, loop in loops.items():
            loop.step()  # warm-up: the network of this batch size has not run for a while
            arguments = states.repeated(n), pipeline.noise(range(n)), guidance
            for policy in ("step", "whole") if done % 2 else ("whole", "step"):
                if policy == "step":
                    step[n].append(_seconds(partial(_steps, loop), clock) / TIMED_STEPS)
                else:
                    whole[n].append(_seconds(partial(_denoise, pipeline, *arguments), clock) / TIMED_STEPS)
        latents = np.zeros_like(arguments[1][:1])
        text.append(_seconds(lambda: pipeline.encode([PROMPTS[1]]), clock))
        decode.append(_seconds(partial(pipeline.decode, latents), clock))
        if progress is not None:
            progress(done + 1, rounds)
    return queues.Costs(_medians(whole), _medians(step), float(np.median(text)), float(np.median(decode)))


def _steps(loop: StepLoop) -> None:
    for _ in range(TIMED_STEPS):
        loop.step()


def _denoise(pipeline: Pipeline, states: Text, noise: np.ndarray, guidance: Sequence[float]) -> None:
    w = np.resize(np.asarray(guidance, np.float32), len(noise))
    pipeline.denoise(states, noise, steps=TIMED_STEPS, guidance=w, method=GUIDED.name, schedule=ddim.name)


def _full_loops(pipeline: Pipeline, guidance: Sequence[float]) -> dict[int, StepLoop]:
    """Return a full step loop for each batch size that a server pads to."""
    loops = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a stage 2 guide was not distilled for so many steps
        for n in pipeline.step_loop(SLOTS).buckets:
            prepared = pipeline.prepare(
                [PROMPTS[i % len(PROMPTS)] for i in range(n)], steps=LONGEST, seed=list(range(n)),
                guidance=[guidance[i % len(guidance)] for i in range(n)], schedule=ddim.name, method=GUIDED.name,
            )  # fmt: skip
            loops[n] = pipeline.step_loop(SLOTS)
            for i in range(n):
                loops[n].submit(lambda p=prepared, i=i: pipeline.run(p, i), LONGEST)  # type: ignore[misc]
            loops[n].step()
    return loops


def _seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    run()
    return clock() - started


def _medians(observed: dict[int, list[float]]) -> dict[int, float]:
    return {n: float(np.median(values)) for n, values in observed.items()}
