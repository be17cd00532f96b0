"""A schedule: its name, the equivalent diffusers class, and a function that computes its table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ...registry import Registry
from ..noise_levels import Config
from ..table import Schedule


@dataclass(frozen=True)
class ScheduleRule:
    """A schedule by name.  Calling it returns the table for a scheduler config and a number of steps.

    Attributes:
        name: as in ``--schedule`` and the parameters of images.
        description: one clause for tables of schedules.
        diffusers_class: diffusers' scheduler class with the same steps, or None.
        table: computes the table; raises ``InputError`` for options of the config that cannot be expressed as a table.
        aliases: other programs' names for it, AUTOMATIC1111's first; case, spaces and ``_`` are ignored.
        spacings: those of ``SPACINGS`` that it supports.
        evaluations: model evaluations for a number of steps, which is the length of the table.
    """

    name: str
    description: str
    diffusers_class: str | None
    table: Callable[[Config, int], Schedule]
    aliases: tuple[str, ...] = ()
    spacings: tuple[str, ...] = ()
    evaluations: Callable[[int], int] = int

    def __call__(self, config: Config, steps: int) -> Schedule:
        """The table, named after this schedule.

        Args:
            config: a diffusers scheduler's config, of any class; null means the default.
            steps: sampling steps.

        Raises:
            InputError: if ``steps`` is outside 1 … num_train_timesteps, or an option of the config is unknown,
                stochastic or not linear.
        """
        options = {k: v for k, v in config.items() if v is not None}
        return replace(self.table(options, steps), name=self.name)


#: schedules by name, registered by modules of this package and of other packages
SCHEDULES: Registry[ScheduleRule] = Registry("schedules", "schedule")


def schedule(
    name: str,
    description: str,
    diffusers_class: str | None = None,
    *,
    aliases: tuple[str, ...] = (),
    spacings: tuple[str, ...] = (),
    evaluations: Callable[[int], int] = int,
) -> Callable[[Callable[[Config, int], Schedule]], ScheduleRule]:
    """Decorate a function ``(config, steps) -> Schedule`` and register it; arguments as for :class:`ScheduleRule`.

    Raises:
        InputError: if another schedule has this name.
    """

    def rule(table: Callable[[Config, int], Schedule]) -> ScheduleRule:
        return SCHEDULES.register(
            name, ScheduleRule(name, description, diffusers_class, table, aliases, spacings, evaluations)
        )

    return rule
