"""How long work reports its progress: one protocol for builds, training, calibration and benchmarks."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with the stage, units done and units in all, and what else is known of the stage."""

    def __call__(self, stage: str, done: int, total: int, note: str = "", /) -> None: ...
