"""Names of bundled bases and guides, and guides' folders.  Importing this does not load torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..assets import ROOT as ASSETS
from ..errors import InputError
from ..io.inputs import is_file, read_json
from ..io.json_schema import problem

_ADVICE = "name a folder made by pnp-trt distill"
_CONFIG = {
    "type": "object",
    "required": ["_class_name"],
    "properties": {
        "_class_name": {"type": "string"},
        "negative_prompts": {"type": ["boolean", "null"]},
        "sampling_steps": {"type": ["integer", "null"], "minimum": 1},
        "sharpener_width": {"type": ["integer", "null"], "minimum": 1},
        "gain": {"type": ["array", "null"], "items": {"type": "number"}},
    },
}


def guide_folder(name: str) -> Path:
    """Return the folder of a guide: a bundled one by its full or short name, or a path.

    Raises:
        InputError: if there is no such guide; the message lists the known ones.
    """
    for candidate in (ASSETS / "guides" / name, ASSETS / "guides" / f"emoji-{name}", Path(name)):
        if is_file(candidate / "config.json"):
            return candidate
    known = ", ".join(sorted(p.parent.name for p in (ASSETS / "guides").glob("*/config.json"))) or "none bundled"
    raise InputError(f"no guide '{name}'; known: {known}, none, or a folder made by pnp-trt distill guidance")


def guide_config(folder: Path) -> dict[str, Any]:
    """Read a guide's ``config.json`` and check the entries that the program reads.

    Raises:
        InputError: if it is missing, not JSON, or not the config of a guide.
    """
    config: dict[str, Any] = read_json(folder / "config.json", "the guide's", _ADVICE)
    if wrong := problem(config, _CONFIG):
        raise InputError(f"{folder / 'config.json'} is not the config of a guide: {wrong}; {_ADVICE}")
    return config


def guide_weights(folder: Path) -> list[Path]:
    """A guide's weight files, sorted.

    Raises:
        InputError: if there is none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no .safetensors; a guide has config.json and safetensors weights; {_ADVICE}")
    return files


PRESETS = Path(__file__).parent / "presets"


def bundled_bases() -> list[str]:
    """Names of the bases that need no download: the bundled model and its fine-tunes (``emoji-flat`` …)."""
    return ["emoji", *sorted(p.stem for p in (ASSETS / "fine-tunes").glob("*.safetensors"))]


def random_bases() -> list[str]:
    """Names of the bases with random weights, for work where only the architecture's size matters."""
    return [f"random:{p.stem}" for p in sorted(PRESETS.glob("*.json"))]
