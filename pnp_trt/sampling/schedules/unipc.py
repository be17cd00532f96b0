"""UniPC of order 2 as a table (Zhao et al. 2023, arXiv:2302.04867, algorithms 5 to 8, on the data prediction)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from ...errors import InputError
from ..noise_levels import PREDICTIONS, Config, check_steps, choice, refuse
from ..table import Schedule, make_table
from .base import schedule
from .dpm_solver import levels
from .spacing import ALL_SPACINGS

#: diffusers' synonyms: it treats the solver types of DPM-Solver++ as bh2
SOLVER_TYPES = {"bh1": "bh1", "bh2": "bh2", "midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}
_NOT_LINEAR = {
    "thresholding": "which is not linear",
    "use_flow_sigmas": "which is for flow matching",
    "use_dynamic_shifting": "which is for flow matching",
    "use_beta_sigmas": "which is not supported",
    "solver_p": "which is not supported",
}


@schedule(
    "unipc", "UniPC of order 2, Zhao et al. 2023; order 1 if the config requires it", "UniPCMultistepScheduler",
    aliases=("UniPC", "uni_pc", "uni_pc_bh2"), spacings=ALL_SPACINGS,
)  # fmt: skip
def unipc(config: Config, steps: int) -> Schedule:
    """UniPC of order 1 or 2 for a teacher's scheduler config, equivalent to diffusers' ``UniPCMultistepScheduler``.

    A step first corrects the latent x by the data prediction m at x, and then predicts the next latent: with h of the
    previous step and D = (m₋₋ − m₋)/r₋,  s = x + α·B(h)·(½D − ρ₀·D − ρ₁·(m − m₋)),  and
    x′ = σ′/σ·s − α′·φ(h′)·m − α′·B(h′)·½·(m₋ − m)/r′.  Both are linear in x, m and the two previous predictions.

    Raises:
        InputError: if ``steps`` is outside 1 … num_train_timesteps, or an option is unknown, of third order or not
            linear.
    """
    check_steps(config, steps)
    refuse(config, _NOT_LINEAR)
    if config.get("predict_x0") is False:
        raise InputError("the scheduler config's predict_x0 is False; known: True")
    if (order := config.get("solver_order", 2)) not in (1, 2):
        raise InputError(f"the scheduler config's solver_order is {order}; known: 1, 2")
    choice(config, "solver_type", "bh2", tuple(SOLVER_TYPES))
    ends = tuple(config.get(key) for key in ("sigma_max", "sigma_min"))
    timesteps, sigmas = levels(config, steps, "UniPC", rounded=bool(config.get("use_karras_sigmas")), ends=ends)
    return _from(0, config, timesteps, sigmas.astype(float))


def _from(begin: int, config: Config, timesteps: np.ndarray, sigmas: np.ndarray) -> Schedule:
    """The rows from ``begin`` on; the first ones use no prediction before that."""
    timesteps, sigmas = timesteps[begin:], sigmas[begin:]
    bh1 = SOLVER_TYPES[str(config.get("solver_type") or "bh2")] == "bh1"
    uncorrected = {i - begin for i in config.get("disable_corrector") or ()}
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    sigma = sigmas * alpha
    before, after, n = slice(None, -1), slice(1, None), len(timesteps)
    order = _orders(config, n)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # make_table reports all but the end
        lam = np.log(alpha) - np.log(sigma)
        h = np.diff(lam)
        phi = np.expm1(-h)  # −1 at the end
        scale = -h if bh1 else phi
        ratio = -np.append(np.nan, h[:-1]) / h  # r of the step: (λ₋ − λ)/h
        x_factor = sigma[after] / sigma[before]
        # the predictor's coefficients of m and m₋ differ from first order by this
        slope = np.where(order == 2, alpha[after] * scale / (2 * ratio), 0)
    own, previous, older = -alpha[after] * phi + slope, -slope, np.zeros(n)
    for i in range(1, n):  # the corrector's terms: s enters x′ with the factor σ′/σ
        if i - 1 in uncorrected:
            continue
        b = -h[i - 1]
        first = (phi[i - 1] / b - 1) / scale[i - 1]
        older_part = 0.0  # (½ − ρ₀)/r
        data_part = 0.5  # ρ₁
        if order[i - 1] == 2:
            second = 2 * ((phi[i - 1] / b - 1) / b - 0.5) / scale[i - 1]
            weight = (first - second) / (1 - ratio[i - 1])
            older_part, data_part = (0.5 - weight) / ratio[i - 1], first - weight
        factor = x_factor[i] * alpha[i] * scale[i - 1]
        own[i] -= factor * data_part
        previous[i] += factor * (data_part - older_part)
        older[i] = factor * older_part
    if choice(config, "prediction_type", "epsilon", PREDICTIONS) == "epsilon":
        data_x, data_output = 1 / alpha[before], -sigmas[before]
    else:
        data_x, data_output = alpha[before], -sigma[before]
    table = make_table(
        unipc.name, timesteps, x_scale=x_factor + own * data_x, output_scale=own * data_output, previous_scale=previous,
        older_scale=older, data_x=data_x, data_output=data_output, image_scale=alpha[before], noise_scale=sigma[before],
    )  # fmt: skip
    return replace(table, part=partial(_from, config=config, timesteps=timesteps, sigmas=sigmas))


def _orders(config: Config, steps: int) -> np.ndarray:
    """The order of each step's predictor, and of the corrector after it, ``[steps]``."""
    order = np.full(steps, config.get("solver_order", 2))
    order[0] = 1
    if config.get("lower_order_final", True):
        order[-1] = 1
    return order
