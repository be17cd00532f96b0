"""Generate images with a built bundle; no torch is needed.

    python examples/sample_from_python.py engines/emoji-tiny images

``pnp-trt sample "a red apple"`` creates the bundle ``engines/emoji-tiny`` on its first run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from pnp_trt import Pipeline

PROMPTS = ["a red apple", "a panda"]


def main(bundle: str, folder: str) -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline.load(bundle)
    # one batch; each image has its own seed and its own guidance scale
    images = pipeline(PROMPTS, steps=12, guidance=[3.0, 5.0], seed=[0, 1])
    for index, image in enumerate(images):
        Image.fromarray(image.pixels).save(out / f"{index}.png")
        print(image.parameters["prompt"], "w =", image.parameters["guidance"])


if __name__ == "__main__":
    main(*sys.argv[1:3])
