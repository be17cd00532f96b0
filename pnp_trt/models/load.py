"""Guides by name: bundled ones, and folders made by ``save_pretrained``."""

from __future__ import annotations

import json
from pathlib import Path

from ..assets import ROOT as ASSETS
from ..errors import InputError
from .base import _load, check_finite
from .guide import GUIDES, Guide


def bundled_guides() -> list[str]:
    """Names of the guides shipped with the package."""
    return sorted(p.parent.name for p in (ASSETS / "guides").glob("*/config.json"))


def guide_folder(name: str) -> Path:
    """Where a guide's files are.

    Raises:
        InputError: listing the known guides.
    """
    for candidate in (ASSETS / "guides" / name, ASSETS / "guides" / f"emoji-{name}", Path(name)):
        if (candidate / "config.json").is_file():
            return candidate
    known = ", ".join(bundled_guides()) or "none bundled"
    raise InputError(f"no guide '{name}'; known: {known}, none, or a folder made by pnp-trt distill guidance")


def load_guide(name: str) -> Guide:
    """A guide in float32, frozen, its weights checked to be finite.

    Raises:
        InputError: if there is none of this name, or its files are damaged.
    """
    folder = guide_folder(name)
    kind = json.loads((folder / "config.json").read_text()).get("_class_name")
    classes = {c.__name__: c for c in GUIDES.values()}
    if kind not in classes:
        raise InputError(f"{folder} holds a {kind}; known guides: {', '.join(classes)}")
    guide = _load(classes[kind], folder)
    return check_finite(guide, name).eval().requires_grad_(False)
