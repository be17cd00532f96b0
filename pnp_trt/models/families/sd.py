"""Stable Diffusion 1 and 2 and their fine-tunes."""

from __future__ import annotations

from pathlib import Path

from ..folders import check_folder
from ..specs import Layout
from ..teacher import BaseModel
from .base import Family


class StableDiffusion(Family):
    """diffusers folders of Stable Diffusion; tried last, and reports what is missing in folders of no family."""

    name = "sd"
    layouts = (
        Layout("text_encoder", "clip", r"cond_stage_model\.transformer\.(?:text_model\.)?"),
        Layout("text_encoder", "open_clip", r"cond_stage_model\.model\."),
        Layout("text_encoder", "clip", r"text_encoder\.(?:module\.)?(?:text_model\.)?"),
    )

    def reads(self, folder: Path) -> bool:
        return True

    def open(self, name: str, folder: Path) -> BaseModel:
        check_folder(folder)
        return BaseModel(name, folder)


SD = StableDiffusion()
