"""Write the features of real images that `pnp-trt bench` compares the bundled model with.

The artists' images come from npm packages and are not shipped; EfficientNet-KID needs only their features.  They are
stored in float16 together with the images' captions, so that bench samples the same captions.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import astuple
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from pnp_trt.assets import ROOT
from pnp_trt.bench.metrics import fidelity
from pnp_trt.bundle.store import write_bytes

from ..records import add_images_option
from .data import BASE_STYLES
from .measures import real_images
from .runner import captions

IMAGES = 512
TARGET = ROOT / "emoji" / "real-features.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("build/emoji"), help="rendered images and npm packages")
    add_images_option(parser, IMAGES)
    parser.add_argument("--out", type=Path, default=TARGET)
    args = parser.parse_args()
    rows = captions("train", args.images)
    features = fidelity.FeatureExtractor()(real_images(rows, args.cache, 0))
    half = features.astype(np.float16)
    # effect of the rounding on KID, measured between two halves of the real images
    first, second = slice(0, None, 2), slice(1, None, 2)
    exact = fidelity.kid(features[first], features[second], draws=1).value
    off = abs(fidelity.kid(half[first].astype(np.float32), features[second], draws=1).value - exact)
    about = {
        "captions": json.dumps([astuple(a) for a in rows]),
        "extractor": fidelity.EXTRACTOR,
        "extractor_sha256": fidelity.EXTRACTOR_SHA256,
        "pictures": json.dumps({s.word: {"package": s.package, "licence": s.licence} for s in BASE_STYLES}),
        "made_by": "python -m benchmarks.emoji.real_features",
        "kid_changed_by_float16": f"{off:.2e}",
    }
    write_bytes(save({"features": half}, about), args.out)
    print(f"{args.out}: {half.shape[0]} images; float16 changes KID by {off:.1e} (of {exact:.4f})")


if __name__ == "__main__":
    main()
