"""Sampling schedules by name, each a table of coefficients for the same loop.

See :class:`~pnp_trt.sampling.table.Schedule` for the meaning of a row.
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

#: name of the schedule in the teacher's own config
TEACHER = "teacher"


def make(name: str, config: Config, steps: int) -> Schedule:
    """The table of a schedule for a teacher's scheduler config.

    Args:
        name: as for :func:`resolve`.
        config: config of a diffusers scheduler of any class: options that two classes share mean the same in both, and
            missing options have the defaults of the requested class.
        steps: sampling steps.

    Raises:
        InputError: for an unknown name, or options that are unknown or cannot be expressed as a table.
    """
    full_name = resolve(name, config)
    rule, options = chosen(full_name, config)
    return replace(rule(options, steps), name=full_name)


def chosen(name: str, config: Config) -> tuple[ScheduleRule, Config]:
    """The rule of a schedule's name, and the config with the spacing in that name.

    Raises:
        InputError: as for :func:`resolve`.
    """
    rule, spacing = find(resolve(name, config))
    return SCHEDULES.get(rule), config if spacing is None else SPACINGS[spacing].applied(config)


def evaluations(name: str | None, config: Config, steps: int) -> int:
    """Model evaluations of ``steps`` steps of one image, counting one per row: 2·steps − 1 for ``heun``.

    Args:
        name: as for :func:`resolve`.

    Raises:
        InputError: as for :func:`resolve`.
    """
    return SCHEDULES.get(find(resolve(name, config))[0]).evaluations(steps)


def resolve(name: str | None, config: Config, distilled_steps: int | None = None) -> str:
    """The canonical name of a schedule, such as ``dpm++`` or, with a spacing, ``dpm++:karras``.

    Args:
        name: one of ``SCHEDULES``, or ``teacher`` for the class that the config names, each optionally with a colon and
            one of ``SPACINGS``; or another program's name, such as ``DPM++ 2M Karras``, or a diffusers class.  None
            takes the teacher's own schedule if it is supported, else DDIM.
        distilled_steps: the only number of steps that a guide was distilled for.  Such guides are distilled under DDIM,
            which is then the default for None.

    Raises:
        InputError: for an unknown name, a sampler that adds noise at every step, a spacing that the schedule does not
            support, or ``teacher`` with an unsupported class.
    """
    own = config.get("_class_name")
    if name is None:
        return (of_class(own) if distilled_steps is None else None) or ddim.name
    first, colon, spacing = name.partition(":")
    if first == TEACHER:
        if (known_name := of_class(own)) is None:
            state = f"is {own}" if own else "is not recorded in this engine"
            raise InputError(f"the class of the teacher's scheduler {state}; name one of: {', '.join(SCHEDULES)}")
        name = known_name + colon + spacing
    elif (known := of_class(name)) is not None:
        return known
    rule, chosen_spacing = find(name, extra=(TEACHER,))
    return rule if chosen_spacing is None else f"{rule}:{chosen_spacing}"


def of_class(diffusers_class: object) -> str | None:
    """The name of the first schedule that is equivalent to a diffusers scheduler class; None without one."""
    if diffusers_class is None:
        return None
    return next((name for name in SCHEDULES if SCHEDULES.get(name).diffusers_class == diffusers_class), None)
