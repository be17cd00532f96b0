"""Compare methods' latencies: interleaved round by round and paired with CFG in each round; raw times are recorded.

A shared machine drifts (frequency, neighbours, memory), so no method is timed in one block. Every round runs each case
once, in an order that rotates, and the ratio to CFG is computed within each round before taking the median.
This module does not import torch; it times any implementation of `cases.TimedPipeline`.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ...errors import InputError
from ...io.process import collector_paused
from ...sampling.methods import CFG, METHODS
from .cases import Case, TimedPipeline
from .meters import Meters

__all__ = ["BOUNDARY", "METHODS", "Case", "LatencyRow", "TimedPipeline", "measure"]

MIN_STEPS, MAX_STEPS = 1, 1000  # the teacher's schedule has 1,000 training timesteps
DEFAULT_ROUNDS = 15
DEFAULT_WARMUP = 2
CONFIDENCE = 0.95
BOUNDARY = (
    "the denoising loop: network calls, guidance combination and scheduler update, from noise to final latents; "
    "text encoding and VAE decode are timed apart"
)
_RESAMPLES = 2000


@dataclass(frozen=True)
class LatencyRow:
    """One case at one batch size. Times are in milliseconds; those without a suffix are of one whole denoising loop.

    steps: steps that ran; `cfg-fewer-steps` runs half the steps of the other rows.

    p50_ms, p90_ms, p99_ms: the loop for the whole batch, over rounds (with few rounds p99 is close to the slowest).
    p50_ms_per_step: the loop divided by its steps.  p50_ms_per_image: text, loop and decode, divided by the batch size.
    encode_p50_ms, decode_p50_ms: text encoding and VAE decode of the whole batch.
    spread: interquartile range of the loop divided by its median.
    ratio_to_cfg: median over rounds of (this loop / the CFG loop of `ratio_reference` in the same round), with its 95 %
    bootstrap interval [low, high]; None if no CFG was timed to compare with.
    evaluations: U-Net evaluations per image.  images_per_s: throughput of the batch, with text, loop and decode.
    peak_memory_bytes: see `footprint`.  energy_j_per_image: see `energy`.
    least_ms: lower bound of the loop's time on this device, see `roofline`; share_of_least: least_ms / p50_ms.
    guided_interval: lowest and highest timestep with CFG, for `cfg-interval`.  Fields that were not measured are None.
    raw: one entry per round: `round`, `position` (place in the round's order), `encode_ms`, `loop_ms`, `decode_ms`.
    """

    engine: str
    method: str
    batch: int
    steps: int
    guidance: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p50_ms_per_step: float
    p50_ms_per_image: float
    spread: float
    encode_p50_ms: float
    decode_p50_ms: float
    ratio_to_cfg: float | None
    ratio_to_cfg_interval: tuple[float, float] | None
    ratio_reference: str | None
    rounds: int
    warmup: int
    boundary: str
    raw: list[dict[str, Any]] = field(default_factory=list)
    evaluations: int | None = None
    images_per_s: float | None = None
    peak_memory_bytes: int | None = None
    energy_j_per_image: float | None = None
    least_ms: float | None = None
    share_of_least: float | None = None
    guided_interval: tuple[int, int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row as a JSON object."""
        row = asdict(self)
        for key in ("ratio_to_cfg_interval", "guided_interval"):
            row[key] = row[key] and list(row[key])
        return row


def measure(
    cases: Sequence[Case],
    *,
    batches: Sequence[int] = (1, 4),
    steps: int = 8,
    rounds: int = DEFAULT_ROUNDS,
    warmup: int = DEFAULT_WARMUP,
    guidance: float = 3.0,
    prompts: Sequence[str],
    schedule: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    meters: Meters | None = None,
) -> list[LatencyRow]:
    """Time every case at every batch size, one row each, batch by batch in the order of `cases`.

    `prompts` are repeated to fill a batch; the noise of image i has seed i for every case. Warm-up runs of every
    case precede the first round and are not recorded. `schedule` is the name of the sampling schedule, None for each
    pipeline's default. `clock` returns seconds; `seed` is that of the bootstrap; `size` is the images' height and
    width in pixels, None for each engine's default.

    `meters` are the measurements besides times, made once per row after its batch size was timed.

    Raises InputError for no cases, a duplicate case, a method that its engine lacks, or numbers out of range.
    """
    _check(cases, batches, steps, rounds, warmup, guidance, prompts)
    total = len(batches) * len(cases) * (warmup + rounds)
    done = 0

    def report(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, what)

    rows: list[LatencyRow] = []
    for batch in batches:
        texts = [prompts[i % len(prompts)] for i in range(batch)]
        seeds = list(range(batch))
        for case in cases:
            for _ in range(warmup):
                _once(case, texts, seeds, steps, guidance, clock, schedule, size)
                report(f"warm-up, {case.label}, batch {batch}")
        raw: list[list[dict[str, Any]]] = [[] for _ in cases]
        for number in range(rounds):
            gc.collect()  # between rounds, so that no case's time includes it
            for position, index in enumerate(_order(len(cases), number)):
                observed = _once(cases[index], texts, seeds, steps, guidance, clock, schedule, size)
                raw[index].append({"round": number, "position": position, **observed})
                report(f"round {number + 1} of {rounds}, {cases[index].label}, batch {batch}")
        loops = [np.array([one["loop_ms"] for one in observations]) for observations in raw]
        for index, case in enumerate(cases):
            reference = _reference(cases, index)
            ratio = None if reference is None else paired_ratio(loops[index], loops[reference], seed)
            label = None if reference is None else cases[reference].label
            settings = {"batch": batch, "steps": case.steps(steps), "guidance": guidance, "warmup": warmup}
            draw = functools.partial(_once, case, texts, seeds, steps, guidance, clock, schedule, size)
            measured = (meters or Meters()).read(
                case, batch=batch, steps=steps, schedule=schedule, size=size, draw=draw, clock=clock
            )
            rows.append(_row(case, raw[index], ratio, label, settings | measured))
    return rows


def _order(count: int, number: int) -> list[int]:
    """Return the order of round `number`: rotated by one per round, so that no case always runs first or last."""
    start = number % count
    return [*range(start, count), *range(start)]


def _once(
    case: Case,
    prompts: list[str],
    seeds: list[int],
    steps: int,
    guidance: float,
    clock: Callable[[], float],
    schedule: str | None,
    size: tuple[int, int] | None,
) -> dict[str, float]:
    """Time one batch from prompt to pixels; the noise is generated before the clock starts."""
    noise = case.pipe.noise(seeds) if size is None else case.pipe.noise(seeds, size)
    with collector_paused():  # otherwise its time would be attributed to the case that is running
        start = clock()
        context = case.pipe.encode(prompts)
        encoded = clock()
        latents = case.denoise(context, noise, steps=steps, guidance=guidance, schedule=schedule)
        denoised = clock()
        case.pipe.decode(latents)
        decoded = clock()
    return {
        "encode_ms": 1e3 * (encoded - start),
        "loop_ms": 1e3 * (denoised - encoded),
        "decode_ms": 1e3 * (decoded - denoised),
    }


def _reference(cases: Sequence[Case], index: int) -> int | None:
    """Return the CFG case to compare `cases[index]` with: that of its own engine, else the first of the same base.

    A pipeline may name its base model in an attribute `base`; engines of different bases are never compared.
    """
    pipe = cases[index].pipe
    cfg = [number for number, case in enumerate(cases) if case.method == CFG.name]
    own = [number for number in cfg if cases[number].pipe is pipe]
    base = getattr(pipe, "base", None)
    same_base = [number for number in cfg if getattr(cases[number].pipe, "base", None) == base]
    return next(iter(own + same_base), None)


def paired_ratio(loop: np.ndarray, cfg: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Return the median of the ratio paired by round, and its percentile bootstrap interval over rounds.

    loop, cfg: milliseconds [rounds] of two cases, round by round.
    """
    ratios = loop / np.maximum(cfg, 1e-9)  # a clock too coarse for the loop must not divide by zero
    draws = np.random.default_rng(seed).integers(0, len(ratios), size=(_RESAMPLES, len(ratios)))
    medians = np.median(ratios[draws], axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(medians, [tail, 100 - tail])
    return float(np.median(ratios)), float(low), float(high)


def _row(
    case: Case,
    raw: list[dict[str, Any]],
    ratio: tuple[float, float, float] | None,
    reference: str | None,
    settings: dict[str, Any],
) -> LatencyRow:
    encode, loop, decode = (np.array([one[key] for one in raw]) for key in ("encode_ms", "loop_ms", "decode_ms"))
    p25, p50, p75, p90, p99 = (float(value) for value in np.percentile(loop, [25, 50, 75, 90, 99]))
    per_image = float(np.median(encode + loop + decode)) / settings["batch"]
    least = settings["least_ms"]
    return LatencyRow(
        engine=case.pipe.name,
        method=case.method,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        p50_ms_per_step=p50 / settings["steps"],
        p50_ms_per_image=per_image,
        images_per_s=1e3 / per_image if per_image else None,
        share_of_least=least / p50 if least is not None and p50 else None,
        spread=(p75 - p25) / p50 if p50 else 0.0,
        encode_p50_ms=float(np.median(encode)),
        decode_p50_ms=float(np.median(decode)),
        ratio_to_cfg=None if ratio is None else ratio[0],
        ratio_to_cfg_interval=None if ratio is None else (ratio[1], ratio[2]),
        ratio_reference=reference,
        rounds=len(raw),
        boundary=BOUNDARY,
        raw=raw,
        **settings,
    )


def _check(
    cases: Sequence[Case],
    batches: Sequence[int],
    steps: int,
    rounds: int,
    warmup: int,
    guidance: float,
    prompts: Sequence[str],
) -> None:
    if not cases:
        raise InputError("There is nothing to time; give at least one engine with one method.")
    labels = [case.label for case in cases]
    for case in cases:
        if not case.possible:
            own = (*case.pipe.methods, *getattr(case.pipe, "baselines", ()))
            raise InputError(f"Engine '{case.pipe.name}' has no method '{case.method}'; it has {', '.join(own)}.")
        if labels.count(case.label) > 1:
            raise InputError(f"'{case.label}' is given {labels.count(case.label)} times; give each case once.")
    if not batches or any(batch < 1 for batch in batches):
        raise InputError(f"Batch sizes must be at least 1, got {list(batches)}.")
    if not MIN_STEPS <= steps <= MAX_STEPS:
        raise InputError(f"steps must be from {MIN_STEPS} to {MAX_STEPS}, got {steps}.")
    if rounds < 1:
        raise InputError(f"rounds must be at least 1, got {rounds}.")
    if warmup < 0:
        raise InputError(f"warmup must be 0 or more, got {warmup}.")
    if not np.isfinite(guidance):
        raise InputError(f"guidance must be a finite number, got {guidance}.")
    if not prompts:
        raise InputError("Timing needs at least one prompt, got none.")
