"""Train the bundled model from scratch, resumably: ``python -m benchmarks.emoji --preset cpu``.

Stages, in order (``--only`` runs one): ``text``, ``base``, ``decoder``, ``fine-tunes``, ``package``,
``guide``, ``judge``, ``figures``.  A finished stage is not run again; a killed one continues.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import stages
from .presets import PRESETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="default: build/emoji/PRESET")
    parser.add_argument("--cache", type=Path, default=Path("build/emoji"), help="downloads and rendered images")
    parser.add_argument("--assets", type=Path, default=Path("pnp_trt/assets"), help="folder for the shipped files")
    parser.add_argument("--only", choices=list(stages.STAGES), action="append")
    args = parser.parse_args()
    out = args.out or args.cache / args.preset
    context = stages.Context(PRESETS[args.preset], out, args.cache, args.assets)
    for name in args.only or stages.STAGES:
        stages.STAGES[name](context)


if __name__ == "__main__":
    main()
