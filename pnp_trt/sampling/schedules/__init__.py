"""Sampling schedules by name, each a table of coefficients for one and the same loop.

See :class:`~pnp_trt.sampling.table.Schedule` for what a row means.
"""

from __future__ import annotations

from dataclasses import replace

from ...errors import InputError
from ..noise_levels import Config, alphas_cumprod
from ..table import COLUMNS, Schedule
from .base import SCHEDULES, ScheduleRule, schedule
from .ddim import ddim, ddim_coefficients, ddim_step, spaced_timesteps
from .dpm_solver import dpm_solver
from .euler import euler
from .heun import heun
from .names import a1111_names, find, from_a1111
from .spacing import SPACINGS
from .unipc import unipc

__all__ = [
    "COLUMNS",
    "SCHEDULES",
    "SPACINGS",
    "TEACHER",
    "Schedule",
    "ScheduleRule",
    "a1111_names",
    "alphas_cumprod",
    "chosen",
    "ddim",
    "ddim_coefficients",
    "ddim_step",
    "dpm_solver",
    "euler",
    "evaluations",
    "from_a1111",
    "heun",
    "make",
    "of_class",
    "resolve",
    "schedule",
    "spaced_timesteps",
    "unipc",
]

#: the word for what the teacher's own config says
TEACHER = "teacher"


def make(name: str, config: Config, steps: int) -> Schedule:
    """The table of a schedule for a teacher's scheduler config.

    Args:
        name: as for :func:`resolve`.
        config: a diffusers scheduler's, of whichever class: options that two classes share mean the same in both,
            and those that it lacks have the defaults of the class that is asked for.
        steps: sampling steps.

    Raises:
        InputError: for an unknown name, or options that are unknown or no table can hold.
    """
    whole = resolve(name, config)
    rule, options = chosen(whole, config)
    return replace(rule(options, steps), name=whole)


def chosen(name: str, config: Config) -> tuple[ScheduleRule, Config]:
    """The rule that a name stands for, and the config with the spacing that it names.

    Raises:
        InputError: as :func:`resolve`.
    """
    rule, spacing = find(resolve(name, config))
    return SCHEDULES.get(rule), config if spacing is None else SPACINGS[spacing].applied(config)


def evaluations(name: str | None, config: Config, steps: int) -> int:
    """Model evaluations of ``steps`` steps of one image where each is made once: 2·steps − 1 of ``heun``.

    Args:
        name: as for :func:`resolve`.

    Raises:
        InputError: as :func:`resolve`.
    """
    return SCHEDULES.get(find(resolve(name, config))[0]).evaluations(steps)


def resolve(name: str | None, config: Config, distilled_steps: int | None = None) -> str:
    """The schedule that a name stands for, as ``dpm++`` or, with a spacing, ``dpm++:karras``.

    Args:
        name: of ``SCHEDULES``, or ``teacher`` for the class that the config names, each also with a colon and one of
            ``SPACINGS``; or a name that other programs have for it, such as ``DPM++ 2M Karras``, or a class of
            diffusers.  None takes the teacher's own where it is one of these, else DDIM.
        distilled_steps: the only number of steps that a guide was distilled for; that was under DDIM, which None
            then stands for.

    Raises:
        InputError: for an unknown name, a sampler that adds noise at every step, a spacing that the schedule does not
            apply, or ``teacher`` with a class that is none of these.
    """
    own = config.get("_class_name")
    if name is None:
        return (of_class(own) if distilled_steps is None else None) or ddim.name
    first, colon, spacing = name.partition(":")
    if first == TEACHER:
        if (found := of_class(own)) is None:
            said = f"is {own}" if own else "is not recorded in this engine"
            raise InputError(f"the class of the teacher's scheduler {said}; name one of: {', '.join(SCHEDULES)}")
        name = found + colon + spacing
    elif (known := of_class(name)) is not None:
        return known
    rule, chosen_spacing = find(name, extra=(TEACHER,))
    return rule if chosen_spacing is None else f"{rule}:{chosen_spacing}"


def of_class(diffusers_class: object) -> str | None:
    """The name of the first schedule that equals a scheduler class of diffusers; None if there is none."""
    if diffusers_class is None:
        return None
    return next((name for name in SCHEDULES if SCHEDULES.get(name).diffusers_class == diffusers_class), None)
