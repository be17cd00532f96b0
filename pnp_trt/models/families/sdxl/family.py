"""The family of Stable Diffusion XL."""

from __future__ import annotations

from pathlib import Path

from ...folders import check_folder
from ...specs import Layout
from ...teacher import BaseModel
from ..base import Family
from .base import SdxlBase


class StableDiffusionXL(Family):
    """diffusers folders with a U-Net and a second text encoder; SDXL's refiner is recognised and refused."""

    name = "sdxl"
    model = SdxlBase
    layouts = (
        Layout("text_encoder", "clip", r"conditioner\.embedders\.0\.transformer\.(?:text_model\.)?"),
        Layout("text_encoder_2", "open_clip", r"conditioner\.embedders\.[01]\.model\."),  # 0 in the refiner
        Layout("text_encoder_2", "clip", r"text_encoder_2\.(?:module\.)?(?:text_model\.)?"),
    )
    leftovers = (
        (r"(?:\w+\.)*conditioner\.embedders\.\d\.(?:model|transformer)\.(?:logit_scale|(?:model\.)?attn_mask)$",
         "CLIP's scale for training"),
    )  # fmt: skip

    def reads(self, folder: Path) -> bool:
        return (folder / "unet").is_dir() and (folder / "text_encoder_2").is_dir()

    def open(self, name: str, folder: Path) -> BaseModel:
        check_folder(folder)
        return SdxlBase(name, folder)


SDXL = StableDiffusionXL()
