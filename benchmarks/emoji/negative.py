"""Negative prompts in one evaluation, against CFG with the same negative prompts.

``python -m benchmarks.emoji.negative --guide FOLDER`` samples CFG with negative prompts, a guide with its sharpener,
and the guide without it, which cannot read negative prompts, from the same captions and noise.  ``--rivals FOLDER``
samples rivals that ``benchmarks.emoji.rivals train --negative`` trained at an equal budget: a sharpener alone (DICE),
and guides with one.  The distances to CFG's images are paired by image.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Callable
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
from pnp_trt.sampling.schedules import Schedule

from ..records import add_images_option
from .cells import TEACHER
from .network import FLOAT32, Network
from .provenance import machine, relative
from .rivals.base import Rival
from .rivals.train import load, read_record
from .runner import captions
from .sampler import Guidance, Sampler, denoise

SCHEMA = "pnp-trt/emoji-negative/2"
RESULTS = Path("benchmarks/results/emoji-negative.json")
RIVALS_RESULTS = Path("benchmarks/results/emoji-negative-rivals.json")
SCALES = (3.0, 5.0)
#: CFG with the negative prompt, CFG that ignores it, and a guide with and without its sharpener
CFG, IGNORED, WITH, WITHOUT = "cfg", "cfg, negative ignored", "sharpener", "without"
#: the rival that changes the text states only
DICE = "sharpener"
BATCH = 16


#: (unit noise ``[B, C, H, W]``, text states of the prompts and of the negative prompts ``[B, tokens, D]``, of the empty
#: prompt ``[1, tokens, D]``, w, schedule) → latents
Method = Callable[[Tensor, Tensor, Tensor, Tensor, float, Schedule], Tensor]


def cfg(unet: Any, batch: int, ignored: bool = False) -> Method:
    """CFG with the negative prompt, or with the empty one in its place."""
    plain = Network(unet, None, FLOAT32, False, 2 * batch)

    def generate(x: Tensor, text: Tensor, negative: Tensor, empty: Tensor, w: float, schedule: Schedule) -> Tensor:
        return denoise(plain, schedule, x, text, empty if ignored else negative, Guidance("cfg", w))

    return generate


def guide_methods(unet: Any, guide: Any, batch: int) -> dict[str, Method]:
    """A guide with its sharpener, and without it."""
    guided = Network(unet, guide, FLOAT32, False, batch)

    def sharpened(x: Tensor, text: Tensor, negative: Tensor, empty: Tensor, w: float, schedule: Schedule) -> Tensor:
        scales = torch.full((len(x),), w, device=x.device)
        sharp = guide.sharpener(text, negative, empty.expand_as(text), scales)
        return denoise(guided, schedule, x, sharp, empty, Guidance("guided", w))

    def alone(x: Tensor, text: Tensor, negative: Tensor, empty: Tensor, w: float, schedule: Schedule) -> Tensor:
        return denoise(guided, schedule, x, text, empty, Guidance("guided", w))

    return {WITH: sharpened, WITHOUT: alone}


def rival_method(unet: Any, rival: Rival) -> Method:
    """A rival that reads the negative prompt in the place of the empty one."""

    def generate(x: Tensor, text: Tensor, negative: Tensor, empty: Tensor, w: float, schedule: Schedule) -> Tensor:
        def predict(x: Tensor, t: Tensor, text: Tensor, w: Tensor) -> Tensor:
            return rival(unet, x.contiguous(memory_format=torch.channels_last), t, text, negative, w)

        return denoise(predict, schedule, x, text, empty, Guidance("guided", w))

    return generate


@torch.no_grad()
def sample(
    sampler: Sampler, methods: dict[str, Method], images: int, steps: int, w: float, batch: int = BATCH
) -> dict[str, Any]:
    """Images uint8 ``[N, H, W, 3]`` by method; each caption's negative prompt is the caption half a set further."""
    rows = captions("train", images)
    avoided = rows[images // 2 :] + rows[: images // 2]
    schedule, pixels = sampler.schedule(steps), {name: [] for name in methods}
    size = sampler.unet.config.sample_size
    for i in range(0, images, batch):
        some, others = rows[i : i + batch], avoided[i : i + batch]
        shape = (sampler.unet.config.in_channels, size, size)
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(a.seed)) for a in some])
        x = x.to(sampler.device)
        text, negative = (sampler.text([a.prompt for a in each]) for each in (some, others))
        empty = sampler.text([""])
        for name, generate in methods.items():
            pixels[name].append(sampler.decode(generate(x, text, negative, empty, w, schedule)))
    return {name: np.concatenate(parts) for name, parts in pixels.items()}


