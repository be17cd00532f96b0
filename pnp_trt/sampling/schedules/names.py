"""Names of schedules in other programs: AUTOMATIC1111, ComfyUI and diffusers.

The names themselves are in the schedules (``ScheduleRule.aliases``) and spacings (``Spacing.aliases``).
"""

from __future__ import annotations

import re

from ...errors import InputError
from .base import SCHEDULES
from .spacing import OWN_SPACING, SPACINGS

#: other programs' samplers that add noise at every step, which tables cannot express
NOISY = (
    "Euler a", "euler_ancestral", "EulerAncestralDiscreteScheduler", "DPM2 a", "dpm_2_ancestral",
    "KDPM2AncestralDiscreteScheduler", "DPM++ 2S a", "dpmpp_2s_ancestral", "DPM++ SDE", "dpmpp_sde",
    "DPMSolverSDEScheduler", "DPM++ 2M SDE", "dpmpp_2m_sde", "DPM++ 2M SDE Heun", "DPM++ 3M SDE", "dpmpp_3m_sde",
    "LCM", "LCMScheduler", "TCDScheduler", "DDPM", "DDPMScheduler", "Restart",
)  # fmt: skip


def find(name: str, extra: tuple[str, ...] = ()) -> tuple[str, str | None]:
    """The schedule and the spacing of a name; the spacing is None if the name has none.

    Args:
        name: one of ``SCHEDULES``, optionally with a colon and one of ``SPACINGS``, or an alias, optionally followed by
            an alias of a spacing.
        extra: further names that the message lists as known.

    Raises:
        InputError: for an unknown name, a sampler that adds noise at every step, or a spacing that the schedule does
            not support.
    """
    if name in SCHEDULES:
        return name, None
    first, colon, suffix = name.partition(":")
    if colon and first in SCHEDULES:
        return first, _checked(first, suffix)
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
    """The schedule for AUTOMATIC1111's sampler and schedule type (``sampler_name`` and ``scheduler`` of its API).

    ``Automatic`` and ``Uniform`` use the spacing of the teacher's scheduler config.

    Raises:
        InputError: as for :func:`find`.
    """
    rule, spacing = find(sampler)
    if schedule_type and _key(schedule_type) not in {_key(own) for own in OWN_SPACING}:
        rest, named = _without_spacing(_key(schedule_type))
        spacing = _checked(rule, schedule_type if rest or named is None else named)
    return rule if spacing is None else f"{rule}:{spacing}"


def a1111_names(schedule: str) -> tuple[str, str]:
    """AUTOMATIC1111's sampler and schedule type for a schedule; this package's names if A1111 has none."""
    rule, spacing = find(schedule)
    names = SCHEDULES.get(rule).aliases or (rule,)
    if spacing is None:
        return names[0], OWN_SPACING[0]
    return names[0], (SPACINGS[spacing].aliases or (spacing,))[0]


def _checked(rule: str, spacing: str) -> str:
    """Return the spacing, or raise ``InputError`` if the schedule does not support it."""
    supported = SCHEDULES.get(rule).spacings
    if spacing not in supported:
        others = [name for name, other in SCHEDULES.items() if spacing in other.spacings]
        advice = f"; {', '.join(f'{name}:{spacing}' for name in others)} would do" if others else ""
        raise InputError(
            f"the spacing of schedule {rule} is '{spacing}'; known: {', '.join(supported) or 'none'}{advice}"
        )
    return spacing


def _key(name: str) -> str:
    """Normalised name: equal for ``DPM++ 2M``, ``dpmpp_2m`` and ``k_dpmpp_2m``."""
    return re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("k_").replace("++", "pp"))


def _without_spacing(key: str) -> tuple[str, str | None]:
    """A key without the longest spacing's name at its end, and that spacing; None for the teacher's own."""
    spacings: dict[str, str | None] = {_key(own): None for own in OWN_SPACING}
    spacings |= {_key(alias): name for name, rule in SPACINGS.items() for alias in (name, *rule.aliases)}
    ends = [alias for alias in spacings if key.endswith(alias)]
    if not ends:
        return key, None
    longest = max(ends, key=len)
    return key.removesuffix(longest), spacings[longest]
