"""Measure the sampling loop's overhead on ONNX Runtime's CPU provider with the bundled model.

Four measurements, whose raw values are in the results:

- **overhead**: the share of an image's time, from prompt to pixels, spent outside the networks, at 8 and 50 steps.  It
  is measured for images generated one after the other, as on a server, and for those of the ratio's rounds, where
  diffusers' images in between evict our data from the processor's caches;
- **ratio**: the time of diffusers' own ``StableDiffusionPipeline`` with CFG in 50 steps over that of the guided engine
  in 8, with the same prompts and thread count, rounds interleaved, each ratio within its round;
- **cold start**: one ``pnp-trt sample`` in a new process, and how long its imports take;
- **memory**: resident memory of a process over 1,000 images.

    python -m benchmarks.loop                       # about five minutes on one core
    python -m benchmarks.loop --rounds 3 --images 100
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.records import add_images_option
from pnp_trt.backends.onnxruntime.backend import OrtBound
from pnp_trt.bench.measure import coldstart
from pnp_trt.bundle.provenance import provenance
from pnp_trt.bundle.store import write_json
from pnp_trt.runtime.pipeline import Pipeline

SCHEMA = "pnp-trt/loop/3"
RESULTS = Path(__file__).parent / "results"
PROMPT, GUIDANCE = "a red apple", 3.0
STEPS = (8, 50)
#: program that generates images and prints resident bytes a hundred times
MEMORY = """
import json, psutil, sys
from pnp_trt import Pipeline
engine, images, steps, threads = sys.argv[1], *map(int, sys.argv[2:])
pipeline, process, seen = Pipeline.load(engine, provider="cpu", threads=threads), psutil.Process(), []
for i in range(images):
    pipeline(f"a red apple {i % 7}", steps=steps, seed=i, guidance=2.0 + i % 5)
    if (i + 1) % max(images // 100, 1) == 0:
        seen.append([i + 1, process.memory_info().rss])
print(json.dumps(seen))
"""


@contextmanager
def networks_timed() -> Iterator[list[float]]:
    """Record the seconds of every network run within the block."""
    seconds: list[float] = []
    run = OrtBound.run

    def timed(self: OrtBound) -> None:
        started = time.perf_counter()
        run(self)
        seconds.append(time.perf_counter() - started)

    OrtBound.run = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        OrtBound.run = run  # type: ignore[method-assign]


def once(pipeline: Pipeline, steps: int, seed: int) -> dict[str, float]:
    """Milliseconds of one image, in total and in networks."""
    with networks_timed() as seconds:
        started = time.perf_counter()
        pipeline(PROMPT, steps=steps, guidance=GUIDANCE, seed=seed)
        total = time.perf_counter() - started
    return {"image_ms": 1e3 * total, "networks_ms": 1e3 * sum(seconds)}


def diffusers_pipeline(threads: int) -> Any:
    """diffusers' own pipeline of the bundled model, in float32 and eager."""
    import torch
    from diffusers import StableDiffusionPipeline

    from pnp_trt.assets import ROOT
    from pnp_trt.models.networks import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(threads)
    pipe = StableDiffusionPipeline.from_pretrained(
        ROOT / "emoji", safety_checker=None, local_files_only=True, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rounds_of(cases: dict[str, Any], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Run every case once per round, rotating the order by one place each round; the first round is not counted."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    names = list(cases)
    for number in range(-1, rounds):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            observed = cases[name](max(number, 0))
            if number >= 0:
                rows[name].append({k: round(v, 3) for k, v in observed.items()})
    return rows


def guided(pipeline: Pipeline) -> dict[str, Any]:
    """Our cases: name → function that generates and times one image of a seed."""
    return {f"guided, {n} steps": lambda seed, n=n: once(pipeline, n, seed) for n in STEPS}


def reference(pipe: Any) -> dict[str, Any]:
    """The case of diffusers: name → function that generates and times one image of a seed."""
    import torch

    def timed_image(seed: int) -> dict[str, float]:
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        pipe(PROMPT, num_inference_steps=50, guidance_scale=GUIDANCE, generator=generator, output_type="np")
        return {"image_ms": 1e3 * (time.perf_counter() - started)}

    return {"diffusers, CFG, 50 steps": timed_image}


def overhead(rows: list[dict[str, float]], steps: int) -> dict[str, Any]:
    """Median time of an image outside networks, as a share and in milliseconds."""
    outside = np.array([r["image_ms"] - r["networks_ms"] for r in rows])
    share = outside / np.array([r["image_ms"] for r in rows])
    return {
        "steps": steps,
        "share": round(float(np.median(share)), 5),
        "share_p90": round(float(np.percentile(share, 90)), 5),
        "ms_per_image": round(float(np.median(outside)), 3),
    }


def ratio(rows: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Median of the rounds' ratios and its 95 % bootstrap interval."""
    theirs, ours = (np.array([r["image_ms"] for r in rows[n]]) for n in ("diffusers, CFG, 50 steps", "guided, 8 steps"))
    ratios = theirs / ours
    medians = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
    return {
        "of": "diffusers' StableDiffusionPipeline, CFG, 50 steps, over the guided engine, 8 steps; whole images",
        "times_faster": round(float(np.median(ratios)), 2),
        "interval": [round(float(v), 2) for v in np.percentile(medians, [2.5, 97.5])],
    }


def cold_start(engine: str, rounds: int) -> dict[str, Any]:
    """Seconds of ``pnp-trt sample`` from the start of the process to its end, and of its imports."""
    options: dict[str, Any] = {"rounds": rounds, "provider": "cpu", "prompt": PROMPT}
    few, first = coldstart.starts(engine, steps=8, **options)
    usual, second = coldstart.starts(engine, **options)
    return {"seconds": {"8 steps": few, "20 steps (default)": usual}, "imports_seconds": first + second}


def memory(engine: str, images: int, threads: int) -> dict[str, Any]:
    """Resident bytes over a process's images; growth is counted after a tenth of the images."""
    command = [sys.executable, "-c", MEMORY, engine, str(images), "2", str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seen = json.loads(done.stdout)
    warm = next(rss for n, rss in seen if n >= images / 10)
    return {"images": images, "steps": 2, "growth_mib": round((seen[-1][1] - warm) / 2**20, 2), "rss_bytes": seen}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write one JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop", description=__doc__)
    parser.add_argument("--engine", default="emoji-tiny", help="a guided bundle of the bundled model")
    parser.add_argument("--rounds", type=int, default=12)
    add_images_option(parser, 1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "loop-emoji.json")
    a = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = str(a.threads)
    cold = cold_start(a.engine, max(a.rounds // 2, 2))
    flat = memory(a.engine, a.images, a.threads)
    pipeline = Pipeline.load(a.engine, provider="cpu", threads=a.threads)
    alone = rounds_of(guided(pipeline), 4 * a.rounds)
    rows = rounds_of(guided(pipeline) | reference(diffusers_pipeline(a.threads)), a.rounds)
    outside, cold_caches = ([overhead(r[f"guided, {n} steps"], n) for n in STEPS] for r in (alone, rows))
    faster = ratio(rows)
    document = {
        "schema": SCHEMA,
        "provenance": provenance(["python", "-m", "benchmarks.loop", *(arguments or sys.argv[1:])]),
        "case": {"engine": a.engine, "threads": a.threads, "batch": 1, "guidance": GUIDANCE, "rounds": a.rounds},
        "overhead": outside, "overhead_with_cold_caches": cold_caches, "ratio": faster, "cold_start": cold,
        "memory": flat, "observations": {"one after the other": alone, "with diffusers between": rows},
    }  # fmt: skip
    write_json(a.json, document)
    for how, overheads in (("one after the other", outside), ("with cold caches", cold_caches)):
        for row in overheads:
            share = f"{row['share']:.2%} of the image, {row['ms_per_image']} ms"
            print(f"overhead, {row['steps']} steps, {how}: {share}")
    print(f"diffusers CFG 50 steps / guided 8 steps: {faster['times_faster']} {faster['interval']}")
    medians = {k: float(np.median(v)) for k, v in cold["seconds"].items()}
    print(f"cold start: {medians} s, imports {np.median(cold['imports_seconds']):.2f} s")
    print(f"memory over {flat['images']} images: {flat['growth_mib']:+} MiB")
    print(a.json)


if __name__ == "__main__":
    main()
