"""Draw docs/plug-grid.png, one engine plugged with the fine-tunes and the LoRA: ``python -m benchmarks.plug_grid``.

Every row has the same prompts and seeds, and its bundle is plugged from the same engine.  Existing bundles are reused.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from pnp_trt.build.builder import build
from pnp_trt.build.spec import BuildSpec
from pnp_trt.build.swap.run import PlugSpec, plug
from pnp_trt.runtime.pipeline import Pipeline

from .emoji.grid import draw_grid
from .emoji.sampler import Ask

CONCEPTS = ("red-heart", "tangerine", "grinning-face", "panda", "ghost", "fish", "house", "red-apple")
#: row → (fine-tune, LoRAs)
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "flat": ("emoji-flat", ()),
    "3d": ("emoji-3d", ()),
    "LoRA": ("emoji", ("sepia",)),
    "LoRA 0.5": ("emoji", ("sepia:0.5",)),
    "3d+LoRA": ("emoji-3d", ("sepia",)),
}


def main() -> None:
    """Build, plug and sample; write the grid."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plug_grid", description=__doc__)
    parser.add_argument("--engines", type=Path, default=Path("engines"))
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("docs/plug-grid.png"))
    a = parser.parse_args()
    os.environ["PNP_TRT_ENGINES"] = str(a.engines)
    engine = a.engines / "emoji-tiny"
    build(BuildSpec(out=engine))
    folders = {"base": engine}
    for i, (row, (base, loras)) in enumerate(ROWS.items()):
        folders[row] = plug(PlugSpec(str(engine), base, loras, a.engines / f"plug-grid-{i}")).folder
    # no style in the prompts: rows differ only in their weights
    prompts = [c.replace("-", " ") for c in CONCEPTS]
    strips = []
    for row, folder in folders.items():
        drawn = Pipeline.load(folder)(prompts, steps=a.steps, guidance=3.0, seed=[a.seed] * len(prompts))
        strips.append((row, np.stack([p.pixels for p in drawn])))
    draw_grid([Ask(c, "no style named", a.seed) for c in CONCEPTS], strips, a.out, left=90)
    print(a.out)


if __name__ == "__main__":
    main()
