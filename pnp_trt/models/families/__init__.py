"""Families of base models.  Importing this does not load torch."""

from __future__ import annotations

from pathlib import Path

from ...registry import Registry
from ..teacher import BaseModel
from .base import Family

#: families by name; Stable Diffusion accepts every folder that no other family recognises
FAMILIES: Registry[Family] = Registry(
    "families", "family", {"sdxl": "pnp_trt.models.families.sdxl:SDXL", "sd": "pnp_trt.models.families.sd:SD"}
)
_LAST = "sd"


def open_folder(name: str, folder: Path) -> BaseModel:
    """Open the base model in a folder with the family that recognises it.

    Raises:
        InputError: if no family supports it, or a part or file is missing.
    """
    # families registered by other packages come first
    others = (family for key, family in reversed(FAMILIES.items()) if key != _LAST and family.reads(folder))
    return next(others, FAMILIES[_LAST]).open(name, folder)
