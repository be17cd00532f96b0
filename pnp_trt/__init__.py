"""Plug-and-play guidance distillation, from training to a fast sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import Cancelled, InputError, PnpError
from .version import __version__

if TYPE_CHECKING:
    from .runtime.pipeline import Pipeline

__all__ = ["Cancelled", "InputError", "Pipeline", "PnpError", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `pnp-trt --help` does not load an inference runtime.
    if name == "Pipeline":
        from .runtime.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'pnp_trt' has no attribute {name!r}")
