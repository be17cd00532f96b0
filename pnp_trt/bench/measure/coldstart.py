"""Cold start: one image by `pnp-trt sample` in a separate process, from the process's start to its end."""

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
    """One row of the document's `cold_start`.

    engine: a bundle's name or path.  steps: None leaves them to the engine.  progress: called as
    progress(starts done, starts in all).

    The row has `engine`, `seconds` (each start's), `p50_s`, `imports_s` (median of what Python spends on the imports,
    of starts apart with their times shown, which are slower) and `boundary`.

    Raises InputError for less than one round or an engine that is not there, PnpError if a start fails.
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
    """Seconds of each start, and of the imports of as many others; one of both before them is not counted."""
    if rounds < 1:
        raise InputError(f"rounds must be at least 1, got {rounds}")
    seconds: list[float] = []
    imports: list[float] = []
    with tempfile.TemporaryDirectory(prefix="pnp-trt-cold-") as folder:
        words = ["sample", prompt, "--engine", engine, "--out", folder, "--provider", provider, "-q"]
        drawn = [*words, *([] if steps is None else ["--steps", str(steps)])]
        for number in range(-1, rounds):
            took = start(drawn)
            spent = imports_of([*words, "--steps", "1"])
            if number >= 0:
                seconds.append(round(took, 3))
                imports.append(round(spent, 3))
            if progress is not None:
                progress(2 * (number + 2), 2 * (rounds + 1))
    return seconds, imports


def start(arguments: Sequence[str]) -> float:
    """Seconds of `pnp-trt ARGUMENTS` in a new process; PnpError with what it said last, if it fails."""
    began = time.perf_counter()
    _run([sys.executable, "-m", "pnp_trt", *arguments])
    return time.perf_counter() - began


def imports_of(arguments: Sequence[str]) -> float:
    """Seconds that the imports of `pnp-trt ARGUMENTS` take by themselves, each module's own time added up."""
    said = _run([sys.executable, "-X", "importtime", "-m", "pnp_trt", *arguments])
    own = [line.split(":")[1].split("|")[0].strip() for line in said.splitlines() if line.startswith("import time:")]
    return sum(int(microseconds) for microseconds in own if microseconds.isdigit()) / 1e6


def _run(command: Sequence[str]) -> str:
    """What the command wrote to its standard error."""
    done = run_child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("import time:")]
        raise PnpError(f"a cold start failed: {said[-1] if said else 'it gives no reason'}")
    return done.stderr
