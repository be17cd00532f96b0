"""The noise schedule recorded in a bundle, and checks that it can be sampled from and that a guide fits it.

`build` and `plug` create the manifest's record with the same function, :func:`scheduler_record`.  Importing this does
not load torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..sampling.noise_levels import alphas_cumprod
from ..sampling.schedules import SCHEDULES, ddim, make
from ..sampling.schedules import resolve as resolve_schedule
from .noise import Noise

if TYPE_CHECKING:
    from .teacher import BaseModel

#: sampling steps to test a record with if the guide has no fixed number: the command line's default
_TRIED_STEPS = 20
_NOISE_KEYS = (
    "beta_schedule",
    "beta_start",
    "beta_end",
    "num_train_timesteps",
    "trained_betas",
    "rescale_betas_zero_snr",
)
_STEP_KEYS = ("timestep_spacing", "steps_offset", "set_alpha_to_one")
#: defaults of diffusers' schedulers for entries missing from a config
_DEFAULTS = {
    "prediction_type": "epsilon", "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
    "num_train_timesteps": 1000, "trained_betas": None, "rescale_betas_zero_snr": False,
    "timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True,
}  # fmt: skip


def scheduler_record(config: Mapping[str, Any], stated: Noise, chosen: Noise) -> dict[str, Any]:
    """The scheduler record of a bundle's manifest.

    Args:
        config: the scheduler config with ``_class_name``: that of the fine-tune, or of the engine it is plugged into.
        stated: what a single file states about itself; overrides ``config``.
        chosen: the user's options; override both.
    """
    record = {k: v for k, v in config.items() if not k.startswith("_") or k == "_class_name"}
    # some tools write null for a default
    if record.get("prediction_type", "") is None:
        record["prediction_type"] = _DEFAULTS["prediction_type"]
    return chosen.over(stated.over(record))


def base_scheduler(base: BaseModel) -> dict[str, Any]:
    """A base model's scheduler config, including its class."""
    return base.scheduler_config() | {"_class_name": base.scheduler_class()}


def check_samples(record: Mapping[str, Any], name: str, distilled_steps: int | None = None) -> None:
    """Raise ``InputError`` if `pnp-trt sample` cannot compute the table of this scheduler.

    Args:
        name: the model's name, for the message.
        distilled_steps: the only number of steps that its guide was distilled for; None for any.
    """
    schedule = resolve_schedule(None, record, distilled_steps)
    try:
        make(schedule, record, _steps(record, distilled_steps))
    except InputError as e:
        others = [s for s in SCHEDULES if s != schedule and _samples(s, record, distilled_steps)]
        advice = f"; --schedule {' or '.join(others)} would work: set _class_name accordingly" if others else ""
        raise InputError(f"{name} has a noise schedule that cannot be sampled from: {e}{advice}") from None


def _samples(schedule: str, record: Mapping[str, Any], distilled_steps: int | None) -> bool:
    try:
        make(schedule, record, _steps(record, distilled_steps))
    except InputError:
        return False
    return True


def _steps(record: Mapping[str, Any], distilled_steps: int | None) -> int:
    return distilled_steps or min(_TRIED_STEPS, int(record.get("num_train_timesteps", 1000)))


def check_distilled(
    guide: Mapping[str, Any], record: Mapping[str, Any], what: str, name: str, distilled_steps: int | None = None
) -> None:
    """Check that a fine-tune's scheduler is compatible with the one that a guide was distilled under.

    A guide's output depends on the prediction type and on ᾱ_t, and for a guide with a fixed number of steps also on
    the DDIM table.  Scheduler class and, for other guides, timestep spacing may differ.

    Args:
        guide: the scheduler that the guide was distilled under.
        record: the fine-tune's scheduler.
        what: the guide, for the message.
        name: the fine-tune, for the message.
        distilled_steps: the only number of steps that the guide was distilled for; None for any.

    Raises:
        InputError: if they differ; the message has both values.
    """
    keys: tuple[str, ...] = ()
    if _value(guide, "prediction_type") != _value(record, "prediction_type"):
        keys += ("prediction_type",)
    if not _same(alphas_cumprod(guide), alphas_cumprod(record)):
        keys += _NOISE_KEYS
    if not keys and distilled_steps is not None and not _same_ddim(guide, record, distilled_steps):
        keys += _STEP_KEYS
    if differences := [k for k in keys if _value(guide, k) != _value(record, k)]:
        theirs, ours = (", ".join(f"{k} {_shown(_value(c, k))}" for k in differences) for c in (guide, record))
        raise InputError(
            f"{what} was distilled under {theirs}, but {name} has {ours}; distill a guide for it with "
            "pnp-trt distill guidance, build it with --guide none, or correct a wrong value with "
            "--prediction-type or --zero-terminal-snr"
        )


def _value(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    value = _DEFAULTS[key] if value is None else value
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return f"of {len(value)} values" if isinstance(value, list) else str(value)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    # float32 tables: betas that are listed and betas that are computed differ in their last bits
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-5, atol=1e-7))


def _same_ddim(guide: Mapping[str, Any], record: Mapping[str, Any], steps: int) -> bool:
    ours, theirs = ddim(record, steps), ddim(guide, steps)
    return np.array_equal(ours.timesteps, theirs.timesteps) and _same(ours.table(), theirs.table())
