"""Cold start: time a separate process of `pnp-trt sample` that generates one image, from start to end."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...bundle.store import find_bundle, read_manifest
from ...errors import InputError, PnpError
from ...io.process import run_child

PROMPT = "a red apple"
BOUNDARY = (
    "one pnp-trt sample of one image in a new process, from its start to its end: Python, imports, checking and "
    "loading the engine, sampling, writing the PNG; the files' pages were in memory already"
)


def measure(
    engine: str,
    *,
    rounds: int = 5,
    steps: int | None = None,
    provider: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure one row of the document's `cold_start`.

    engine: a bundle's name or path.  steps: None for the engine's default.  progress: called as
    progress(starts done, total starts).

    The row has `engine`, `seconds` (of each start), `p50_s`, `imports_s` (median time that Python spends on imports,
    measured in separate starts with `-X importtime`, which are slower) and `boundary`.

    Raises InputError for less than one round or an engine that does not exist, PnpError if a start fails.
    """
    name = read_manifest(find_bundle(engine)).name
    seconds, imports = starts(engine, rounds=rounds, steps=steps, provider=provider, progress=progress)
    return {
        "engine": name,
        "seconds": seconds,
        "p50_s": round(float(np.median(seconds)), 3),
        "imports_s": round(float(np.median(imports)), 3),
        "boundary": BOUNDARY,
    }


def starts(
    engine: str,
    *,
    rounds: int,
    steps: int | None = None,
    provider: str = "auto",
    prompt: str = PROMPT,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[float], list[float]]:
    """Return the seconds of each start, and of the imports in as many other starts; the first of each is discarded."""
    if rounds < 1:
        raise InputError(f"rounds must be at least 1, got {rounds}")
    seconds: list[float] = []
    imports: list[float] = []
    with tempfile.TemporaryDirectory(prefix="pnp-trt-cold-") as folder:
        arguments = ["sample", prompt, "--engine", engine, "--out", folder, "--provider", provider, "-q"]
        timed_arguments = [*arguments, *([] if steps is None else ["--steps", str(steps)])]
        for number in range(-1, rounds):
            start_s = start(timed_arguments)
            imports_s = imports_of([*arguments, "--steps", "1"])
            if number >= 0:
                seconds.append(round(start_s, 3))
                imports.append(round(imports_s, 3))
            if progress is not None:
                progress(2 * (number + 2), 2 * (rounds + 1))
    return seconds, imports


def start(arguments: Sequence[str]) -> float:
    """Return the seconds of `pnp-trt ARGUMENTS` in a new process; raise PnpError with its last line if it fails."""
    began = time.perf_counter()
    _run([sys.executable, "-m", "pnp_trt", *arguments])
    return time.perf_counter() - began


def imports_of(arguments: Sequence[str]) -> float:
    """Return the seconds that `pnp-trt ARGUMENTS` spends on imports: the sum of the modules' own times."""
    stderr = _run([sys.executable, "-X", "importtime", "-m", "pnp_trt", *arguments])
    own = [line.split(":")[1].split("|")[0].strip() for line in stderr.splitlines() if line.startswith("import time:")]
    return sum(int(microseconds) for microseconds in own if microseconds.isdigit()) / 1e6


def _run(command: Sequence[str]) -> str:
    """Run the command and return its standard error."""
    done = run_child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("import time:")]
        raise PnpError(f"a cold start failed: {lines[-1] if lines else 'no reason given'}")
    return done.stderr
