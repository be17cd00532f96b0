"""The serving part of a run: what an engine's calls cost by batch, and the queues that these costs decide."""

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
#: steps that are timed in a row, by both batching policies alike, and of the requests whose steps are timed
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
    """One row of the document's ``serving``.

    Args:
        pipeline: of an engine with a guide.
        rounds: of the timed calls.
        requests: of each queue.
        steps, guidance: that requests are mixed of.
        progress: called as progress(rounds done, rounds in all).
    """
    found = costs(pipeline, rounds, guidance, progress=progress)
    policies = {name: policy for name, policy in queues.POLICIES.items() if name != "cfg" or found.slots > 1}
    capacities = queues.capacity(found, requests, steps, policies)
    return {
        "engine": pipeline.name, "slots": found.slots, "rounds": rounds, "requests": requests, "burst": queues.BURST,
        "steps": list(steps), "guidance": list(guidance), "boundary": BOUNDARY,
        "calls": [{"batch": n, "whole_s": found.whole[n], "step_s": found.step[n]} for n in found.step],
        "text_s": found.text, "decode_s": found.decode, "capacity_per_s": capacities,
        "queues": queues.rows(found, requests, steps, policies, capacities),
    }  # fmt: skip


def costs(
    pipeline: Pipeline,
    rounds: int,
    guidance: Sequence[float],
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int], None] | None = None,
) -> queues.Costs:
    """Medians of ``rounds``, at most 199; batches and policies alternate, so that other load falls on all alike.

    Args:
        guidance: scales w, mixed in every batch.
        clock: in seconds.
        progress: called as progress(rounds done, rounds in all).
    """
    loops = _full_loops(pipeline, guidance)
    whole: dict[int, list[float]] = {n: [] for n in loops}
    step: dict[int, list[float]] = {n: [] for n in loops}
    text: list[float] = []
    decode: list[float] = []
    states = pipeline.encode([PROMPTS[1]])
    for done in range(min(rounds, LONGEST // (TIMED_STEPS + 1) - 1)):
        for n, loop in loops.items():
            loop.step()  # the network of this batch has not run for a while
            given = states.repeated(n), pipeline.noise(range(n)), guidance
            for policy in ("step", "whole") if done % 2 else ("whole", "step"):
                if policy == "step":
                    step[n].append(_seconds(partial(_steps, loop), clock) / TIMED_STEPS)
                else:
                    whole[n].append(_seconds(partial(_denoise, pipeline, *given), clock) / TIMED_STEPS)
        latents = np.zeros_like(given[1][:1])
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
    """A step loop for each batch that a server pads to, with as many images under way."""
    loops = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a guide of stage 2 is not made for so many steps
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
