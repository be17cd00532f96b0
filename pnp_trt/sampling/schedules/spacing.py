"""How a run's steps are spaced, by name: ``dpm++:karras`` is DPM-Solver++ on Karras' noise levels.

A spacing replaces those options of the teacher's scheduler config that say where the steps lie.  AUTOMATIC1111 calls it
the schedule type.  What its names are in diffusers' options is diffusers' own list (API reference, "Schedulers").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..noise_levels import Config


@dataclass(frozen=True)
class Spacing:
    """A way to space the steps.

    Attributes:
        name: after the colon of a schedule's name.
        description: one clause for tables.
        options: of a diffusers scheduler config.
        aliases: names that other programs have for it, AUTOMATIC1111's first.
    """

    name: str
    description: str
    options: dict[str, Any]
    aliases: tuple[str, ...] = ()

    def applied(self, config: Config) -> dict[str, Any]:
        """``config`` with this spacing and no other."""
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
#: those that whole timesteps can follow
BY_TIMESTEP = tuple(name for name, spacing in SPACINGS.items() if "timestep_spacing" in spacing.options)
#: other programs' words for the teacher's own spacing
OWN_SPACING = ("Automatic", "Uniform", "normal")
