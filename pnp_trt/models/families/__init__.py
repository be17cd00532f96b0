"""Families of base models.  Importing this loads no torch."""

from __future__ import annotations

from pathlib import Path

from ...registry import Registry
from ..teacher import BaseModel
from .base import Family

#: families by name; Stable Diffusion takes every folder that no other reads
FAMILIES: Registry[Family] = Registry("families", "family", {"sd": "pnp_trt.models.families.sd:SD"})
_LAST = "sd"


def open_folder(name: str, folder: Path) -> BaseModel:
    """The base model in a folder, by the family that reads it.

    Raises:
        InputError: if no family reads it, or a part or file is missing.
    """
    families = FAMILIES.items()
    others = [family for key, family in families if key != _LAST and family.reads(folder)]
    return (others[0] if others else FAMILIES[_LAST]).open(name, folder)
