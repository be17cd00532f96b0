"""Requirements of a backend, for ``pnp-trt doctor``; in a separate module so that no runtime is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Needs:
    """The purpose and requirements of a backend.

    Attributes:
        summary: one clause on its purpose.
        extra: the extra of pnp-trt that installs its packages; empty for the base installation or a separate package.
        without_gpu: what works on a machine without a GPU.
    """

    summary: str = ""
    extra: str = ""
    without_gpu: Literal["runs", "compiles", "nothing"] = "runs"
