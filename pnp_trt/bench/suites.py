"""Suites: plans stored as TOML files whose keys are the fields of :class:`~pnp_trt.bench.plan.Plan`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..bundle.profiles import parse_size
from ..errors import InputError
from ..io.inputs import is_file, read_text
from .plan import QUICK, Plan

_LISTS = {"engines": str, "batches": int, "steps": int, "timed_steps": int, "guidance": float}
_NUMBERS = {"rounds": int, "warmup": int, "images": int, "cold_starts": int, "requests": int}
#: keys of earlier suites and the fields they set
_RENAMED = {"pictures": "images"}
_SWITCHES = ("quick", "peers", "memory")
#: keys whose values are paths relative to the suite's file
_PATHS = ("prompts", "real", "inception", "clip")


def homes() -> tuple[Path, ...]:
    """Folders in which suites are looked up by name: in this package's own checkout and in the current directory."""
    folders = (Path(__file__).resolve().parents[2] / "benchmarks" / "suites", Path("benchmarks") / "suites")
    return tuple(dict.fromkeys(p.resolve() for p in folders if p.is_dir()))


def known() -> dict[str, Path]:
    """Paths of the suites, by name."""
    return {path.stem: path for home in reversed(homes()) for path in sorted(home.glob("*.toml"))}


def load(suite: str) -> dict[str, Any]:
    """Return the plan fields that a suite sets, for a suite's name or file.

    Raises:
        InputError: for an unknown suite, a file that is not TOML or is empty, an unknown key, or a value of the wrong
            type. The message lists the known suites or keys.
    """
    path = Path(suite)
    if not is_file(path):
        suites = known()
        if suite not in suites:
            names = ", ".join(sorted(suites)) or f"none; they lie in {' and '.join(map(str, homes())) or 'a checkout'}"
            raise InputError(f"there is no suite '{suite}'; known suites: {names}; or name a .toml file")
        path = suites[suite]
    try:
        table = tomllib.loads(read_text(path, "suite"))
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as e:  # ValueError: a number of thousands of digits
        raise InputError(f"suite {path} is not readable as TOML ({e}); correct the file") from e
    if not table:
        raise InputError(f"suite {path} sets nothing; give it a setting such as steps = 50, or leave --suite out")
    named: dict[str, Any] = {}
    for key, value in table.items():
        if (field := _RENAMED.get(key, key)) in named:
            raise InputError(f"suite {path} sets '{field}' twice, also as '{key}'; name it once")
        named[field] = _value(path, field, value)
    return named


def make_plan(suite: str | None, quick: bool, overrides: Mapping[str, Any]) -> Plan:
    """Return the plan of a suite, or the default plan, overridden by the command line's options.

    Args:
        quick: replace the defaults with :data:`~pnp_trt.bench.plan.QUICK`.
        overrides: fields from the command line; those that are None or empty are ignored.

    Raises:
        InputError: as :func:`load` does.
    """
    named = {} if suite is None else load(suite)
    quick = quick or named.get("quick", False)
    options = {k: v for k, v in overrides.items() if v is not None and v != ()}
    if "steps" in options and "timed_steps" not in options:
        options["timed_steps"] = ()  # the command line's --steps applies to both
    return Plan(**{**(QUICK if quick else {}), **named, **options, "quick": quick})


def _value(path: Path, key: str, value: Any) -> Any:
    """Convert a TOML value to the type of the plan's field."""
    if key not in (names := [f.name for f in fields(Plan)]):
        raise InputError(f"suite {path} has the unknown key '{key}'; known keys: {', '.join(names)}")

    def refuse(expected: str) -> InputError:
        return InputError(f"suite {path}: '{key}' is {value!r}; it must be {expected}")

    def is_a(item: Any, kind: type) -> bool:
        return isinstance(item, (int, float) if kind is float else kind) and not isinstance(item, bool)

    if key in _LISTS:
        kind, items = _LISTS[key], value if isinstance(value, list) else [value]
        if not all(is_a(item, kind) for item in items):
            raise refuse(f"a list of {'names' if kind is str else 'numbers' if kind is float else 'whole numbers'}")
        return tuple(kind(item) for item in items)
    if key in _NUMBERS:
        if not is_a(value, int):
            raise refuse("a whole number")
        return value
    if key in _SWITCHES:
        if not isinstance(value, bool):
            raise refuse("true or false")
        return value
    if not isinstance(value, str):
        raise refuse("a string")
    if key == "size":
        return parse_size(value)
    return str(path.parent / value) if key in _PATHS else value
