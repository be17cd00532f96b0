"""Stable Diffusion XL: two text encoders, pooled text and image sizes as further conditions of the U-Net.

``family`` recognises folders, ``base`` opens them.
"""

from .family import SDXL

__all__ = ["SDXL"]
