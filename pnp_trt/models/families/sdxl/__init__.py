"""Stable Diffusion XL: two text encoders, and pooled text and image sizes as additional conditions of the U-Net.

``family`` recognises folders, ``base`` opens them.
"""

from .family import SDXL

__all__ = ["SDXL"]
