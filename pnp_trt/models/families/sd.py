"""Stable Diffusion 1 and 2 and their fine-tunes; XL for training guides."""

from __future__ import annotations

from pathlib import Path

from ..folders import check_folder
from ..teacher import BaseModel
from .base import Family


class StableDiffusion(Family):
    """diffusers folders of Stable Diffusion; asked last, so that it names what is missing in folders of no family."""

    name = "sd"

    def reads(self, folder: Path) -> bool:
        return True

    def open(self, name: str, folder: Path) -> BaseModel:
        check_folder(folder)
        return BaseModel(name, folder)


SD = StableDiffusion()
