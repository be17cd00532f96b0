"""Schedules from outside the package: their order of convergence, and images through the command line.

Oracles: the closed solution of the probability-flow ODE for Gaussian data, and textbook update loops on ONNX Runtime.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from pnp_trt.runtime.images import read_parameters
from pnp_trt.runtime.pipeline import Pipeline

from ..conftest import Result

PNP = Callable[..., Result]
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def signal_levels(beta_start: float = 0.00085, beta_end: float = 0.012) -> list[float]:
    """ᾱ of the training timesteps under scaled_linear betas, in double precision."""
    start, end = math.sqrt(beta_start), math.sqrt(beta_end)
    levels, product = [], 1.0
    for i in range(1000):
        product *= 1 - (start + (end - start) * i / 999) ** 2
        levels.append(product)
    return levels


def error(table: object, prediction: str, deviation: float, last: float) -> float:
    """Relative error of the final x for one-dimensional data N(0, s²), whose predictions and solution are known.

    The marginals are N(0, ᾱs² + 1 − ᾱ), and along the ODE x stays at a constant number of standard deviations.
    """
    levels = signal_levels()
    x, previous = 1.0, None
    for i, t in enumerate(table.timesteps):  # type: ignore[attr-defined]
        a, sigma = math.sqrt(levels[t]), math.sqrt(1 - levels[t])
        variance = levels[t] * deviation**2 + 1 - levels[t]
        noise, data = sigma * x / variance, a * deviation**2 * x / variance
        output = noise if prediction == "epsilon" else a * noise - sigma * data
        x, previous = table.step(i, x, output, previous)  # type: ignore[attr-defined]
    first = levels[table.timesteps[0]]  # type: ignore[attr-defined]
    exact = math.sqrt((last * deviation**2 + 1 - last) / (first * deviation**2 + 1 - first))
    return abs(x / exact - 1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("deviation", [0.5, 1.0, 3.0])
def test_orders_of_convergence(deviation: float, prediction: str) -> None:
    from adams_bashforth_schedule import ab2
    from quadratic_schedule import quadratic

    config = CONFIG | {"prediction_type": prediction}
    for rule, order, last in ((quadratic, 1, 1.0), (ab2, 2, signal_levels()[0])):
        coarse, fine = (error(rule(config, steps), prediction, deviation, last) for steps in (40, 80))
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15), rule.name
    assert ab2(config, 8).multistep and not quadratic(config, 8).multistep


def textbook(
    name: str, network: Callable[[np.ndarray, int], np.ndarray], x: np.ndarray, steps: int, levels: list[float]
) -> np.ndarray:
    """Return the final latents by the methods' formulas; Adams–Bashforth uses y = x/α and r = σ/α."""
    if name == "quadratic":
        grid = [round(999 * (i / steps) ** 2) for i in range(steps, -1, -1)]
        for now, after in itertools.pairwise(grid):
            noise = network(x, now)
            data = (x - math.sqrt(1 - levels[now]) * noise) / math.sqrt(levels[now])
            end = 1.0 if after == 0 else levels[after]
            x = math.sqrt(end) * data + math.sqrt(1 - end) * noise
        return x
    grid = [round(999 * i / steps) for i in range(steps, -1, -1)]
    rate = [math.sqrt((1 - levels[t]) / levels[t]) for t in grid]
    y, before = x / math.sqrt(levels[grid[0]]), None
    for i in range(steps):
        h = rate[i + 1] - rate[i]
        noise = network(y * math.sqrt(levels[grid[i]]), grid[i])
        slope = noise if before is None else noise + h / (2 * (rate[i] - rate[i - 1])) * (noise - before)
        y, before = y + h * slope, noise
    return y * math.sqrt(levels[grid[-1]])


@pytest.mark.parametrize("name", ["quadratic", "ab2"])
def test_images_equal_those_of_textbook_loops(name: str, pnp_trt: PNP, micro_bundles: Path, tmp_path: Path) -> None:
    done = pnp_trt(
        "sample", "a red cat", "--engine", micro_bundles / "plain", "--method", "unguided", "--schedule", name,
        "--steps", 6, "--seed", 5, "--provider", "cpu", "--quiet", "--out", tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    from PIL import Image

    file = Path(done.out.strip())
    assert read_parameters(file)["schedule"] == name
    pipe = Pipeline.load(micro_bundles / "plain", provider="cpu", threads=1)
    text = np.asarray(pipe.encode(["a red cat"]))
    session = ort.InferenceSession(micro_bundles / "plain" / "unet.onnx", providers=["CPUExecutionProvider"])

    def network(x: np.ndarray, t: int) -> np.ndarray:
        feed = {"sample": x.astype(np.float32), "timestep": np.array([t]), "encoder_hidden_states": text}
        return np.asarray(session.run(None, feed)[0], np.float64)

    teacher = pipe.bundle.manifest.scheduler
    assert (teacher["prediction_type"], teacher["beta_schedule"]) == ("epsilon", "scaled_linear")
    levels = signal_levels(teacher["beta_start"], teacher["beta_end"])
    latents = textbook(name, network, pipe.noise([5]).astype(np.float64), 6, levels)
    expected = pipe.decode(latents.astype(np.float32))[0]
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 1
    plain = pipe("a red cat", steps=6, seed=5, method="unguided")[0].pixels
    assert np.abs(pixels.astype(int) - plain.astype(int)).max() > 1  # more than the oracle's tolerance


def test_help_lists_the_schedules(pnp_trt: PNP) -> None:
    assert "ab2, quadratic or teacher" in " ".join(pnp_trt("sample", "--help").out.replace("│", " ").split())
    refused = pnp_trt("sample", "a cat", "--schedule", "cubic", "--engine", "nowhere")
    assert refused.code == 2
