"""The version of the package, and of others that are installed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

__version__ = "0.1.0"


def installed(names: Iterable[str]) -> dict[str, str]:
    """The versions of those distributions that are installed; none of them is imported."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
