"""Registries of named values, which other packages can extend.

Values are registered where they are defined, with :meth:`Registry.register`, or by installed packages through entry
points of the group ``pnp_trt.<kind>``.  Built-in values may be references, ``"module:attribute"``, so that listing the
names imports nothing.  Help texts, checks, tables and schemas read the registries, so that each name is written once.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar, overload

from .errors import InputError

T = TypeVar("T")


class Registry(Generic[T]):
    """Values of one kind by name, in the order of registration.

    Args:
        kind: plural name of the values, as in the entry-point group ``pnp_trt.<kind>``.
        noun: singular name for error messages.
        builtin: values of the package itself, as ``"module:attribute"`` strings that are imported on first use.
    """

    def __init__(self, kind: str, noun: str, builtin: dict[str, str] | None = None) -> None:
        self.kind, self.noun = kind, noun
        self._values: dict[str, T] = {}
        self._references: dict[str, str] = dict(builtin or {})
        self._builtin = frozenset(self._references)
        self._order: list[str] = list(self._references)
        self._discovered = False

    @overload
    def register(self, name: str) -> Callable[[T], T]: ...

    @overload
    def register(self, name: str, value: T) -> T: ...

    def register(self, name: str, value: T | None = None) -> T | Callable[[T], T]:
        """Add ``value`` under ``name``; without a value, return a decorator that adds the decorated object.

        Raises:
            InputError: if another value has this name.
        """
        if value is None:
            return lambda decorated: self.register(name, decorated)
        if name in self._values and self._values[name] is not value:
            raise InputError(f"the {self.noun} '{name}' is already registered; choose another name")
        if name not in self._order:
            self._order.append(name)
        self._values[name] = value
        return value

    def get(self, name: str) -> T:
        """Return the value of this name.

        Raises:
            InputError: for an unknown name, listing the known names, or if its module cannot be imported.
        """
        if name not in self._values and name not in self._references:
            self._discover()
        if name in self._values:
            return self._values[name]
        if name not in self._references:
            raise InputError(f"the {self.noun} is '{name}'; known: {', '.join(self.names())}")
        return self._load(name)

    def __getitem__(self, name: str) -> T:
        return self.get(name)

    def names(self) -> tuple[str, ...]:
        """Return all names, built-in names first, then the others in the order of registration."""
        self._discover()
        return tuple(self._order)

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def items(self) -> list[tuple[str, T]]:
        """Return all names and values, importing every value.

        A value of another package that cannot be imported is left out with a warning, so that one broken package does
        not affect code that does not use it.
        """
        pairs = []
        for name in self.names():
            try:
                pairs.append((name, self.get(name)))
            except InputError as e:
                if name in self._builtin:
                    raise
                warnings.warn(f"{e}; it is left out", stacklevel=2)
        return pairs

    def values(self) -> list[T]:
        """Return all values, importing each."""
        return [value for _, value in self.items()]

    def unregister(self, name: str) -> None:
        """Remove a value that was added by :meth:`register`, for tests and interactive use."""
        self._values.pop(name, None)
        if name not in self._references and name in self._order:
            self._order.remove(name)

    def _discover(self) -> None:
        """Read the entry points once; a package that redefines a known name is ignored."""
        if self._discovered:
            return
        self._discovered = True
        for point in sorted(entry_points(group=f"pnp_trt.{self.kind}"), key=lambda p: p.name):
            if point.name not in self._order:
                self._references[point.name] = point.value
                self._order.append(point.name)

    def _load(self, name: str) -> T:
        module, _, attribute = self._references[name].partition(":")
        try:
            value: T = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as e:
            raise InputError(
                f"the {self.noun} '{name}' is registered as {module}:{attribute}, which cannot be imported ({e}); "
                "reinstall the package that provides it"
            ) from e
        return self._values.setdefault(name, value)
