"""Families of base models.  Importing this loads no torch."""

from __future__ import annotations

from pathlib import Path

from ...registry import Registry
from ..teacher import BaseModel
from .base import Family

#: families by name; Stable Diffusion takes every folder that no other reads
FAMILIES: Registry[Family] = Registry(
    "families", "family", {"sdxl": "pnp_trt.models.families.sdxl:SDXL", "sd": "pnp_trt.models.families.sd:SD"}
)
_LAST = "sd"


def open_folder(name: str, folder: Path) -> BaseModel:
    """The base model in a folder, by the family that reads it.

    Raises:
        InputError: if no family reads it, or a part or file is missing.
    """
    # those of other packages before the package's own
    others = (family for key, family in reversed(FAMILIES.items()) if key != _LAST and family.reads(folder))
    return next(others, FAMILIES[_LAST]).open(name, folder)
