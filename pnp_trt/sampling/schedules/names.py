"""Schedules by the names that people know: AUTOMATIC1111's, ComfyUI's and diffusers' beside this package's own.

The names themselves are at the schedules (``ScheduleRule.aliases``) and spacings (``Spacing.aliases``).
"""

from __future__ import annotations

import re

from ...errors import InputError
from .base import SCHEDULES
from .spacing import OWN_SPACING, SPACINGS

#: samplers that add noise at every step, which the loop of tables has none of, by their names elsewhere
NOISY = (
    "Euler a", "euler_ancestral", "EulerAncestralDiscreteScheduler", "DPM2 a", "dpm_2_ancestral",
    "KDPM2AncestralDiscreteScheduler", "DPM++ 2S a", "dpmpp_2s_ancestral", "DPM++ SDE", "dpmpp_sde",
    "DPMSolverSDEScheduler", "DPM++ 2M SDE", "dpmpp_2m_sde", "DPM++ 2M SDE Heun", "DPM++ 3M SDE", "dpmpp_3m_sde",
    "LCM", "LCMScheduler", "TCDScheduler", "DDPM", "DDPMScheduler", "Restart",
)  # fmt: skip


def find(name: str, extra: tuple[str, ...] = ()) -> tuple[str, str | None]:
    """The schedule and the spacing that a name stands for; the spacing is None where it names none.

    Args:
        name: of ``SCHEDULES``, alone or with a colon and one of ``SPACINGS``, or an alias, alone or with an alias of a
            spacing after it.
        extra: words that the message lists among those that are known.

    Raises:
        InputError: for an unknown name, a sampler that adds noise at every step, or a spacing that the schedule does
            not apply.
    """
    if name in SCHEDULES:
        return name, None
    first, colon, wanted = name.partition(":")
    if colon and first in SCHEDULES:
        return first, _checked(first, wanted)
    key = _key(name)
    rest, spacing = _without_spacing(key)
    if {key, rest} & {_key(noisy) for noisy in NOISY}:
        raise InputError(
            f"the sampler '{name}' adds noise at every step, which schedules here do not; "
            f"take one of: {', '.join(SCHEDULES)}"
        )
    rules = {_key(alias): rule.name for rule in SCHEDULES.values() for alias in (rule.name, *rule.aliases)}
    if key in rules:
        return rules[key], None
    if rest in rules:
        return rules[rest], None if spacing is None else _checked(rules[rest], spacing)
    raise InputError(f"the schedule is '{name}'; known: {', '.join((*SCHEDULES, *extra))}")


def from_a1111(sampler: str, schedule_type: str | None = None) -> str:
    """AUTOMATIC1111's sampler and schedule type (``sampler_name`` and ``scheduler`` of its API) as a schedule's name.

    ``Automatic`` and ``Uniform`` leave the spacing to the teacher's own scheduler config.

    Raises:
        InputError: as :func:`find`.
    """
    rule, spacing = find(sampler)
    if schedule_type and _key(schedule_type) not in {_key(own) for own in OWN_SPACING}:
        rest, named = _without_spacing(_key(schedule_type))
        spacing = _checked(rule, schedule_type if rest or named is None else named)
    return rule if spacing is None else f"{rule}:{spacing}"


def a1111_names(schedule: str) -> tuple[str, str]:
    """AUTOMATIC1111's sampler and schedule type of a schedule's name; its own words where A1111 has none."""
    rule, spacing = find(schedule)
    words = SCHEDULES.get(rule).aliases or (rule,)
    if spacing is None:
        return words[0], OWN_SPACING[0]
    return words[0], (SPACINGS[spacing].aliases or (spacing,))[0]


def _checked(rule: str, spacing: str) -> str:
    """A spacing that the schedule applies."""
    applied = SCHEDULES.get(rule).spacings
    if spacing not in applied:
        others = [name for name, other in SCHEDULES.items() if spacing in other.spacings]
        advice = f"; {', '.join(f'{name}:{spacing}' for name in others)} would do" if others else ""
        raise InputError(
            f"the spacing of schedule {rule} is '{spacing}'; known: {', '.join(applied) or 'none'}{advice}"
        )
    return spacing


def _key(name: str) -> str:
    """What counts of a name: ``DPM++ 2M``, ``dpmpp_2m`` and ``k_dpmpp_2m`` are one."""
    return re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("k_").replace("++", "pp"))


def _without_spacing(key: str) -> tuple[str, str | None]:
    """A key without the longest name of a spacing that it ends with, and that spacing; None for the teacher's own."""
    words: dict[str, str | None] = {_key(own): None for own in OWN_SPACING}
    words |= {_key(word): name for name, spacing in SPACINGS.items() for word in (name, *spacing.aliases)}
    ends = [word for word in words if key.endswith(word)]
    if not ends:
        return key, None
    longest = max(ends, key=len)
    return key.removesuffix(longest), words[longest]
