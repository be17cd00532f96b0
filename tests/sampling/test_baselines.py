"""Sequential CFG and CFG on an interval: equal to CFG or to unguided sampling where they must be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pnp_trt.errors import Cancelled, InputError
from pnp_trt.runtime.pipeline import Pipeline
from pnp_trt.sampling.methods import GUIDED_SIGMAS, default_interval, guided_steps
from pnp_trt.sampling.noise_levels import alphas_cumprod
from pnp_trt.sampling.schedules import SCHEDULES, make

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
ALL = (0, 999)


@pytest.fixture(scope="module")
def plain(micro_bundles: Path) -> Pipeline:
    return Pipeline.load(micro_bundles / "plain", provider="cpu", threads=1)


def drawn(pipe: Pipeline, method: str, schedule: str = "ddim", **more: object) -> np.ndarray:
    context = pipe.encode(["a cat", "a red house"])
    return pipe.denoise(
        context, pipe.noise([3, 4]), steps=6, guidance=np.array([2.0, 5.0], np.float32), method=method,
        schedule=schedule, **more,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_sequential_cfg_equals_cfg_in_one_batch(plain: Pipeline, schedule: str) -> None:
    cfg, two = drawn(plain, "cfg", schedule), drawn(plain, "cfg-two-passes", schedule)
    assert np.abs(cfg - two).max() <= 1e-4 * np.abs(cfg).max()
    assert np.abs(cfg - drawn(plain, "unguided", schedule)).max() > 0.01 * np.abs(cfg).max()


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_a_full_interval_is_cfg_and_an_empty_one_is_unguided(plain: Pipeline, schedule: str) -> None:
    cfg, unguided = drawn(plain, "cfg", schedule), drawn(plain, "unguided", schedule)
    np.testing.assert_array_equal(drawn(plain, "cfg-interval", schedule, guided_interval=ALL), cfg)
    nothing = (1, 1)  # contains no timestep of a schedule of six steps
    np.testing.assert_array_equal(drawn(plain, "cfg-interval", schedule, guided_interval=nothing), unguided)
    part = drawn(plain, "cfg-interval", schedule)
    assert not np.array_equal(part, cfg) and not np.array_equal(part, unguided)


def test_images_are_generated_by_name_of_the_method_and_record_it(plain: Pipeline) -> None:
    (interval,) = plain("a cat", steps=3, method="cfg-interval", guided_interval=ALL)
    (cfg,) = plain("a cat", steps=3, method="cfg")
    assert np.array_equal(interval.pixels, cfg.pixels) and interval.parameters["method"] == "cfg-interval"
    (avoiding,) = plain("a cat", steps=3, method="cfg-two-passes", negative="a dog")
    (same,) = plain("a cat", steps=3, method="cfg", negative="a dog")
    assert np.abs(avoiding.pixels.astype(int) - same.pixels.astype(int)).max() <= 1


def test_the_callback_cancels_baselines(plain: Pipeline) -> None:
    for method in plain.baselines:
        with pytest.raises(Cancelled, match="after 2 of 6"):
            drawn(plain, method, callback=lambda done, _: done < 2)


def test_unsupported_methods_and_intervals_are_refused(plain: Pipeline, micro_bundles: Path) -> None:
    assert plain.methods == ("cfg", "unguided")  # `sample` does not offer baselines
    with pytest.raises(InputError, match="goes with method 'cfg-interval', not with 'cfg'"):
        drawn(plain, "cfg", guided_interval=ALL)
    for wrong in ((-1, 5), (6, 5), (0, 1000)):
        with pytest.raises(InputError, match=rf"guided_interval is {wrong[0]} to {wrong[1]}; .* from 0 to 999"):
            drawn(plain, "cfg-interval", guided_interval=wrong)
    guided = Pipeline.load(micro_bundles / "guided", provider="cpu", threads=1)
    assert guided.baselines == ()
    with pytest.raises(InputError, match="cannot do 'cfg-interval'; it can do: guided"):
        drawn(guided, "cfg-interval")


def test_a_loop_on_the_gpu_refuses_baselines(plain: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "baselines", ())  # as it is if `loops` runs whole images
    with pytest.raises(InputError, match="cannot do 'cfg-two-passes'; it runs step by step on the host"):
        drawn(plain, "cfg-two-passes")


def test_the_default_interval_covers_its_noise_levels() -> None:
    low, high = default_interval(SCHEDULER)
    alphas = alphas_cumprod(SCHEDULER)
    sigmas = np.sqrt((1 - alphas) / alphas)
    assert sigmas[low - 1] <= GUIDED_SIGMAS[0] < sigmas[low]
    assert sigmas[high] <= GUIDED_SIGMAS[1] < sigmas[high + 1]
    with pytest.raises(InputError, match="no timestep of the teacher has a noise level from 0.28 to 5.42"):
        default_interval(SCHEDULER | {"beta_start": 1e-9, "beta_end": 1e-9})


@settings(max_examples=60)
@given(steps=st.integers(1, 100), low=st.integers(0, 999), width=st.integers(0, 999))
def test_guided_steps_are_those_inside_the_interval(steps: int, low: int, width: int) -> None:
    table = make("ddim", SCHEDULER, steps)
    high = min(low + width, 999)
    assert guided_steps(table, (low, high)).tolist() == [low <= t <= high for t in table.timesteps.tolist()]
    assert guided_steps(table, ALL).all()
