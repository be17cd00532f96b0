"""Coefficient tables compared with diffusers' schedulers, which run in float64 to exclude a processor's rounding."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from pnp_trt.errors import InputError
from pnp_trt.sampling.noise_levels import Config
from pnp_trt.sampling.schedules import (
    COLUMNS,
    SCHEDULES,
    SPACINGS,
    Schedule,
    a1111_names,
    alphas_cumprod,
    chosen,
    ddim,
    evaluations,
    from_a1111,
    make,
    resolve,
    schedule,
)
from pnp_trt.sampling.table import make_table

#: first and last β of Stable Diffusion, of the bundled model, and of diffusers' default
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
    """Scheduler configs. Zero terminal SNR is not combined with epsilon: noise alone determines no image."""

    def complete(drawn: dict[str, Any]) -> dict[str, Any]:
        start, end = drawn.pop("beta")
        if drawn["prediction_type"] == "epsilon":
            drawn["rescale_betas_zero_snr"] = False
        return {"num_train_timesteps": 1000, "beta_start": start, "beta_end": end} | drawn

    return st.fixed_dictionaries(COMMON | own).map(complete)


#: unit roundoff of float32
U = 2.0**-24


def with_noise_levels(scheduler: Any, config: dict[str, Any]) -> Any:
    """Replace the scheduler's ᾱ by this package's and return it.

    diffusers accumulates ᾱ in float32. The rounding depends on the processor's vector width and is amplified a
    thousandfold near zero terminal SNR. Another test below compares ᾱ with a float64 formula. Here both loops start
    from the same ᾱ, so that only the algorithms are compared.
    """
    abar = torch.from_numpy(alphas_cumprod(config)).float()
    scheduler.alphas_cumprod = abar
    if isinstance(scheduler, DDIMScheduler):
        scheduler.final_alpha_cumprod = torch.tensor(1.0) if scheduler.config.set_alpha_to_one else abar[0]
        return scheduler
    if config.get("rescale_betas_zero_snr"):
        abar[-1] = 2.0**-24
    scheduler.alpha_t, scheduler.sigma_t = abar.sqrt(), (1 - abar).sqrt()
    scheduler.lambda_t = scheduler.alpha_t.double().log() - scheduler.sigma_t.double().log()
    return scheduler


def in_float64(scheduler: Any) -> Any:
    """Make a scheduler compute its coefficients in float64; call it after ``set_timesteps``."""
    for name in ("alphas_cumprod", "final_alpha_cumprod", "sigmas"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def level_error(table: Schedule, sigmas: np.ndarray) -> float:
    """Bound of the relative error of a noise level; diffusers computes Euler's in float32 from their logarithms."""
    if table.name not in ("euler", "heun"):
        return 4 * U
    return 4 * U * (1 + float(np.abs(np.log(sigmas[sigmas > 0])).max()))


def coefficient_errors(table: Schedule, sigmas: np.ndarray) -> np.ndarray:
    """Return bounds ``[steps]`` of the error of each step's coefficients due to float32's rounding of noise levels.

    They are relative to the step's data predictions, or for Euler to the step's length |σ' − σ|·|dx/dσ|.

    The coefficients of DDIM and UniPC are computed in float64 and rounded once. So are Euler's, but its levels have a
    relative error of ε each, which changes σ' − σ by ε(σ + σ') and the derivative by 2ε. DPM-Solver++ subtracts λ in
    float32, as diffusers does. Each λ has an error of a few roundoffs of its size, so h = λ' − λ and 1 − e^−h have an
    error of δ, and the slope, which is divided by the previous step, has δ·(1 + h)/h_before.
    """
    if table.name in ("ddim", "unipc"):
        return np.full(len(table), 4 * U)
    if table.name == "heun":  # each inner level occurs twice, and the second row of a step restarts at its beginning
        whole = np.concatenate([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]])
        errors = coefficient_errors(dataclasses.replace(table, name="euler"), whole)
        return np.repeat(errors, 2)[: len(table)]
    if table.name == "euler":
        length = sigmas[:-1] - sigmas[1:]
        ends = (sigmas[:-1] + sigmas[1:]) / np.where(length > 0, length, np.inf)
        return np.asarray(level_error(table, sigmas) * (ends + 2))
    with np.errstate(divide="ignore"):
        level = -np.log(sigmas)
    size = np.where(np.isfinite(level), np.abs(level), 0)
    delta = U * (2 + 3 * np.maximum(size[:-1], size[1:]))
    h = np.minimum(np.diff(level), 50.0)
    before = np.concatenate([[np.inf], h[:-1]])
    multistep = table.previous_scale != 0
    return np.asarray(delta * (1 + np.where(multistep, (1 + h) / np.where(before > 0, before, np.inf), 0)))


