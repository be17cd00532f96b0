"""The protocol by which builds, training, calibration and benchmarks report progress."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A callback that receives the stage, the units done, the total, and an optional note on the stage."""

    def __call__(self, stage: str, done: int, total: int, note: str = "", /) -> None: ...
