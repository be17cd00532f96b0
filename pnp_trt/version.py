"""The versions of this package and of other installed packages."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

__version__ = "0.1.0"


def installed(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of the distributions that are installed, without importing them."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