def compared(images: dict[str, Any], extract: Any, baseline: str) -> dict[str, Any]:
    """Distances to CFG's images by method, and each method's gain over ``baseline``, paired by image."""
    features = {name: extract(pixels) for name, pixels in images.items()}
    each: dict[str, Any] = {
        name: {
            "psnr_db": fidelity.psnr(images[name], images[CFG]),
            "feature_cosine": fidelity.cosine(features[name], features[CFG]),
        }
        for name in images if name != CFG
    }  # fmt: skip
    out: dict[str, Any] = {name: {k: fidelity.mean(v).as_dict() for k, v in one.items()} for name, one in each.items()}
    for name, one in each.items():
        if name != baseline:
            out[name]["gain"] = {k: fidelity.mean(v - each[baseline][k]).as_dict() for k, v in one.items()}
    return out


def measure(
    sampler: Sampler, methods: dict[str, Method], baseline: str, results: Path, images: int, steps: int, command: str,
    about: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Sample and measure; write the record to ``results`` and return it.

    Args:
        baseline: the method with which the others are compared.
        about: fields of the record that describe the guide or the rivals.

    Raises:
        InputError: for fewer than 4 images.
    """
    if images < 4:
        raise InputError(f"images must be at least 4, got {images}")
    facts, begun, extract = machine(command), time.monotonic(), FeatureExtractor(sampler.device)
    methods = {CFG: cfg(sampler.unet, BATCH), IGNORED: cfg(sampler.unet, BATCH, ignored=True), **methods}
    rows = [{"w": w, **compared(sample(sampler, methods, images, steps, w), extract, baseline)} for w in SCALES]
    document = {
        "schema": SCHEMA,
        "provenance": facts,
        "settings": {"images": images, "steps": steps, "device": sampler.device, "sampler": "DDIM, eta 0",
                     "baseline": baseline, "seconds": round(time.monotonic() - begun, 1)},
        **about,
        "rows": rows,
    }  # fmt: skip
    write_json(results, document)
    return document


def with_guide(sampler: Sampler, name: str) -> tuple[dict[str, Method], dict[str, Any]]:
    """A guide with and without its sharpener, and the record's facts about it.

    Raises:
        InputError: for a guide without a sharpener.
    """
    folder = guide_folder(name)
    guide = load_guide(str(folder)).to(sampler.device)
    if guide.sharpener is None:
        raise InputError(f"{folder} has no sharpener; train one with: pnp-trt distill guidance --sharpen emoji-tiny")
    report = folder / "distill.json"
    about = {
        "guide": json.loads(report.read_text()) if report.is_file() else None,
        "guide_sha256": {p.name: sha256(p) for p in sorted(folder.glob("*.safetensors"))},
    }
    return guide_methods(sampler.unet, guide, BATCH), about


def with_rivals(sampler: Sampler, folder: Path) -> tuple[dict[str, Method], dict[str, Any]]:
    """One method per rival in ``folder``, and the record's facts about them.

    Raises:
        InputError: if the folder lacks the sharpener alone, or has rivals trained without negative prompts.
    """
    record = read_record(folder)
    plain = [name for name, entry in record["rivals"].items() if not entry.get("negative")]
    if plain or DICE not in record["rivals"]:
        raise InputError(
            f"{folder} must contain rivals trained with negative prompts, {DICE} among them; run: "
            "python -m benchmarks.emoji.rivals train --negative"
        )
    methods = {name: rival_method(sampler.unet, load(name, sampler.unet, folder)) for name in record["rivals"]}
    return methods, {"rivals": record["rivals"], "training": {k: v for k, v in record.items() if k != "rivals"}}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.emoji.negative", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--guide", help="name or folder of a guide with a sharpener")
    source.add_argument("--rivals", type=Path, help="folder of rivals trained with negative prompts")
    add_images_option(parser, 512)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help=f"default: {RESULTS}, or {RIVALS_RESULTS} with --rivals")
    a = parser.parse_args(arguments)
    words = ["python", "-m", "benchmarks.emoji.negative"]
    try:
        sampler = Sampler(resolve(TEACHER).folder, device=a.device)
        if a.rivals is None:
            methods, about = with_guide(sampler, a.guide)
            words += ["--guide", relative(guide_folder(a.guide))]
        else:
            methods, about = with_rivals(sampler, a.rivals)
            words += ["--rivals", relative(a.rivals)]
        words += ["--images", str(a.images), "--steps", str(a.steps)]
        words += ["--device", a.device] if a.device != "cpu" else []
        results = a.json or (RESULTS if a.rivals is None else RIVALS_RESULTS)
        baseline = WITHOUT if a.rivals is None else DICE
        document = measure(sampler, methods, baseline, results, a.images, a.steps, shlex.join(words), about)
    except InputError as error:
        parser.error(str(error))
    print(json.dumps(document["rows"], indent=1))


if __name__ == "__main__":
    main()
