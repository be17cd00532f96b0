"""``python -m tests.campaign.soak``: generate thousands of images in one process, with threads that share a pipeline.

Steps, guidance scales, batch sizes, schedules and methods are mixed; a tenth of the calls are cancelled first, and some
callbacks raise.  After the first 1,000 images the resident memory may grow by less than 5 MiB for every 1,000.  The
number of file descriptors must not grow, and every checked call must give the same images as one thread alone.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import os
import random
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pnp_trt.errors import Cancelled
from pnp_trt.runtime.pipeline import Pipeline

from . import report

WARM = 1000  # images before memory is measured
LIMIT = 5.0  # MiB per 1,000 images
CHECKED = 200  # calls that one thread repeats
PROMPTS = ("a cat", "a red apple", "", "a " * 60, "🧑‍🚀 rtl \u202e x", "panda")
BATCHES = (1, 1, 2, 3, 4, 8)
SCHEDULES = ("ddim", "dpm++", "euler", "heun", "unipc")
Call = dict[str, Any]


def resident() -> float:
    """Resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def descriptors() -> int:
    """Number of open file descriptors."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def calls(pipeline: Pipeline, images: int, seed: int = 1) -> list[Call]:
    """Return mixed calls with at least ``images`` images in total."""
    draw, mixed, total = random.Random(seed), [], 0
    methods = [None, None, *pipeline.methods, *pipeline.baselines]
    while total < images:
        number = draw.choice(BATCHES)
        total += number
        method = draw.choice(methods)
        mixed.append({
            "prompts": [draw.choice(PROMPTS) for _ in range(number)],
            "steps": draw.choice((1, 2, 3, 5, 8)),
            "guidance": [draw.choice((1.0, 3.0, 7.5, 9.0)) for _ in range(number)],
            "seed": [draw.randrange(2**40) for _ in range(number)],
            "schedule": "ddim" if method in pipeline.baselines else draw.choice(SCHEDULES),
            "method": method,
        })  # fmt: skip
    return mixed


def generate(pipeline: Pipeline, call: Call) -> list[str]:
    """Digests of a call's images."""
    arguments = dict(call)
    images = pipeline(arguments.pop("prompts"), **arguments)
    return [hashlib.sha256(image.pixels.tobytes()).hexdigest() for image in images]


def disturb(pipeline: Pipeline, call: Call, number: int) -> None:
    """Cancel a tenth of the calls, and raise an error in the callback of a few."""
    draw, arguments = random.Random(number), dict(call)
    prompts = arguments.pop("prompts")

    def fail(done: int, total: int) -> None:
        raise ValueError("the callback's own")

    if draw.random() < 0.1:
        last = draw.randrange(1, 3)
        with contextlib.suppress(Cancelled):
            pipeline(prompts, callback=lambda done, total: done < last, **arguments)
    if draw.random() < 0.03:
        with contextlib.suppress(ValueError):
            pipeline(prompts, callback=fail, **arguments)


def soak(engine: Path, images: int, threads: int) -> dict[str, Any]:
    """Generate ``images`` images and return the measurements."""
    pipeline = Pipeline.load(engine, provider="cpu", threads=1)
    work = calls(pipeline, images)
    marks: list[tuple[int, float, int]] = []
    results: dict[int, list[str]] = {}
    lock, done = threading.Lock(), 0

    def one(number: int) -> None:
        nonlocal done
        disturb(pipeline, work[number], number)
        results[number] = generate(pipeline, work[number])
        with lock:
            before, done = done, done + len(results[number])
            if done // 250 > before // 250:
                marks.append((done, resident(), descriptors()))

    begun = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(len(work))))
    seconds = time.monotonic() - begun
    gc.collect()
    marks.append((done, resident(), descriptors()))
    sample = random.Random(2).sample(range(len(work)), min(CHECKED, len(work)))
    differing = sum(generate(pipeline, work[n]) != results[n] for n in sample)
    return {
        "engine": engine.name, "images": done, "threads": threads, "seconds": round(seconds, 1),
        "mib_per_1000": round(growth(marks), 2), "marks": [(n, round(mib, 1), fds) for n, mib, fds in marks],
        "descriptors": (marks[0][2], marks[-1][2]), "calls_checked": len(sample), "calls_differing": differing,
    }  # fmt: skip


def growth(marks: list[tuple[int, float, int]]) -> float:
    """Memory growth in MiB per 1,000 images after the first ``WARM``, by least squares."""
    late = [(n, mib) for n, mib, _ in marks if n >= min(WARM, marks[-1][0] // 3)]
    images, mib = np.array(late).T
    return float(np.polyfit(images, mib, 1)[0] * 1000)


def failures(result: dict[str, Any]) -> list[str]:
    """Return a sentence for every failed check."""
    first, last = result["descriptors"]
    checks = {
        f"memory grows by {result['mib_per_1000']} MiB for every 1,000 images": result["mib_per_1000"] < LIMIT,
        f"{first} file descriptors became {last}": last <= first,
        f"{result['calls_differing']} calls differ from one thread's": result["calls_differing"] == 0,
    }
    return [f"{result['engine']}: {sentence}" for sentence, holds in checks.items() if not holds]


def main() -> int:
    """Run the soak test; return 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.soak", description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--engine", type=Path, action="append", help="default: the micro bundles")
    parser.add_argument("--out", type=Path, default=report.FOLDER / "soak.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    engines = options.engine or [_micro() / name for name in ("guided", "plain")]
    results = [soak(engine, options.images, options.threads) for engine in engines]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    from pnp_trt.bundle.provenance import provenance

    command = [
        "python",
        "-m",
        "tests.campaign.soak",
        "--images",
        str(options.images),
        "--threads",
        str(options.threads),
    ]
    options.out.write_text(json.dumps({"provenance": provenance(command), "engines": results}, indent=1) + "\n")
    wrong = [sentence for result in results for sentence in failures(result)]
    for result in results:
        print({k: v for k, v in result.items() if k != "marks"})
    print("\n".join(wrong) or "everything holds")
    return int(bool(wrong))


def _micro() -> Path:
    from .__main__ import fixtures

    return fixtures() / "engines"


if __name__ == "__main__":
    sys.exit(main())