def data_of(scheduler: Any, x: torch.Tensor, output: torch.Tensor, sigma: torch.Tensor) -> np.ndarray:
    """Return the clean latent that a network predicts in σ's parametrisation."""
    if scheduler.config.prediction_type == "epsilon":
        return (x - sigma * output.double()).numpy()
    return (x / (sigma**2 + 1) - sigma / (sigma**2 + 1) ** 0.5 * output.double()).numpy()


def go_on_from(scheduler: Any, x: np.ndarray, predictions: tuple[Any, ...]) -> None:
    """Set the state of diffusers' UniPC (predictions and corrected latent) to one that leads to our latent."""
    for place, data in enumerate(predictions[: len(scheduler.model_outputs)], 1):
        if data is not None:
            scheduler.model_outputs[-place] = torch.from_numpy(data).double()
    if (after := scheduler.sigmas[scheduler.step_index]) == 0:
        return  # last step
    sigma = scheduler.sigmas[scheduler.step_index - 1]
    scheduler._step_index -= 1
    update = scheduler.multistep_uni_p_bh_update(
        model_output=None, sample=scheduler.last_sample, order=scheduler.this_order
    )  # fmt: skip
    scheduler._step_index += 1
    ratio = after / sigma * ((1 + sigma**2) / (1 + after**2)) ** 0.5
    scheduler.last_sample = scheduler.last_sample + (torch.from_numpy(x).double() - update) / ratio


def follow(table: Schedule, scheduler: Any, seed: int, begin: int = 0) -> None:
    """Run every step with both, diffusers' in float64, from the same latent and the same previous data prediction.

    Both continue from our result of each step, so roundoff does not accumulate: a step's tolerance is its own
    roundoff, and equal steps imply equal runs.
    """
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((1, 4, 4, 4), np.float32)
    assert table.timesteps.tolist() == [round(t) for t in scheduler.timesteps[begin:].tolist()]
    in_float64(scheduler)
    if hasattr(scheduler, "set_begin_index"):  # else it finds its index by timestep, and two may be equal
        scheduler.set_begin_index(begin)
    sigmas = scheduler.sigmas[begin:].numpy() if table.name != "ddim" else np.ones(len(table) + 1)
    coefficient, level = coefficient_errors(table, sigmas), 4 * U + level_error(table, sigmas)
    wide = torch.from_numpy(noise).double()
    if begin:
        image = rng.standard_normal(noise.shape, np.float32)
        x = table.image_scale[0] * image + table.noise_scale[0] * noise
        theirs = scheduler.add_noise(torch.from_numpy(image).double(), wide, scheduler.timesteps[begin : begin + 1])
        size = np.abs(table.image_scale[0] * image) + np.abs(table.noise_scale[0] * noise)
    else:
        x = np.float32(table.init_scale) * noise
        theirs = wide * scheduler.init_noise_sigma
        size = np.abs(x)
    assert (np.abs(x - theirs.numpy()) <= level * size).all()
    previous, data_before, data_older = None, np.zeros(noise.shape), np.zeros(noise.shape)
    for i, t in enumerate(scheduler.timesteps[begin:]):
        row = dict(zip(COLUMNS, table.table()[i].astype(np.float64), strict=True))
        same = torch.from_numpy(x).double()
        shown = scheduler.scale_model_input(same, t)
        assert (np.abs(table.scaled(i, x) - shown.numpy()) <= level * np.abs(shown.numpy())).all()
        output = (torch.tanh(shown) + torch.from_numpy(rng.standard_normal(noise.shape, np.float32))).float()
        size, out = np.abs(x), np.abs(output.numpy())
        data = abs(row["data_x"]) * size + abs(row["data_output"]) * out
        added = abs(row["x_scale"]) * size + abs(row["output_scale"]) * out + abs(row["previous_scale"]) * data_before
        moved = data + data_before
        if table.name in ("euler", "heun"):
            moved = abs(row["x_scale"] - 1) * size + abs(row["output_scale"]) * out
            moved = moved + abs(row["previous_scale"]) * data_before
        added = added + abs(row["older_scale"]) * data_older
        x, previous = table.step(i, x, output.numpy(), previous)
        theirs = scheduler.step(output.double(), t, same).prev_sample
        # diffusers also rounds the latent to float32 once per step
        allowed = 4 * U * (added + np.abs(theirs.numpy())) + coefficient[i] * moved
        assert (np.abs(x - theirs.numpy()) <= allowed).all(), f"step {i}"
        if table.name == "heun":
            sigma, after = scheduler.sigmas[begin + i], scheduler.sigmas[begin + i + 1]
            if previous is None:  # a single step, which is Euler's
                return
            assert (np.abs(previous - data_of(scheduler, same, output, sigma)) <= 7 * U * data).all(), f"step {i}"
            if not i % 2 and after > 0:  # set diffusers' stored derivative and latent from our x̂ and D
                there, clean = torch.from_numpy(x).double(), torch.from_numpy(previous).double()
                scheduler.prev_derivative = (there - clean) / after
                scheduler.sample = there - (after - sigma) * scheduler.prev_derivative
        elif table.name == "unipc" and previous is not None:
            predictions = previous if isinstance(previous, tuple) else (previous,)
            assert (np.abs(predictions[0] - scheduler.model_outputs[-1].numpy()) <= 7 * U * data).all(), f"step {i}"
            go_on_from(scheduler, x, predictions)
        elif previous is not None:  # α(σ) has 4 roundoffs; σ_t = σα, the product and the sum add one each
            assert (np.abs(previous - scheduler.model_outputs[-1].numpy()) <= 7 * U * data).all(), f"step {i}"
            scheduler.model_outputs[-1] = torch.from_numpy(previous).double()
        data_before, data_older = data, data_before
    assert x.dtype == np.float32


