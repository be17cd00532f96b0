"""A metric from outside the package: in the results of ``pnp-trt bench``, its tables, and comparisons.

Oracle: the formula in plain Python on images that the pipeline generates from the same prompts and seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pnp_trt.runtime.pipeline import Pipeline

from ..conftest import Result


def colourfulness(pixels: np.ndarray) -> float:
    """Return the colourfulness of one uint8 image ``[H, W, 3]``, pixel by pixel."""
    points = [tuple(map(int, p)) for p in pixels.reshape(-1, 3)]
    rg = [r - g for r, g, _ in points]
    yb = [(r + g) / 2 - b for r, g, b in points]
    spread = math.hypot(statistics.pstdev(rg), statistics.pstdev(yb))
    return spread + 0.3 * math.hypot(statistics.fmean(rg), statistics.fmean(yb))


def test_the_metric_is_measured_shown_and_compared(
    pnp_trt: Callable[..., Result], micro_bundles: Path, tmp_path: Path
) -> None:
    prompts, results = tmp_path / "prompts.txt", tmp_path / "results.json"
    prompts.write_text("a red apple\na blue car\n")
    done = pnp_trt(
        "bench", "--only", "fidelity", "--engine", micro_bundles / "guided", "--steps", 2, "--guidance", 3,
        "--images", 3, "--prompts", prompts, "--json", results, "--provider", "cpu",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "colourfulness ↑" in " ".join(done.out.split())
    document = json.loads(results.read_text())
    (row,) = document["fidelity"]
    pipe = Pipeline.load(micro_bundles / "guided", provider="cpu", threads=1)
    texts = ["a red apple", "a blue car", "a red apple"]
    images = [p.pixels for p in pipe(texts, steps=2, guidance=3.0, seed=[0, 1, 2], schedule="ddim")]
    expected = statistics.fmean(colourfulness(pixels) for pixels in images)
    assert row["colourfulness"]["value"] == pytest.approx(expected, abs=0.5) and row["colourfulness"]["count"] == 3

    value = row["colourfulness"]["value"]
    row["colourfulness"] = {"value": 10 * value, "low": 9 * value, "high": 11 * value, "count": 3}
    better = tmp_path / "better.json"
    better.write_text(json.dumps(document))
    done = pnp_trt("compare", results, better, "--json", tmp_path / "comparison.json")
    assert done.code == 0, done.err
    (figure,) = [f for f in json.loads((tmp_path / "comparison.json").read_text())["figures"]
                 if f["figure"] == "colourfulness"]  # fmt: skip
    assert figure["verdict"] == "better"
