"""The areas of the campaign: each module makes the cases of one or several."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections import Counter

from ..case import Case

#: The share of every area that the quick campaign runs: one case in so many.
QUICK = 5


@functools.cache
def load() -> dict[str, list[Case]]:
    """All cases, by area."""
    found: dict[str, list[Case]] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name == "common":
            continue
        for case in importlib.import_module(f"{__name__}.{module.name}").cases():
            found.setdefault(case.area, []).append(case)
    for area, cases in found.items():
        twice = [name for name, n in Counter(c.name for c in cases).items() if n > 1]
        assert not twice, f"{area} has two cases named {twice[0]}"
    return dict(sorted(found.items()))


def find(area: str, name: str) -> Case:
    """The case of that name."""
    return next(c for c in load()[area] if c.name == name)


def quick(cases: list[Case]) -> list[Case]:
    """A fixed fifth of an area, spread over it: mostly cases that end before any network runs, none that are slow."""
    number = -(-len(cases) // QUICK)
    light, heavy = ([c for c in cases if not c.slow and c.light is light] for light in (True, False))
    heavies = _spread(heavy, max(number // 6, number - len(light)))
    return _spread(light, number - len(heavies)) + heavies


def _spread(cases: list[Case], number: int) -> list[Case]:
    number = min(number, len(cases))
    return [cases[i * len(cases) // number] for i in range(number)]
