"""Parse the ``--lora`` argument: a file and a scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....assets import ROOT as ASSETS
from ....bundle.store import cached_sha256
from ....errors import InputError
from ....models.safetensors_header import read_header

#: part of a merge's identity, so that engines merged with older formulas do not count as up to date
_ARITHMETIC = "W + scale·alpha/rank·B·A by layer, float32"

#: largest magnitude of a scale that a bundle's manifest can record
LARGEST_SCALE = 1e6


def bundled_loras() -> list[str]:
    """Names of the bundled model's LoRAs."""
    return sorted(p.stem for p in (ASSETS / "loras").glob("*.safetensors"))


@dataclass(frozen=True)
class Lora:
    """A LoRA file and the scale to merge it with."""

    name: str
    path: Path
    scale: float

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Parse ``FILE`` or ``FILE:scale``, where ``FILE`` may be a bundled LoRA's name.

        Raises:
            InputError: if the file does not exist, is not a safetensors file, or the scale is not a number up to ±1e6.
        """
        name, colon, scale = text.rpartition(":")
        if not colon or not name or _find(text) is not None:
            name, scale = text, "1"
        path = _find(name)
        if path is None:
            known = ", ".join(bundled_loras()) or "none bundled"
            raise InputError(f"no LoRA '{name}'; --lora takes FILE.safetensors or FILE.safetensors:scale, or: {known}")
        if path.suffix != ".safetensors":
            raise InputError(f"the LoRA {path} is not a .safetensors; pickled weights are not read")
        try:
            number = float(scale)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"the scale of --lora {text} is '{scale}'; write a number, such as {name}:0.8")
        if abs(number) > LARGEST_SCALE:
            raise InputError(f"the scale of --lora {text} is {number:g}; the largest is {LARGEST_SCALE:g}")
        read_header(path)  # refuse a damaged file before expensive work
        return cls(path.stem, path, number)

    @property
    def adapter_config(self) -> Path | None:
        """peft's ``adapter_config.json`` beside ``adapter_model.safetensors``, which does not contain alpha."""
        path = self.path.with_name("adapter_config.json")
        return path if self.path.name == "adapter_model.safetensors" and path.is_file() else None

    @property
    def sha256(self) -> str:
        """Hash of the file."""
        return cached_sha256(self.path)

    def identity(self) -> dict[str, Any]:
        """JSON that identifies a merge of this LoRA."""
        out = {"name": self.name, "sha256": self.sha256, "scale": self.scale, "arithmetic": _ARITHMETIC}
        if self.adapter_config is not None:
            out["adapter_config_sha256"] = cached_sha256(self.adapter_config)
        return out


def _find(name: str) -> Path | None:
    for path in (ASSETS / "loras" / f"{name}.safetensors", Path(name)):
        if path.is_file():
            return path
    return None
