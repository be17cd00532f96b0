"""Distil a guide for a model of your own and build the bundle that serves it.

    python examples/distil_your_model.py BASE_FOLDER prompts.txt OUT_FOLDER

The settings are small for demonstration; ``pnp-trt distill guidance --help`` lists all of them with their defaults.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pnp_trt.distill.guidance import GuidanceConfig, distill
from pnp_trt.distill.states import StateConfig
from pnp_trt.distill.train import TrainConfig


def main(base: str, prompts: str, out: str) -> None:
    guide = Path(out) / "guide"
    report = distill(
        GuidanceConfig(
            base,
            Path(prompts),
            guide,
            grid_steps=0,  # no image grid
            states=StateConfig(count=40, steps=5, batch=4),
            train=TrainConfig(steps=30, batch=8, warmup=4),
        ),
        resume=guide.exists(),  # an interrupted run is resumed
    )
    print(f"relative error on held-out states: {report['held_out']['residual']:.2f}")
    build = ["build", "--base", base, "--guide", str(guide), "--out", str(Path(out) / "bundle")]
    subprocess.run([sys.executable, "-m", "pnp_trt", *build], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:4])
