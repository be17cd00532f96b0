"""Sampling schedules by name, each a table of coefficients for one and the same loop.

See :class:`~pnp_trt.sampling.table.Schedule` for what a row means.
"""

from __future__ import annotations

from ...errors import InputError
from ..noise_levels import Config, alphas_cumprod
from ..table import COLUMNS, Schedule
from .base import SCHEDULES, ScheduleRule, schedule
from .ddim import ddim, ddim_coefficients, ddim_step, spaced_timesteps
from .dpm_solver import dpm_solver
from .euler import euler

__all__ = [
    "COLUMNS",
    "SCHEDULES",
    "TEACHER",
    "Schedule",
    "ScheduleRule",
    "alphas_cumprod",
    "ddim",
    "ddim_coefficients",
    "ddim_step",
    "dpm_solver",
    "euler",
    "make",
    "of_class",
    "resolve",
    "schedule",
    "spaced_timesteps",
]

#: the word for what the teacher's own config says
TEACHER = "teacher"


def make(name: str, config: Config, steps: int) -> Schedule:
    """The table of a schedule for a teacher's scheduler config.

    Args:
        name: of ``SCHEDULES``, or ``teacher`` for the class that the config names.
        config: a diffusers scheduler's, of whichever class: options that two classes share mean the same in both,
            and those that it lacks have the defaults of the class that is asked for.

    Raises:
        InputError: for an unknown name, or options that are unknown or no table can hold.
    """
    return SCHEDULES.get(resolve(name, config))(config, steps)


def resolve(name: str | None, config: Config, distilled_steps: int | None = None) -> str:
    """The schedule that a name stands for.

    Args:
        name: as for :func:`make`; None takes the teacher's own where it is one of these, else DDIM.
        distilled_steps: the only number of steps that a guide was distilled for; that was under DDIM, which None
            then stands for.

    Raises:
        InputError: for an unknown name, or ``teacher`` with a class that is none of these.
    """
    own = config.get("_class_name")
    if name is None:
        return (of_class(own) if distilled_steps is None else None) or ddim.name
    if name == TEACHER:
        if (found := of_class(own)) is None:
            said = f"is {own}" if own else "is not recorded in this engine"
            raise InputError(f"the class of the teacher's scheduler {said}; name one of: {', '.join(SCHEDULES)}")
        return found
    if name not in SCHEDULES:
        raise InputError(f"the schedule is '{name}'; known: {', '.join((*SCHEDULES, TEACHER))}")
    return name


def of_class(diffusers_class: object) -> str | None:
    """The name of the first schedule that equals a scheduler class of diffusers; None if there is none."""
    if diffusers_class is None:
        return None
    return next((name for name in SCHEDULES if SCHEDULES.get(name).diffusers_class == diffusers_class), None)
