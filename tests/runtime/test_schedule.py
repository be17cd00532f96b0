"""The coefficient tables are diffusers' schedulers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from pnp_trt.errors import InputError
from pnp_trt.runtime.schedule import ddim


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(4, 50),
    spacing=st.sampled_from(["leading", "trailing"]),
    prediction=st.sampled_from(["epsilon", "v_prediction"]),
    beta=st.sampled_from(["linear", "scaled_linear"]),
    last_is_one=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_ddim_equals_diffusers(
    steps: int, spacing: str, prediction: str, beta: str, last_is_one: bool, seed: int
) -> None:
    config = dict(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule=beta, clip_sample=False,
        set_alpha_to_one=last_is_one, steps_offset=1, prediction_type=prediction, timestep_spacing=spacing,
    )  # fmt: skip
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(steps)
    table = ddim(config, steps)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, 4, 4, 4), np.float32)
    theirs = torch.from_numpy(x)
    for i, t in enumerate(scheduler.timesteps):
        # an output that depends on the latent, as a network's does, and keeps the latent bounded
        x = table.x_scale[i] * x + table.output_scale[i] * np.tanh(x)
        theirs = scheduler.step(torch.tanh(theirs), t, theirs).prev_sample
    assert np.abs(x - theirs.numpy()).max() <= 1e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_steps_out_of_range_are_refused_with_the_range(steps: int) -> None:
    with pytest.raises(InputError, match="between 1 and 1000"):
        ddim({"num_train_timesteps": 1000}, steps)


@pytest.mark.parametrize(
    ("key", "value"), [("beta_schedule", "squaredcos"), ("prediction_type", "flow"), ("timestep_spacing", "karras")]
)
def test_unknown_kinds_are_refused_by_name(key: str, value: str) -> None:
    with pytest.raises(InputError, match=value):
        ddim({key: value}, 10)
