"""What `pnp-trt sample` reads and writes: prompts from standard input, pictures, their parameters, a grid."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    from .runtime.pipeline import Picture

METADATA = ("embedded", "json")
#: a picture's side in a grid, in pixels, at most
_CELL = 512


def read_prompts(given: Sequence[str]) -> list[str]:
    """The prompts, each ``-`` replaced by the lines of standard input; empty lines are skipped.

    Raises:
        InputError: if standard input has no line or is not text.
    """
    out: list[str] = []
    for prompt in given:
        if prompt != "-":
            out.append(prompt)
            continue
        try:
            lines = [line.strip() for line in sys.stdin.read().splitlines()]
        except UnicodeDecodeError as e:
            raise InputError(f"standard input is not text ({e}); give a prompt a line in UTF-8") from e
        if not any(lines):
            raise InputError("standard input has no prompt; give one a line, or name them instead of -")
        out += [line for line in lines if line]
    return out


@dataclass(frozen=True)
class Files:
    """Where pictures go, and what goes with them.

    Attributes:
        out: the folder.
        kind: ``png``, ``webp`` or ``jpeg``.
        metadata: ``embedded``, or ``json`` for a file beside each picture too.
        grid: a PNG with all pictures, or None.
    """

    out: Path
    kind: str
    metadata: str
    grid: Path | None

    def check(self) -> None:
        """Raise ``InputError`` for what would fail once the pictures are drawn."""
        from .runtime.images import FORMATS

        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"--out {self.out} is a file; name a folder")
        if self.kind not in FORMATS:
            raise InputError(f"--format is '{self.kind}'; known: {', '.join(FORMATS)}")
        if self.metadata not in METADATA:
            raise InputError(f"--metadata is '{self.metadata}'; known: {', '.join(METADATA)}")
        if self.grid is not None and self.grid.exists():
            raise InputError(f"--grid {self.grid} exists and is not overwritten; name another file")

    def write(self, pictures: Sequence[Picture], prompts: Sequence[str], count: int) -> Iterator[Path]:
        """Write everything; yields the pictures' paths as they are written, the grid's last.

        Args:
            pictures: ``count`` of each prompt, in the prompts' order.
        """
        from .runtime.images import FORMATS, free_path, grid, save_parameters, save_picture, slug

        self.out.mkdir(parents=True, exist_ok=True)
        beside = ".json" if self.metadata == "json" else None
        for picture in pictures:
            stem = f"{slug(picture.parameters['prompt'])}-{picture.parameters['seed']}"
            path = free_path(self.out, stem, FORMATS[self.kind][0], beside=beside)
            save_picture(picture.pixels, picture.parameters, path, self.kind)
            if beside is not None:
                save_parameters(picture.parameters, path.with_suffix(beside))
            yield path
        if self.grid is not None:
            rows = [
                (prompt, [p.pixels for p in pictures[i * count : (i + 1) * count]]) for i, prompt in enumerate(prompts)
            ]
            seeds = [f"seed {p.parameters['seed']}" for p in pictures[:count]]
            self.grid.parent.mkdir(parents=True, exist_ok=True)
            cell = min(max(pictures[0].pixels.shape[:2]), _CELL)
            save_picture(
                grid(rows, seeds, cell=max(cell, 64)), {"pictures": [p.parameters for p in pictures]}, self.grid
            )
            yield self.grid
