"""Help texts that name the values of registries, read when help is shown."""

from __future__ import annotations

import importlib
import re
from typing import Any

from typer.core import TyperCommand

#: word in a help text → registry
_REGISTRIES = {
    "backends": "pnp_trt.backends:BACKENDS",
    "guides": "pnp_trt.models.guides:GUIDES",
    "recipes": "pnp_trt.precision.recipes:RECIPES",
    "schedules": "pnp_trt.sampling.schedules:SCHEDULES",
}


class RegistryCommand(TyperCommand):
    """A command in whose help ``{schedules}`` stands for the names of the registered schedules, and so on.

    Names are looked up when help is shown, so that no other use of the command line imports the registries, or reads
    the entry points of installed packages.
    """

    def format_help(self, *arguments: Any) -> None:
        """Write the help with the names filled in."""
        for parameter in self.params:
            if text := getattr(parameter, "help", None):
                parameter.help = filled(text)  # type: ignore[attr-defined]
        super().format_help(*arguments)


def filled(text: str) -> str:
    """``text`` with every ``{word}`` of a registry, or of ``methods``, replaced by the registered names."""
    return re.sub(r"\{(\w+)\}", lambda match: _names(match[1]), text)


def _names(word: str) -> str:
    if word == "methods":
        from ..sampling.methods import methods_of

        return f"{', '.join(methods_of(True))}, or on a bundle without a guide: {', '.join(methods_of(False))}"
    module, _, attribute = _REGISTRIES[word].partition(":")
    return ", ".join(getattr(importlib.import_module(module), attribute).names())
