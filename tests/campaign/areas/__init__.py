"""The areas of the campaign: each module defines the cases of one or more areas."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections import Counter

from ..case import Case


@functools.cache
def load() -> dict[str, list[Case]]:
    """All cases, by area."""
    areas: dict[str, list[Case]] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name == "common":
            continue
        for case in importlib.import_module(f"{__name__}.{module.name}").cases():
            areas.setdefault(case.area, []).append(case)
    for area, cases in areas.items():
        twice = [name for name, n in Counter(c.name for c in cases).items() if n > 1]
        assert not twice, f"{area} has two cases named {twice[0]}"
    return dict(sorted(areas.items()))


def find(area: str, name: str) -> Case:
    """Return the case with this name."""
    return next(c for c in load()[area] if c.name == name)


def quick(cases: list[Case]) -> list[Case]:
    """Return the cases of an area that the quick campaign runs, evenly spaced; a fifth over all areas.

    Half of the cases that end before any network runs are included, and few others; none is slow.
    """
    light, heavy = ([c for c in cases if not c.slow and c.light is light] for light in (True, False))
    return _spread(light, -(-len(light) // 2)) + _spread(heavy, -(-len(heavy) // 15))


def _spread(cases: list[Case], number: int) -> list[Case]:
    number = min(number, len(cases))
    return [cases[i * len(cases) // number] for i in range(number)]
