"""Commands whose help lists registered names, and which accept former names of options."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from typer.core import TyperCommand

#: placeholder in a help text → registry
_REGISTRIES = {
    "backends": "pnp_trt.backends:BACKENDS",
    "guides": "pnp_trt.models.guides:GUIDES",
    "recipes": "pnp_trt.precision.recipes:RECIPES",
    "schedules": "pnp_trt.sampling.schedules:SCHEDULES",
}


class RegistryCommand(TyperCommand):
    """A command whose help replaces ``{schedules}`` by the names of the registered schedules, and so on.

    The names are looked up only when help is shown, so that other uses of the command line neither import the
    registries nor read the entry points of installed packages.

    Attributes:
        former: former name of an option → its current name. The former name still works, but help does not show it.
    """

    former: ClassVar[Mapping[str, str]] = {}

    def make_parser(self, ctx: Any) -> Any:
        """Make the command's parser, which also accepts the former names."""
        parser = super().make_parser(ctx)
        for old, new in self.former.items():
            for option in self.params:
                if new in (*option.opts, *option.secondary_opts):
                    alias = copy.copy(option)
                    alias.opts = [old if name == new else name for name in option.opts]
                    alias.secondary_opts = [old if name == new else name for name in option.secondary_opts]
                    alias.add_to_parser(parser, ctx)
        return parser

    def format_help(self, *arguments: Any) -> None:
        """Write the help with the placeholders replaced."""
        for parameter in self.params:
            if text := getattr(parameter, "help", None):
                parameter.help = filled(text)  # type: ignore[attr-defined]
        super().format_help(*arguments)


def with_former_names(former: Mapping[str, str]) -> type[RegistryCommand]:
    """Return a command class that also accepts options under their ``former`` names (former → current)."""
    return type("CommandWithFormerNames", (RegistryCommand,), {"former": former})


def filled(text: str) -> str:
    """Return ``text`` with every ``{registry}`` placeholder, and ``{methods}``, replaced by the registered names."""
    return re.sub(r"\{(\w+)\}", lambda match: _names(match[1]), text)


def _names(word: str) -> str:
    if word == "methods":
        from ..sampling.methods import methods_of, step_methods_of

        with_guide, without = methods_of(True), methods_of(False)
        every = dict.fromkeys([*with_guide, *step_methods_of(True), *without])
        return f"{', '.join(every)}; default: {with_guide[0]} if the bundle has a guide, otherwise {without[0]}"
    module, _, attribute = _REGISTRIES[word].partition(":")
    return ", ".join(getattr(importlib.import_module(module), attribute).names())
