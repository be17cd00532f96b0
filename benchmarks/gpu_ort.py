"""ONNX Runtime's CUDA provider on the bundled model: images against the CPU provider's, time, nodes on the CPU."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS = ["a red apple", "a red heart, noto style", "an automobile, twemoji style", "a panda"]
STEPS = (8, 50)
Say = Callable[[dict[str, Any]], object]


def measure(
    say: Say, rounds: int = 5, *, provider: str = "cuda", base: str = "emoji", guide: str = "emoji-tiny",
    precisions: tuple[str, ...] = ("fp32", "fp16"), steps: tuple[int, int] = STEPS,
) -> dict[str, Any]:  # fmt: skip
    """Measure the guided engine, and the teacher's with CFG, in each precision.

    Args:
        say: called with all results so far, after each figure.
        rounds: timed images of each kind; medians are kept.
        provider: the provider whose images are compared with the CPU's.
        steps: the two numbers of steps that are timed; images of the first are compared.

    Returns:
        By precision and method: seconds of the build, milliseconds of an image and of a step at batch 1 and 4, the
        largest and mean difference from the CPU provider's images in levels of 255, and the warnings.
    """
    from pnp_trt.build.builder import build
    from pnp_trt.build.spec import BuildSpec
    from pnp_trt.runtime.pipeline import Pipeline

    results: dict[str, Any] = {"backend": "onnxruntime", "provider": provider, "base": base}
    with tempfile.TemporaryDirectory(prefix="pnp-trt-gpu-") as folder:
        for precision in precisions:
            for kind, name, method in (("guided", guide, None), ("CFG", "none", "cfg")):
                row: dict[str, Any] = {}
                results.setdefault(precision, {})[kind] = row
                started = time.perf_counter()
                out = Path(folder) / f"{kind.lower()}-{precision}"
                built = build(BuildSpec(base, name, backend="onnxruntime", precision=precision, out=out))
                row["build_seconds"] = round(time.perf_counter() - started, 1)
                say(results)
                ways: dict[str, Any] = {"method": method, "guidance": 3.0}
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    pipe = Pipeline.load(built.folder, provider=provider)
                    started = time.perf_counter()
                    drawn = pipe(PROMPTS, steps=steps[0], seed=[0, 1, 2, 3], **ways)
                    row["first_images_seconds"] = round(time.perf_counter() - started, 2)
                row["warned"] = sorted({str(w.message) for w in caught})
                expected = Pipeline.load(built.folder, provider="cpu")(
                    PROMPTS, steps=steps[0], seed=[0, 1, 2, 3], **ways
                )
                far = np.abs(np.stack([i.pixels for i in drawn]).astype(int) - np.stack([i.pixels for i in expected]))
                row["levels_from_cpu"] = {"largest": int(far.max()), "mean": round(float(far.mean()), 4)}
                say(results)
                row["image_ms"], row["step_ms"] = {}, {}
                for batch in (1, 4):
                    ms = {n: _ms(pipe, PROMPTS[:batch], n, ways, rounds) for n in steps}
                    row["image_ms"][f"batch {batch}"] = {n: round(v, 3) for n, v in ms.items()}
                    row["step_ms"][f"batch {batch}"] = round((ms[steps[1]] - ms[steps[0]]) / (steps[1] - steps[0]), 4)
                    say(results)
    return results


def _ms(pipe: Any, prompts: list[str], steps: int, ways: dict[str, Any], rounds: int) -> float:
    """Milliseconds of one call of the pipeline: the median after one call that is not counted."""
    seconds = []
    for number in range(-1, rounds):
        begun = time.perf_counter()
        pipe(prompts, steps=steps, seed=list(range(len(prompts))), **ways)
        if number >= 0:
            seconds.append(time.perf_counter() - begun)
    return 1e3 * sorted(seconds)[len(seconds) // 2]
