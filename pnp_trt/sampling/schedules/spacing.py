"""Spacings of a run's steps, by name: ``dpm++:karras`` is DPM-Solver++ on Karras' noise levels.

A spacing replaces the options of the teacher's scheduler config that set the noise levels or timesteps of the steps.
AUTOMATIC1111 calls it the schedule type.  The mapping to diffusers' options is from its API reference ("Schedulers").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..noise_levels import Config


@dataclass(frozen=True)
class Spacing:
    """A way to space the steps.

    Attributes:
        name: written after the colon of a schedule's name.
        description: one clause for tables.
        options: options of a diffusers scheduler config.
        aliases: other programs' names for it, AUTOMATIC1111's first.
    """

    name: str
    description: str
    options: dict[str, Any]
    aliases: tuple[str, ...] = ()

    def applied(self, config: Config) -> dict[str, Any]:
        """``config`` with this spacing instead of any other."""
        return {**config, "use_karras_sigmas": False, "use_exponential_sigmas": False, **self.options}


#: spacings by name
SPACINGS = {
    s.name: s
    for s in (
        Spacing("karras", "Karras et al. 2022, eq. 5, ρ = 7", {"use_karras_sigmas": True}, ("Karras", "ka")),
        Spacing("exponential", "even in log σ", {"use_exponential_sigmas": True}, ("Exponential", "exp")),
        Spacing(
            "trailing", "timesteps from the last one down", {"timestep_spacing": "trailing"},
            ("SGM Uniform", "simple"),
        ),
        Spacing("leading", "timesteps from the first one up", {"timestep_spacing": "leading"}),
        Spacing("linspace", "timesteps from the first to the last one", {"timestep_spacing": "linspace"}),
    )
}  # fmt: skip
ALL_SPACINGS = tuple(SPACINGS)
#: spacings by whole timesteps
BY_TIMESTEP = tuple(name for name, spacing in SPACINGS.items() if "timestep_spacing" in spacing.options)
#: other programs' names for the teacher's own spacing
OWN_SPACING = ("Automatic", "Uniform", "normal")
