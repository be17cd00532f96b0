"""A schedule: a name, diffusers' class that it equals, and a function that computes its table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ...registry import Registry
from ..noise_levels import Config
from ..table import Schedule


@dataclass(frozen=True)
class ScheduleRule:
    """A schedule by name.  Calling it gives the table for a scheduler config and a number of steps.

    Attributes:
        name: as ``--schedule`` and the parameters of images spell it.
        description: one clause for tables of schedules.
        diffusers_class: diffusers' scheduler class with the same steps, or None.
        table: computes the table; raises ``InputError`` for options of the config that no table can hold.
        aliases: names that other programs have for it, AUTOMATIC1111's first; case, spaces and ``_`` do not count.
        spacings: of ``SPACINGS``, those that its table applies.
        evaluations: model evaluations of a number of steps, which is the length of the table.
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
            config: a diffusers scheduler's, of any class; null stands for the default.
            steps: sampling steps.

        Raises:
            InputError: if ``steps`` is outside 1 … num_train_timesteps, or an option of the config is unknown,
                stochastic or not linear.
        """
        given = {k: v for k, v in config.items() if v is not None}
        return replace(self.table(given, steps), name=self.name)


#: schedules by name; the modules of this package and those of other packages add to it
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
    """Decorate a function ``(config, steps) -> Schedule`` and register it; arguments as of :class:`ScheduleRule`.

    Raises:
        InputError: if another schedule has this name.
    """

    def rule(table: Callable[[Config, int], Schedule]) -> ScheduleRule:
        return SCHEDULES.register(
            name, ScheduleRule(name, description, diffusers_class, table, aliases, spacings, evaluations)
        )

    return rule
