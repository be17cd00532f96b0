"""A schedule with one evaluation per step: DDIM on quadratically spaced timesteps (Song et al. 2021, appendix D.2)."""

import numpy as np

from pnp_trt.sampling.noise_levels import Config, alphas_cumprod, check_steps, training_steps
from pnp_trt.sampling.schedules import Schedule, schedule
from pnp_trt.sampling.table import make_table


@schedule("quadratic", "DDIM on quadratically spaced timesteps, Song et al. 2021, appendix D.2")
def quadratic(config: Config, steps: int) -> Schedule:
    """x ← α′·x₀ + σ′·ε with x₀ = (x − σ·ε)/α, for networks that predict ε or v."""
    check_steps(config, steps)
    t = np.round(np.linspace(0, training_steps(config) - 1, steps + 1) ** 2 / (training_steps(config) - 1))[::-1]
    t = t.astype(np.int64)
    signal = alphas_cumprod(config)[t]
    alpha, sigma = np.sqrt(signal), np.sqrt(1 - signal)
    alpha[-1], sigma[-1] = 1, 0  # the last step goes to the clean latent
    now, after = slice(None, -1), slice(1, None)
    if config.get("prediction_type", "epsilon") == "v_prediction":  # ε = σ·x + α·v
        noise_x, noise_output = sigma[now], alpha[now]
    else:
        noise_x, noise_output = 0 * sigma[now], np.ones(steps)
    ratio = alpha[after] / alpha[now]
    change = sigma[after] - ratio * sigma[now]
    return make_table(
        "quadratic", t[now], x_scale=ratio + change * noise_x, output_scale=change * noise_output,
        image_scale=alpha[now], noise_scale=sigma[now],
    )  # fmt: skip
