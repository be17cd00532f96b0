"""The fixtures of the campaign: two micro teachers, a guide, and the bundles ``plain`` and ``guided``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from ..conftest import make_micro_base, make_micro_bundles, make_micro_guide

ROOT = Path(__file__).resolve().parents[2]


def gather(folder: Path, base: Path, guide: Path, engines: Path) -> Path:
    """Copy the test suite's fixtures into ``folder``, and add the fine-tune ``base2``."""
    for name, source in (("base", base), ("guide", guide), ("engines", engines)):
        shutil.copytree(source, folder / name)
    make_micro_base(folder / "base2", seed=5)
    return folder


def build(folder: Path) -> Path:
    """Build all fixtures in ``folder``; takes half a minute."""
    folder.mkdir(parents=True, exist_ok=True)
    base = make_micro_base(folder / "base")
    make_micro_base(folder / "base2", seed=5)
    guide = make_micro_guide(base, folder / "guide")
    make_micro_bundles(base, guide, folder / "engines")
    return folder


if __name__ == "__main__":
    build(Path(sys.argv[1]))
