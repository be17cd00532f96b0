"""Known architectures: the configs of all networks, for random weights and for checkpoints that contain no configs.

In ``presets``, each architecture has a JSON file with the U-Net's config, and a folder of the same name with the
configs of the other networks and of the noise schedule.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import catalog
from .families import FAMILIES, Family
from .teacher import BaseModel


@dataclass(frozen=True)
class Architecture:
    """A known architecture.

    Attributes:
        name: ``sd15``, ``sd21``, ``sdxl``.
        configs: config of each network (``unet``, the text encoders, ``vae``), by name.
        scheduler: file with the noise schedule's config.
    """

    name: str
    configs: dict[str, dict[str, Any]]
    scheduler: Path

    @property
    def family(self) -> Family:
        """The family whose text encoders this architecture uses."""
        text_encoders = {n for n in self.configs if n not in ("unet", "vae")}
        return next(f for f in FAMILIES.values() if {spec.name for spec in f.model.text_specs} == text_encoders)

    @classmethod
    def read(cls, unet: Path) -> Architecture:
        """Read an architecture from the file of its U-Net's config."""
        folder = unet.with_suffix("")
        files = {"unet": unet, **{p.stem: p for p in sorted(folder.glob("*.json")) if p.stem != "scheduler"}}
        configs = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items()}
        return cls(unet.stem, configs, folder / "scheduler.json")


def architectures() -> list[Architecture]:
    """All known architectures, sorted by name."""
    return [Architecture.read(path) for path in sorted(catalog.PRESETS.glob("*.json"))]


def of_family(kind: type[BaseModel], family: Family) -> type[Any]:
    """A class of base models, such as ``RandomBase``, that also derives from the family's model class."""
    return kind if issubclass(kind, family.model) else type(kind.__name__, (kind, family.model), {})