@settings(max_examples=80)
@given(
    config=configs(set_alpha_to_one=st.booleans()), steps=st.integers(4, 50),
    begin=st.integers(0, 49), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_ddim_equals_diffusers(config: dict[str, Any], steps: int, begin: int, seed: int) -> None:
    check("ddim", DDIMScheduler(**config, clip_sample=False), config, steps, begin, seed)


@settings(max_examples=150)
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
        if config["solver_type"] == "heun":  # the last step would have length 0, and diffusers divides by it
            config["final_sigmas_type"] = "zero"
    check("dpm++", DPMSolverMultistepScheduler(**config), config, steps, begin, seed)


@settings(max_examples=100)
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


@settings(max_examples=50)
@given(
    config=configs(spacing=st.sampled_from([None, None, "use_karras_sigmas", "use_exponential_sigmas"])),
    steps=st.integers(4, 50), begin=st.integers(0, 49), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_heun_equals_diffusers(config: dict[str, Any], steps: int, begin: int, seed: int) -> None:
    if (own := config.pop("spacing")) is not None:
        config[own] = True
    theirs = {k: v for k, v in config.items() if k != "rescale_betas_zero_snr"}  # an option that its class lacks
    check("heun", HeunDiscreteScheduler(**theirs), config, steps, begin, seed)


@settings(max_examples=80)
@given(
    config=configs(
        solver_order=st.integers(1, 2), solver_type=st.sampled_from(["bh1", "bh2", "midpoint"]),
        lower_order_final=st.booleans(), final_sigmas_type=st.sampled_from(["zero", "sigma_min"]),
        disable_corrector=st.sampled_from([[], [0], [0, 2]]),
        spacing=st.sampled_from([None, None, "use_karras_sigmas", "use_exponential_sigmas"]),
    ),
    steps=st.integers(4, 50), begin=st.integers(0, 49), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_unipc_equals_diffusers(config: dict[str, Any], steps: int, begin: int, seed: int) -> None:
    if (own := config.pop("spacing")) is not None:
        config[own] = True
    if config["solver_type"] == "bh1" or not config["lower_order_final"]:
        config["final_sigmas_type"] = "sigma_min"  # a last step to zero noise is not finite in diffusers
    check("unipc", UniPCMultistepScheduler(**config), config, steps, begin, seed)


def check(name: str, scheduler: Any, config: dict[str, Any], steps: int, begin: int, seed: int) -> None:
    with_noise_levels(scheduler, config).set_timesteps(steps)
    table = make(name, config, steps)
    assert len(table) == evaluations(name, config, steps) and table.steps == steps
    begin %= steps
    part = table.start((steps - begin) / steps + 1e-9) if begin else table
    follow(part, scheduler, seed, begin * table.rows_per_step)


MUTANTS: dict[str, dict[str, Any]] = {
    "ddim": {},
    "dpm++": {"solver_type": "midpoint", "final_sigmas_type": "zero"},
    "dpm++ heun": {"solver_type": "heun", "final_sigmas_type": "zero"},
    "dpm++ karras": {"solver_type": "midpoint", "final_sigmas_type": "zero", "use_karras_sigmas": True},
    "euler": {},
    "heun": {},
    "unipc": {},
    "unipc karras": {"use_karras_sigmas": True},
}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", MUTANTS)
def test_an_error_of_a_thousandth_in_any_coefficient_is_detected(kind: str, prediction: str) -> None:
    """The tolerances above hide no such error in any coefficient of any step, with Stable Diffusion's noise."""
    name = kind.split()[0]
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": prediction}
    config |= MUTANTS[kind]
    table, theirs = make(name, config, 6), getattr(diffusers, str(SCHEDULES.get(name).diffusers_class))
    used = COLUMNS if table.multistep else COLUMNS[:3]

    def run(altered: Schedule) -> None:
        own = {"clip_sample": False} if name == "ddim" else {}
        scheduler = theirs(**config, **own)
        with_noise_levels(scheduler, config).set_timesteps(6)
        follow(altered, scheduler, 0)

    run(table)
    for column in used:
        values = getattr(table, column)
        for i in np.flatnonzero(values):
            altered = values.copy()
            altered[i] *= 1.001
            with pytest.raises(AssertionError):
                run(dataclasses.replace(table, **{column: altered}))


@settings(max_examples=40)
@given(
    a=st.floats(-20, 20),
    b=st.floats(-20, 20),
    steps=st.sampled_from([2, 4, 5, 8, 10, 20, 25, 40, 50]),
    name=st.sampled_from(["ddim", "dpm++", "euler", "heun", "unipc"]),
)
def test_predicting_the_true_noise_leads_to_the_clean_latent(a: float, b: float, steps: int, name: str) -> None:
    """If the network returns the noise that was added, every schedule ends at the clean latent.

    DDIM does so if the steps divide the training timesteps; otherwise diffusers' stride misses the next timestep.
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


def exact_betas(start: float, end: float, kind: str) -> torch.Tensor:
    """The published formulas in float64."""
    if kind == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17
        curve = torch.cos((torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
    return torch.linspace(start, end, 1000, dtype=torch.float64)


def rounding_of_alphas(betas: np.ndarray, zero_snr: bool) -> np.ndarray:
    """Bound of the relative error of ᾱ in float32, ``[1000]``, from each operation's roundoff.

    The error of β is at most 4 roundoffs of the largest β, that of 1 − β one roundoff of its own size, and relative
    errors of factors add up. Zero terminal SNR subtracts √ᾱ_T from every √ᾱ_t, which magnifies the error by
    √ᾱ/(√ᾱ_t − √ᾱ_T).
    """
    alphas = 1 - betas
    relative = np.cumsum((4 * U * betas.max() + U) / alphas) + U
    if not zero_snr:
        return relative
    root = np.sqrt(np.cumprod(alphas))
    with np.errstate(divide="ignore"):
        shifted = (relative * root + relative[-1] * root[-1]) / (root - root[-1]) + 4 * U
        factors = np.square((root[1:] - root[-1]) / (root[:-1] - root[-1]))
        # ᾱ is then a product of factors 1 − β, each with an error of one roundoff of 1
        return 2 * shifted + np.concatenate([[U], np.cumsum(2 * U / np.maximum(factors, 1e-300))]) + U


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(("start", "end"), BETAS)
def test_alphas_equal_the_formulas_up_to_float32_rounding(start: float, end: float, kind: str, zero_snr: bool) -> None:
    betas = exact_betas(start, end, kind)
    exact = rescale_zero_terminal_snr(betas) if zero_snr else betas
    expected = torch.cumprod(1 - exact, 0).numpy()
    config = {"beta_start": start, "beta_end": end, "beta_schedule": kind, "rescale_betas_zero_snr": zero_snr}
    ours, bound = alphas_cumprod(config), rounding_of_alphas(betas.numpy(), zero_snr)
    theirs = DDIMScheduler(**config).alphas_cumprod.numpy()
    last = 999 if zero_snr else 1000  # the last ᾱ is 0 and has no relative error
    for values in (ours, theirs):
        assert (np.abs(values[:last] / expected[:last] - 1) <= bound[:last]).all()
    assert not zero_snr or abs(ours[-1]) <= U
    assert np.median(bound) < 1e-3  # a wrong formula is off by far more


@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler", "heun", "unipc"])
def test_nulls_mean_defaults(name: str) -> None:
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing",
            "solver_order", "lambda_min_clipped", "trained_betas", "final_sigmas_type")  # fmt: skip
    nulls = dict.fromkeys(keys)
    assert np.array_equal(make(name, nulls, 7).table(), make(name, {}, 7).table())
    assert np.array_equal(alphas_cumprod(nulls), alphas_cumprod({}))


def test_trained_betas_are_used_and_their_number_is_checked() -> None:
    trained = np.linspace(0.001, 0.02, 100).tolist()
    config = {"num_train_timesteps": 100, "trained_betas": trained, "prediction_type": "epsilon"}
    check("ddim", DDIMScheduler(**config, clip_sample=False), config, 10, 0, 0)
    with pytest.raises(InputError, match="has 100 trained_betas and 1000 training timesteps"):
        ddim({"trained_betas": trained}, 10)


@pytest.mark.parametrize("steps", [61, 103, 999, 1000])
@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler", "heun", "unipc"])
def test_trailing_has_the_requested_number_of_steps(name: str, steps: int) -> None:
    # 1000 / 61 leaves a remainder of 1e-13, for which diffusers adds a timestep of -1
    table = make(name, {"timestep_spacing": "trailing"}, steps)
    assert table.steps == steps and table.timesteps.min() >= 0


def test_a_plain_loop_can_run_the_table() -> None:
    """A captured graph runs this loop: seven numbers per step, two latents and one network output."""
    table = make("dpm++", {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}, 12)
    rows = table.table()
    assert rows.dtype == np.float32 and rows.shape == (12, len(COLUMNS))
    x = other = np.random.default_rng(0).standard_normal((2, 4, 3, 3), np.float32)
    previous, other_previous = np.zeros_like(x), None
    for i, (into, a, b, c, p, q, _) in enumerate(rows):
        output = np.tanh(into * x)
        x, previous = a * x + b * output + c * previous, p * x + q * output
        other, other_previous = table.step(i, other, np.tanh(table.scaled(i, other)), other_previous)
    assert table.multistep and np.array_equal(x, other)
    assert not make("ddim", {}, 12).multistep and not make("euler", {}, 12).multistep


@pytest.mark.parametrize("steps", [0, -3, 1001])
@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler", "heun", "unipc"])
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
        ("unipc", "solver_order", 3, "known: 1, 2"),
        ("unipc", "solver_type", "rk4", "bh1, bh2"),
        ("unipc", "predict_x0", False, "known: True"),
        ("unipc", "use_flow_sigmas", True, "flow matching"),
        ("euler", "timestep_spacing", "karras", "leading, trailing, linspace"),
        ("euler", "interpolation_type", "cubic", "linear, log_linear"),
        ("euler", "timestep_type", "integer", "discrete, continuous"),
        ("euler", "final_sigmas_type", "one", "zero, sigma_min"),
        ("euler", "use_beta_sigmas", True, "not supported"),
    ],
)  # fmt: skip
def test_unsupported_options_are_refused_by_name(name: str, key: str, value: object, known: str) -> None:
    with pytest.raises(
        InputError, match=f"{key} is '?{value!s}.*{known}".replace("++'", r"\+\+'").replace("++.", r"\+\+.")
    ):
        make(name, {key: value}, 10)


def test_two_spacings_at_once_and_continuous_velocity_are_refused() -> None:
    with pytest.raises(InputError, match="both use_karras_sigmas and use_exponential_sigmas"):
        make("euler", {"use_karras_sigmas": True, "use_exponential_sigmas": True}, 10)
    with pytest.raises(InputError, match="timestep_type is 'continuous' with v_prediction"):
        make("euler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, 10)


def test_the_teachers_schedule_is_the_default_if_it_is_supported() -> None:
    for name, rule in SCHEDULES.items():
        kind = rule.diffusers_class
        assert resolve(None, {"_class_name": kind}) == resolve("teacher", {"_class_name": kind}) == name
        assert resolve(None, {"_class_name": kind}, distilled_steps=8) == "ddim"
    assert resolve(None, {"_class_name": "PNDMScheduler"}) == resolve(None, {}) == "ddim"
    with pytest.raises(InputError, match=r"scheduler is PNDMScheduler; name one of: ddim, dpm\+\+, euler, heun, unipc"):
        resolve("teacher", {"_class_name": "PNDMScheduler"})
    with pytest.raises(InputError, match="is not recorded in this engine"):
        resolve("teacher", {})
    with pytest.raises(InputError, match=r"schedule is 'plms'; known: ddim, dpm\+\+, euler, heun, unipc, teacher"):
        resolve("plms", {})


#: names of samplers in AUTOMATIC1111, ComfyUI, k-diffusion and diffusers -> ours, from diffusers' list
KNOWN = {
    "DDIM": "ddim", "DDIMScheduler": "ddim", "Euler": "euler", "k_euler": "euler", "EulerDiscreteScheduler": "euler",
    "DPM++ 2M": "dpm++", "dpmpp_2m": "dpm++", "k_dpmpp_2m": "dpm++", "DPMSolverMultistepScheduler": "dpm++",
    "DPM++ 2M Karras": "dpm++:karras", "k_dpmpp_2m_ka": "dpm++:karras", "Euler Karras": "euler:karras",
    "UniPC": "unipc", "uni_pc": "unipc", "UniPCMultistepScheduler": "unipc", "uni_pc_bh2 karras": "unipc:karras",
    "Heun": "heun", "heun": "heun", "HeunDiscreteScheduler": "heun", "Heun Exponential": "heun:exponential",
    "DPM++ 2M SGM Uniform": "dpm++:trailing", "dpmpp_2m sgm_uniform": "dpm++:trailing", "DDIM simple": "ddim:trailing",
    "dpm++:karras": "dpm++:karras", "euler:linspace": "euler:linspace", "teacher:karras": "euler:karras",
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_sampler_names_of_other_programs_are_known(name: str) -> None:
    config = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    ours = resolve(name, config)
    assert ours == KNOWN[name] and resolve(ours, config) == ours and make(name, config, 5).name == ours
    assert from_a1111(*a1111_names(ours)) in (ours, ours.removesuffix(":linspace"))


def test_samplers_and_schedule_types_of_a1111_are_known() -> None:
    assert from_a1111("DPM++ 2M", "Karras") == from_a1111("DPM++ 2M Karras", "karras") == "dpm++:karras"
    assert from_a1111("DPM++ 2M", "SGM Uniform") == from_a1111("DPM++ 2M Karras", "sgm_uniform") == "dpm++:trailing"
    assert from_a1111("Euler", "Automatic") == from_a1111("Euler", "") == from_a1111("Euler") == "euler"
    assert from_a1111("DPM++ 2M Karras", "Automatic") == "dpm++:karras"
    assert a1111_names("dpm++:trailing") == ("DPM++ 2M", "SGM Uniform")
    for kind in ("Align Your Steps", "Beta Karras", "\ud800"):
        with pytest.raises(
            InputError, match="the spacing of schedule euler is '.*'; known: karras, exponential, trail"
        ):
            from_a1111("Euler", kind)


def test_the_documentation_lists_every_schedule_and_spacing() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text(encoding="utf-8")
    for name, rule in SCHEDULES.items():
        other = (rule.aliases[1:2] or (name,))[0].removeprefix("k_")
        assert f"| `{name}` | {rule.aliases[0]} | `{other}` | `{rule.diffusers_class}` |" in page
    for name, spacing in SPACINGS.items():
        (option,) = spacing.options
        row = f"| `{name}` | {spacing.description} | `{option}` | {', '.join(spacing.aliases)} |"
        assert row.replace("  ", " ") in page


@pytest.mark.parametrize(
    "name",
    ["Euler a", "k_euler_a", "EulerAncestralDiscreteScheduler", "DPM++ SDE", "DPM++ SDE Karras", "dpmpp_2m_sde",
     "DPM++ 3M SDE Exponential", "DPM2 a", "LCM", "LCMScheduler", "Restart"],
)  # fmt: skip
def test_samplers_that_add_noise_are_refused_by_name(name: str) -> None:
    with pytest.raises(
        InputError, match=rf"^the sampler '{re.escape(name)}' adds noise at every step, .* take one of: "
    ):
        resolve(name, {})


def test_a_spacing_replaces_that_of_the_teacher() -> None:
    config = {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "use_exponential_sigmas": True}
    for name, rule in SCHEDULES.items():
        for spacing in rule.spacings:
            table, plain = make(f"{name}:{spacing}", config, 7), {"beta_schedule": "scaled_linear"}
            alone = make(name, {**plain, "timestep_spacing": "leading", **SPACINGS[spacing].options}, 7)
            assert table.name == f"{name}:{spacing}" and np.array_equal(table.table(), alone.table())
            assert np.array_equal(table.timesteps, alone.timesteps) and table.init_scale == alone.init_scale
            options = chosen(f"{name}:{spacing}", config)[1]
            scheduler = getattr(diffusers, str(rule.diffusers_class)).from_config(options)
            with_noise_levels(scheduler, dict(options)).set_timesteps(7)
            assert [round(float(t)) for t in scheduler.timesteps] == table.timesteps.tolist()
    with pytest.raises(
        InputError, match=r"spacing of schedule ddim is 'karras'; known: trailing, .*dpm\+\+:karras, euler:"
    ):
        make("ddim:karras", {}, 7)
    with pytest.raises(
        InputError, match="spacing of schedule euler is 'wide'; known: karras, exponential, trailing, l"
    ):
        make("euler:wide", {}, 7)


def test_heun_counts_its_evaluations() -> None:
    table = make("heun", {}, 7)
    assert len(table) == evaluations("Heun", {}, 7) == 13 and table.steps == 7
    assert len(table.start(0.5)) == 5 and table.start(0.5).steps == 3  # two evaluations per step, one in the last
    assert evaluations("dpm++:karras", {}, 7) == 7
    with pytest.raises(InputError, match="strength 0.1 of 7 steps is less than one step"):
        table.start(0.1)


def test_a_registered_schedule_is_known_by_name_class_and_message() -> None:
    @schedule("half", "half of the latent at every step", "HalvingScheduler")
    def half(config: Config, steps: int) -> Schedule:
        columns = {"output_scale": np.zeros(steps), "image_scale": np.ones(steps), "noise_scale": np.ones(steps)}
        return make_table("another name", np.arange(steps)[::-1], x_scale=np.full(steps, 0.5), **columns)

    try:
        own = {"_class_name": "HalvingScheduler"}
        assert resolve(None, own) == resolve("teacher", own) == "half" and resolve(None, own, 8) == "ddim"
        table = make("half", {}, 3)
        assert table.name == "half"  # not the function's name: images record the registered one
        assert table.step(0, 8.0, 1.0)[0] == 4.0
        with pytest.raises(InputError, match=r"known: ddim, dpm\+\+, euler, heun, unipc, half, teacher"):
            resolve("plms", {})
        with pytest.raises(InputError, match="the schedule 'half' is already registered"):
            schedule("half", "")(lambda config, steps: table)
    finally:
        SCHEDULES.unregister("half")
    with pytest.raises(InputError, match="the class of the teacher's scheduler is HalvingScheduler"):
        resolve("teacher", own)


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


def test_steps_on_torch_tensors_return_torch_tensors() -> None:
    table: Schedule = make("dpm++", {}, 4)
    x, previous = table.step(0, torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))
    assert isinstance(x, torch.Tensor) and x.dtype == previous.dtype == torch.float32
