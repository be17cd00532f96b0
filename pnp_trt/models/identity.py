"""Identity of a guide: its name, and the hash of its config and weights.  Importing this does not load torch."""

from __future__ import annotations

from typing import Any

from ..bundle.store import cached_sha256, digest
from .catalog import guide_config, guide_folder
from .files import weight_files


def guide_identity(base: str, guide: str) -> dict[str, Any] | None:
    """Name and hash of a guide, and its properties that a sampler needs; None for the plain teacher.

    Args:
        base: the base model's name; random bases create their own guides.
        guide: a guide's name or folder, ``auto`` or ``none``.

    Raises:
        InputError: if there is no such guide.
    """
    if guide == "none":
        return None
    from .bases import resolve

    if (own := resolve(base).random_guide(guide)) is not None:
        return own
    folder = guide_folder(guide_name(guide))
    files = [*weight_files(folder), folder / "config.json"]
    config = guide_config(folder)
    return {
        "name": folder.name,
        "sha256": digest([cached_sha256(f) for f in files]),
        # for the sampler: whether the U-Net has one more input, and the only step count of the guide
        "negative_prompts": bool(config.get("negative_prompts") or config.get("sharpener_width")),
        "sampling_steps": config.get("sampling_steps"),
    }


def guide_name(guide: str) -> str:
    """The guide's name, with ``auto`` resolved."""
    return "emoji-tiny" if guide == "auto" else guide
