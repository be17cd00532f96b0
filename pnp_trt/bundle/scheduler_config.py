"""Check types and bounds of a diffusers scheduler config, in a bundle's manifest or a model's folder."""

from __future__ import annotations

from typing import Any

from .document import Value

MAX_TRAINING_STEPS = 100_000
#: bounds of the numeric entries of a scheduler's config; null means the scheduler's default
_NUMBERS = {
    "beta_start": (0, 1), "beta_end": (0, 1), "sigma_min": (0, 1e6), "sigma_max": (0, 1e6), "rho": (0, 1e3),
    "clip_sample_range": (0, 1e6), "dynamic_thresholding_ratio": (0, 1), "sample_max_value": (0, 1e6),
    "lambda_min_clipped": (-1e9, 1e9), "flow_shift": (0, 1e6), "shift": (0, 1e6),
}  # fmt: skip
_WORDS = (
    "_class_name", "beta_schedule", "prediction_type", "timestep_spacing", "final_sigmas_type", "algorithm_type",
    "solver_type", "interpolation_type", "timestep_type", "variance_type",
)  # fmt: skip
_FLAGS = (
    "clip_sample", "set_alpha_to_one", "thresholding", "rescale_betas_zero_snr", "use_karras_sigmas",
    "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", "use_lu_lambdas", "lower_order_final",
    "euler_at_final", "use_dynamic_shifting", "invert_sigmas", "skip_prk_steps", "stochastic_sampling",
)  # fmt: skip


def scheduler_entries(value: Value) -> dict[str, Any]:
    """Check a scheduler's config and return it; null means the default.  Unknown entries are kept but never read.

    Raises:
        InputError: naming the first entry with a wrong type or out of bounds.
    """
    for key, entry in value.entries(200).items():
        if entry.raw is None:
            continue
        if key == "num_train_timesteps":
            entry.integer(1, MAX_TRAINING_STEPS)
        elif key == "steps_offset":
            entry.integer(0, MAX_TRAINING_STEPS)
        elif key == "solver_order":
            entry.integer(1, 3)
        elif key == "trained_betas":
            for beta in entry.items(1, MAX_TRAINING_STEPS):
                beta.number(0, 1)
        elif key in _NUMBERS:
            entry.number(*_NUMBERS[key])
        elif key in _WORDS:
            entry.text(longest=100)
        elif key in _FLAGS:
            entry.flag()
    return dict(value.raw)
