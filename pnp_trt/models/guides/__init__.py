"""Guides: small networks that add guidance to a frozen U-Net's skips and mid block.

The idea is *Plug-and-Play Diffusion Distillation* (Hsiao et al., CVPR 2024, §3): a guide reads the
noisy latent, the timestep, the text and the guidance scale w, and emits residuals for the U-Net's
decoder skips and mid block, so that one pass predicts what classifier-free guidance needs two for.
"""

from __future__ import annotations

from .full import FullGuide
from .parts import Features, GuideInput, GuideOutput, check_fit, sinusoid, skip_channels
from .tiny import TinyGuide

Guide = TinyGuide | FullGuide
GUIDES: dict[str, type[TinyGuide] | type[FullGuide]] = {"tiny": TinyGuide, "full": FullGuide}

__all__ = [
    "GUIDES",
    "Features",
    "FullGuide",
    "Guide",
    "GuideInput",
    "GuideOutput",
    "TinyGuide",
    "check_fit",
    "sinusoid",
    "skip_channels",
]
