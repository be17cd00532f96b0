"""Negative prompts by a sharpener of the text states, against CFG with the same negative prompts.

``python -m benchmarks.emoji.negative --guide FOLDER`` samples CFG with negative prompts, a guide with its sharpener,
and the guide without it, which cannot read negative prompts, from the same captions and noise.  The distances to CFG's
images are paired by image.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pnp_trt.bench.metrics import fidelity
from pnp_trt.bench.metrics.fidelity import FeatureExtractor
from pnp_trt.bundle.store import sha256, write_json
from pnp_trt.errors import InputError
from pnp_trt.models.bases import resolve
from pnp_trt.models.catalog import guide_folder
from pnp_trt.models.guides.load import load_guide

from ..records import add_images_option
from .cells import TEACHER
from .network import FLOAT32, Network
from .provenance import machine, relative
from .runner import captions
from .sampler import Guidance, Sampler, denoise

SCHEMA = "pnp-trt/emoji-negative/1"
RESULTS = Path("benchmarks/results/emoji-negative.json")
SCALES = (3.0, 5.0)
CFG, WITH, WITHOUT = "cfg", "sharpener", "without"


@torch.no_grad()
def sample(sampler: Sampler, guide: Any, images: int, steps: int, w: float, batch: int = 16) -> dict[str, Any]:
    """Images uint8 ``[N, H, W, 3]`` by method; each caption's negative prompt is the caption half a set further."""
    rows = captions("train", images)
    avoided = rows[images // 2 :] + rows[: images // 2]
    plain, guided = (Network(sampler.unet, g, FLOAT32, False, batch) for g in (None, guide))
    schedule, pixels = sampler.schedule(steps), {name: [] for name in (CFG, WITH, WITHOUT)}
    size = sampler.unet.config.sample_size
    for i in range(0, images, batch):
        some, others = rows[i : i + batch], avoided[i : i + batch]
        shape = (sampler.unet.config.in_channels, size, size)
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(a.seed)) for a in some])
        x = x.to(sampler.device)
        text, negative = (sampler.text([a.prompt for a in each]) for each in (some, others))
        empty = sampler.text([""])
        sharp: Tensor = guide.sharpener(
            text, negative, empty.expand_as(text), torch.full((len(some),), w, device=sampler.device)
        )
        for name, network, states, nothing in (
            (CFG, plain, text, negative), (WITH, guided, sharp, empty), (WITHOUT, guided, text, empty),
        ):  # fmt: skip
            how = Guidance("cfg" if name == CFG else "guided", w)
            pixels[name].append(sampler.decode(denoise(network, schedule, x, states, nothing, how)))
    return {name: np.concatenate(parts) for name, parts in pixels.items()}


def compared(images: dict[str, Any], extract: Any) -> dict[str, Any]:
    """Distances to CFG's images, and the sharpener's gain, paired by image."""
    features = {name: extract(pixels) for name, pixels in images.items()}
    out: dict[str, Any] = {}
    each: dict[str, Any] = {}
    for name in (WITH, WITHOUT):
        each[name] = {
            "psnr_db": fidelity.psnr(images[name], images[CFG]),
            "feature_cosine": fidelity.cosine(features[name], features[CFG]),
        }  # fmt: skip
        out[name] = {k: fidelity.mean(v).as_dict() for k, v in each[name].items()}
    out["gain"] = {k: fidelity.mean(each[WITH][k] - each[WITHOUT][k]).as_dict() for k in each[WITH]}
    return out


def measure(guide: Path, results: Path, images: int, steps: int, device: str, command: str) -> dict[str, Any]:
    """Sample and measure; write the record to ``results`` and return it.

    Raises:
        InputError: for a guide without a sharpener, or fewer than 4 images.
    """
    if images < 4:
        raise InputError(f"images must be at least 4, got {images}")
    loaded = load_guide(str(guide)).to(device)
    if loaded.sharpener is None:
        raise InputError(f"{guide} has no sharpener; train one with: pnp-trt distill guidance --sharpen emoji-tiny")
    facts, begun = machine(command), time.monotonic()
    sampler, extract = Sampler(resolve(TEACHER).folder, device=device), FeatureExtractor(device)
    rows = [
        {"w": w, **compared(sample(sampler, loaded, images, steps, w), extract)} for w in SCALES
    ]  # fmt: skip
    report = guide / "distill.json"
    document = {
        "schema": SCHEMA,
        "provenance": facts | {"guide_sha256": {p.name: sha256(p) for p in sorted(guide.glob("*.safetensors"))}},
        "settings": {"images": images, "steps": steps, "device": device, "sampler": "DDIM, eta 0",
                     "seconds": round(time.monotonic() - begun, 1)},
        "guide": json.loads(report.read_text()) if report.is_file() else None,
        "rows": rows,
    }  # fmt: skip
    write_json(results, document)
    return document


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.emoji.negative", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--guide", required=True, help="name or folder of a guide with a sharpener")
    add_images_option(parser, 512)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, default=RESULTS)
    a = parser.parse_args(arguments)
    try:
        folder = guide_folder(a.guide)
        words = ["python", "-m", "benchmarks.emoji.negative", "--guide", relative(folder)]
        words += ["--images", str(a.images), "--steps", str(a.steps)]
        words += ["--device", a.device] if a.device != "cpu" else []
        document = measure(folder, a.json, a.images, a.steps, a.device, shlex.join(words))
    except InputError as error:
        parser.error(str(error))
    print(json.dumps(document["rows"], indent=1))


if __name__ == "__main__":
    main()
