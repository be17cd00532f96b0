"""Guides by name without their code: importing this loads no torch."""

from __future__ import annotations

from pathlib import Path

from ..assets import ROOT as ASSETS
from ..errors import InputError


def guide_folder(name: str) -> Path:
    """Where a guide's files are: a bundled one by its full or its short name, or a folder.

    Raises:
        InputError: listing the known guides.
    """
    for candidate in (ASSETS / "guides" / name, ASSETS / "guides" / f"emoji-{name}", Path(name)):
        if (candidate / "config.json").is_file():
            return candidate
    known = ", ".join(sorted(p.parent.name for p in (ASSETS / "guides").glob("*/config.json"))) or "none bundled"
    raise InputError(f"no guide '{name}'; known: {known}, none, or a folder made by pnp-trt distill guidance")
