"""Guides: small networks that add guidance to a frozen U-Net's skips and mid block.

The method is *Plug-and-Play Diffusion Distillation* (Hsiao et al., CVPR 2024, §3): from the noisy latent, the timestep,
the text and the guidance scale w, a guide computes residuals for the U-Net's decoder skips and mid block, so that one
evaluation predicts what classifier-free guidance needs two for.

Importing this package does not load torch: the registry has the guides' names and imports their classes on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ...io.inputs import shortened
from ...registry import Registry

if TYPE_CHECKING:
    from .base import Guide
    from .full import FullGuide
    from .parts import Features, GuideInput, GuideOutput, check_fit, sinusoid, skip_channels
    from .tiny import TinyGuide

#: guide classes by name
GUIDES: Registry[type[Guide]] = Registry(
    "guides",
    "guide",
    {"tiny": "pnp_trt.models.guides.tiny:TinyGuide", "full": "pnp_trt.models.guides.full:FullGuide"},
)

__all__ = [
    "GUIDES",
    "Features",
    "FullGuide",
    "Guide",
    "GuideInput",
    "GuideOutput",
    "TinyGuide",
    "check_fit",
    "name_of_class",
    "sinusoid",
    "skip_channels",
]

_HOMES = {
    "Guide": "base", "FullGuide": "full", "TinyGuide": "tiny",
    **dict.fromkeys(("Features", "GuideInput", "GuideOutput", "check_fit", "sinusoid", "skip_channels"), "parts"),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def name_of_class(class_name: str, where: object) -> str:
    """Return the name in ``GUIDES`` of a guide class.

    Args:
        class_name: the class named in a guide's config.
        where: the file or folder of the config, for the message.

    Raises:
        InputError: if no registered guide has this class name.
    """
    classes = {guide.__name__: name for name, guide in GUIDES.items()}
    if class_name not in classes:
        raise InputError(f"{where} holds a {shortened(class_name)}; known guides: {', '.join(classes)}")
    return classes[class_name]
