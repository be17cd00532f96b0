"""A schedule with history: the Adams–Bashforth method of order 2 on ε (Liu et al. 2022, PNDM, is its order 4).

In y = x/α and r = σ/α, the probability-flow ODE is dy/dr = ε.  With the step h = r′ − r and the previous step h₋, the
method is y′ = y + h·((1 + h/2h₋)·ε − h/2h₋·ε₋). The first step has no previous one and is Euler's, which is DDIM.
"""

import numpy as np

from pnp_trt.sampling.noise_levels import Config, alphas_cumprod, check_steps, training_steps
from pnp_trt.sampling.schedules import Schedule, schedule
from pnp_trt.sampling.table import make_table


@schedule("ab2", "Adams–Bashforth of order 2 on ε")
def ab2(config: Config, steps: int) -> Schedule:
    """Return the table; each step passes its ε on to the next."""
    check_steps(config, steps)
    t = np.round(np.linspace(0, training_steps(config) - 1, steps + 1)).astype(np.int64)[::-1]
    signal = alphas_cumprod(config)[t]
    alpha, sigma = np.sqrt(signal), np.sqrt(1 - signal)
    now, after = slice(None, -1), slice(1, None)
    h = np.diff(sigma / alpha)
    history = np.append(0, h[1:] / (2 * h[:-1]))
    if config.get("prediction_type", "epsilon") == "v_prediction":  # ε = σ·x + α·v
        noise_x, noise_output = sigma[now], alpha[now]
    else:
        noise_x, noise_output = 0 * h, np.ones(steps)
    weight = alpha[after] * h * (1 + history)
    return make_table(
        "ab2", t[now], x_scale=alpha[after] / alpha[now] + weight * noise_x, output_scale=weight * noise_output,
        previous_scale=-alpha[after] * h * history, data_x=noise_x, data_output=noise_output,
        image_scale=alpha[now], noise_scale=sigma[now],
    )  # fmt: skip
