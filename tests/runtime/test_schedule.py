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
