"""The coefficient tables are diffusers' schedulers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from pnp_trt.errors import InputError
from pnp_trt.runtime.schedule import CLASSES, COLUMNS, Schedule, alphas_cumprod, ddim, make, resolve
from pnp_trt.runtime.table import make_table

#: Stable Diffusion's noise, the bundled model's, and diffusers' own default
BETAS = ((0.00085, 0.012), (0.00085, 0.025), (0.0001, 0.02))
COMMON = {
    "beta": st.sampled_from(BETAS),
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    "timestep_spacing": st.sampled_from(["leading", "trailing", "linspace"]),
    "prediction_type": st.sampled_from(["epsilon", "v_prediction"]),
    "steps_offset": st.integers(0, 1),
    "rescale_betas_zero_snr": st.booleans(),
}


def configs(**own: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Scheduler configs; a network that predicts noise is not asked for it where there is no signal."""

    def whole(drawn: dict[str, Any]) -> dict[str, Any]:
        start, end = drawn.pop("beta")
        if drawn["prediction_type"] == "epsilon":
            drawn["rescale_betas_zero_snr"] = False
        return {"num_train_timesteps": 1000, "beta_start": start, "beta_end": end} | drawn

    return st.fixed_dictionaries(COMMON | own).map(whole)


def follow(table: Schedule, scheduler: Any, seed: int, begin: int = 0) -> None:
    """Run both loops on the same outputs, which are bounded as a network's are, and compare every latent."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((1, 4, 4, 4), np.float32)
    assert table.timesteps.tolist() == [round(t) for t in scheduler.timesteps[begin:].tolist()]
    if hasattr(scheduler, "set_begin_index"):  # else it looks for its place by timestep, and two may round to one
        scheduler.set_begin_index(begin)
    if begin:
        image = rng.standard_normal(noise.shape, np.float32)
        x = float(table.image_scale[0]) * image + float(table.noise_scale[0]) * noise
        theirs = scheduler.add_noise(
            torch.from_numpy(image), torch.from_numpy(noise), scheduler.timesteps[begin : begin + 1]
        )
    else:
        x = float(table.init_scale) * noise
        theirs = torch.from_numpy(noise) * scheduler.init_noise_sigma
    previous, rounded = None, 0.0
    for i, t in enumerate(scheduler.timesteps[begin:]):
        # a latent of σ's space can be tens of thousands large and shrink to units in a step; what float32 rounded
        # away before that, in diffusers' loop as in ours, stays
        rounded = max(rounded, 2 * np.finfo(np.float32).eps * scale_of(theirs) if table.name == "euler" else 0.0)
        shown = scheduler.scale_model_input(theirs, t)
        np.testing.assert_allclose(
            table.scaled(i, x), shown.numpy(), rtol=0, atol=1e-5 * scale_of(shown) + rounded * table.input_scale[i]
        )
        output = torch.tanh(shown) + torch.from_numpy(rng.standard_normal(noise.shape, np.float32))
        x, previous = table.step(i, x, output.numpy(), previous)
        theirs = scheduler.step(output, t, theirs).prev_sample
        allowed = 1e-5 * scale_of(theirs) + rounded
        np.testing.assert_allclose(x, theirs.numpy(), rtol=0, atol=allowed)
    assert x.dtype == np.float32


def scale_of(x: torch.Tensor) -> float:
    return max(1.0, float(x.abs().max()))


@settings(max_examples=80, deadline=None)
@given(
    config=configs(set_alpha_to_one=st.booleans()), steps=st.integers(4, 50),
    begin=st.integers(0, 49), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_ddim_equals_diffusers(config: dict[str, Any], steps: int, begin: int, seed: int) -> None:
    check("ddim", DDIMScheduler(**config, clip_sample=False), config, steps, begin, seed)


@settings(max_examples=150, deadline=None)
@given(
    config=configs(
        solver_order=st.integers(1, 2), solver_type=st.sampled_from(["midpoint", "heun", "bh2"]),
        lower_order_final=st.booleans(), euler_at_final=st.booleans(),
        spacing=st.sampled_from([None, None, "use_karras_sigmas", "use_exponential_sigmas"]),
        final_sigmas_type=st.sampled_from(["zero", "sigma_min"]),
        lambda_min_clipped=st.sampled_from([-float("inf"), -5.1]),
    ),
    steps=st.integers(4, 50), begin=st.integers(0, 49), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_dpm_solver_equals_diffusers(config: dict[str, Any], steps: int, begin: int, seed: int) -> None:
    if (own := config.pop("spacing")) is not None:
        config[own] = True
        if config["solver_type"] == "heun":  # its last step has no length then, and diffusers divides by that
            config["final_sigmas_type"] = "zero"
    check("dpm++", DPMSolverMultistepScheduler(**config), config, steps, begin, seed)


@settings(max_examples=100, deadline=None)
@given(
    config=configs(
        interpolation_type=st.sampled_from(["linear", "log_linear"]),
        spacing=st.sampled_from([None, None, "use_karras_sigmas", "use_exponential_sigmas"]),
        final_sigmas_type=st.sampled_from(["zero", "sigma_min"]),
        sigma_max=st.sampled_from([None, 10.0]), sigma_min=st.sampled_from([None, 0.05]),
    ),
    steps=st.integers(4, 50), begin=st.integers(0, 49), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_euler_equals_diffusers(config: dict[str, Any], steps: int, begin: int, seed: int) -> None:
    if (own := config.pop("spacing")) is not None:
        config[own] = True
    check("euler", EulerDiscreteScheduler(**config), config, steps, begin, seed)


def check(name: str, scheduler: Any, config: dict[str, Any], steps: int, begin: int, seed: int) -> None:
    scheduler.set_timesteps(steps)
    table = make(name, config, steps)
    begin %= len(table)
    follow(table.start((len(table) - begin) / len(table) + 1e-9) if begin else table, scheduler, seed, begin)


@settings(max_examples=40, deadline=None)
@given(
    a=st.floats(-20, 20),
    b=st.floats(-20, 20),
    steps=st.sampled_from([2, 4, 5, 8, 10, 20, 25, 40, 50]),
    name=st.sampled_from(["ddim", "dpm++", "euler"]),
)
def test_a_true_prediction_leads_to_the_picture_from_any_start(a: float, b: float, steps: int, name: str) -> None:
    """With the noise that was really added as output, every schedule lands on the clean latent.

    DDIM does so where the steps divide the training timesteps: else diffusers' stride misses the next timestep.
    """
    config = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "timestep_spacing": "trailing",
    }
    for table in (make(name, config, steps), make(name, config, steps).start(0.6)):
        image, noise = np.array([a], np.float32), np.array([b], np.float32)
        x, previous = table.image_scale[0] * image + table.noise_scale[0] * noise, None
        for i in range(len(table)):
            x, previous = table.step(i, x, noise, previous)
        assert abs(float(x[0]) - a) <= 2e-4 * max(1.0, abs(a), abs(b))


def test_alphas_are_those_of_diffusers_bit_by_bit() -> None:
    for start, end in BETAS:
        for kind in ("linear", "scaled_linear", "squaredcos_cap_v2"):
            config = {"beta_start": start, "beta_end": end, "beta_schedule": kind}
            for zero in (False, True):
                theirs = DDIMScheduler(**config, rescale_betas_zero_snr=zero).alphas_cumprod.numpy()
                ours = alphas_cumprod(config | {"rescale_betas_zero_snr": zero})
                np.testing.assert_allclose(ours, theirs, rtol=1e-5 if zero else 0, atol=0)


def test_trained_betas_are_taken_and_counted() -> None:
    trained = np.linspace(0.001, 0.02, 100).tolist()
    config = {"num_train_timesteps": 100, "trained_betas": trained, "prediction_type": "epsilon"}
    check("ddim", DDIMScheduler(**config, clip_sample=False), config, 10, 0, 0)
    with pytest.raises(InputError, match="has 100 trained_betas and 1000 training timesteps"):
        ddim({"trained_betas": trained}, 10)


@pytest.mark.parametrize("steps", [61, 103, 999, 1000])
@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler"])
def test_trailing_has_as_many_steps_as_were_asked_for(name: str, steps: int) -> None:
    # 1000 / 61 leaves a rest of 1e-13 that diffusers makes a timestep of its own, -1
    table = make(name, {"timestep_spacing": "trailing"}, steps)
    assert len(table) == steps and table.timesteps.min() >= 0


def test_the_table_is_data_that_a_plain_loop_can_run() -> None:
    """What a captured graph holds: six numbers a step, two latents and one network output."""
    table = make("dpm++", {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}, 12)
    rows = table.table()
    assert rows.dtype == np.float32 and rows.shape == (12, len(COLUMNS))
    x = other = np.random.default_rng(0).standard_normal((2, 4, 3, 3), np.float32)
    previous, held = np.zeros_like(x), None
    for i, (into, a, b, c, p, q) in enumerate(rows):
        output = np.tanh(into * x)
        x, previous = a * x + b * output + c * previous, p * x + q * output
        other, held = table.step(i, other, np.tanh(table.scaled(i, other)), held)
    assert table.multistep and np.array_equal(x, other)
    assert not make("ddim", {}, 12).multistep and not make("euler", {}, 12).multistep


@pytest.mark.parametrize("steps", [0, -3, 1001])
@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler"])
def test_steps_out_of_range_are_refused_with_the_range(name: str, steps: int) -> None:
    with pytest.raises(InputError, match=f"steps is {steps}; it must be between 1 and 1000"):
        make(name, {"num_train_timesteps": 1000}, steps)


def test_timesteps_past_training_and_equal_noise_are_refused() -> None:
    with pytest.raises(InputError, match="first timestep would be 1000, past 999; take fewer steps"):
        make("ddim", {"timestep_spacing": "leading", "steps_offset": 1}, 1000)
    with pytest.raises(InputError, match="with leading timesteps takes at most 999"):
        make("dpm++", {"timestep_spacing": "leading"}, 1000)
    with pytest.raises(InputError, match="no signal at the last timestep"):
        make("ddim", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, 10)
    with pytest.raises(
        InputError, match="the euler schedule of 2 steps has a x_scale that is not finite at timestep 7"
    ):
        make_table("euler", np.array([9, 7]), x_scale=np.array([1.0, np.nan]))


@pytest.mark.parametrize(
    ("name", "key", "value", "known"),
    [
        ("ddim", "beta_schedule", "squaredcos", "linear, scaled_linear, squaredcos_cap_v2"),
        ("ddim", "prediction_type", "flow", "epsilon, v_prediction"),
        ("ddim", "timestep_spacing", "karras", "leading, trailing, linspace"),
        ("ddim", "thresholding", True, "not linear"),
        ("dpm++", "prediction_type", "sample", "epsilon, v_prediction"),
        ("dpm++", "timestep_spacing", "karras", "leading, trailing, linspace"),
        ("dpm++", "solver_order", 3, "known: 1, 2"),
        ("dpm++", "solver_type", "rk4", "midpoint, heun"),
        ("dpm++", "algorithm_type", "sde-dpmsolver++", "adds noise at every step; take --schedule"),
        ("dpm++", "algorithm_type", "dpmsolver", r"known: dpmsolver\+\+"),
        ("dpm++", "final_sigmas_type", "one", "zero, sigma_min"),
        ("dpm++", "use_flow_sigmas", True, "flow matching"),
        ("euler", "timestep_spacing", "karras", "leading, trailing, linspace"),
        ("euler", "interpolation_type", "cubic", "linear, log_linear"),
        ("euler", "timestep_type", "integer", "discrete, continuous"),
        ("euler", "final_sigmas_type", "one", "zero, sigma_min"),
        ("euler", "use_beta_sigmas", True, "not supported"),
    ],
)  # fmt: skip
def test_what_no_table_can_hold_is_refused_by_name(name: str, key: str, value: object, known: str) -> None:
    with pytest.raises(
        InputError, match=f"{key} is '?{value!s}.*{known}".replace("++'", r"\+\+'").replace("++.", r"\+\+.")
    ):
        make(name, {key: value}, 10)


def test_two_spacings_at_once_and_continuous_velocity_are_refused() -> None:
    with pytest.raises(InputError, match="both use_karras_sigmas and use_exponential_sigmas"):
        make("euler", {"use_karras_sigmas": True, "use_exponential_sigmas": True}, 10)
    with pytest.raises(InputError, match="timestep_type is 'continuous' with v_prediction"):
        make("euler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, 10)


def test_the_teachers_own_schedule_is_taken_where_it_is_one() -> None:
    for kind, name in CLASSES.items():
        assert resolve(None, {"_class_name": kind}) == resolve("teacher", {"_class_name": kind}) == name
        assert resolve(None, {"_class_name": kind}, distilled_steps=8) == "ddim"
    assert resolve(None, {"_class_name": "PNDMScheduler"}) == resolve(None, {}) == "ddim"
    with pytest.raises(InputError, match=r"scheduler is PNDMScheduler; name one of: ddim, dpm\+\+, euler"):
        resolve("teacher", {"_class_name": "PNDMScheduler"})
    with pytest.raises(InputError, match="is not recorded in this engine"):
        resolve("teacher", {})
    with pytest.raises(InputError, match=r"schedule is 'plms'; known: ddim, dpm\+\+, euler, teacher"):
        resolve("plms", {})


@pytest.mark.parametrize(("strength", "steps", "left"), [(1.0, 7, 7), (0.5, 7, 3), (0.8, 20, 16), (0.15, 7, 1)])
def test_start_keeps_the_last_steps(strength: float, steps: int, left: int) -> None:
    whole = make("dpm++", {}, steps)
    part = whole.start(strength)
    assert part.timesteps.tolist() == whole.timesteps[-left:].tolist()
    assert part.previous_scale[0] == 0 and np.array_equal(part.table()[1:], whole.table()[-left:][1:])


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        (0.0, "strength is 0"),
        (1.01, "above 0 and at most 1"),
        (float("nan"), "strength is nan"),
        (0.04, "strength 0.04 of 20 steps is less than one step; take at least 0.05"),
    ],
)
def test_a_strength_that_leaves_no_step_is_refused(strength: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make("ddim", {}, 20).start(strength)


def test_schedules_of_torch_tensors_stay_tensors() -> None:
    table: Schedule = make("dpm++", {}, 4)
    x, previous = table.step(0, torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))
    assert isinstance(x, torch.Tensor) and x.dtype == previous.dtype == torch.float32
