"""What a backend needs of a machine, for ``pnp-trt doctor``: stated where nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Needs:
    """What a backend is for and needs.

    Attributes:
        summary: one clause on what it is for.
        extra: of pnp-trt that installs what it needs; empty for the base installation, or for a package of its own.
        without_gpu: what it does on a machine without a GPU.
    """

    summary: str = ""
    extra: str = ""
    without_gpu: Literal["runs", "compiles", "nothing"] = "runs"
