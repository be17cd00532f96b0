"""Figures of the bundled model's card: the effect of the guidance scale w on its images.

``evaluate`` samples a diffusers Stable-Diffusion folder at each w, from the same captions and noise, and
measures EfficientNet-KID to the real images of those captions and alignment (R@1, R@5) by the frozen
judge; the same measures of real images are the ceiling.  Each w is stored as soon as it is sampled, so
a killed run continues.  ``write_card`` writes README.md from the resulting JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from pnp_trt.bench.metrics import fidelity
from pnp_trt.bench.metrics.fidelity import AlignmentHead, FeatureExtractor
from pnp_trt.bundle.store import write_json
from pnp_trt.errors import InputError

from ..records import add_sampling_options, read
from .card import write_card
from .data import BASE_STYLES, FINE_TUNE_STYLES, STYLES, split
from .grid import draw_grid
from .measures import Shots, add_gains, measure, real_ceiling, real_images, verdict
from .provenance import provenance, relative
from .sampler import BATCH, SCALES, Ask, Sampler, asks

FINE_TUNE_SCALES = (1.0, 3.0)
#: columns of the grid: trained concepts, then held-out ones and a held-out colour × shape
GRID = (
    ("red-apple", "noto"), ("grinning-face", "twemoji"), ("red-heart", "noto"), ("panda", "twemoji"), ("pizza", "noto"),
    ("house", "twemoji"), ("tulip", "noto"), ("fox", "noto"), ("doughnut", "twemoji"), ("umbrella", "noto"),
    ("blue-square", "twemoji"),
)  # fmt: skip


def _command(model_dir: Path, fine_tunes: dict[str, Path], judge: Path, images: int, steps: int, device: str) -> str:
    """The command line for the same measurement, even if ``evaluate`` was called from other code."""
    words = ["python", "-m", "benchmarks.emoji.figures", "--model", relative(model_dir), "--judge", relative(judge)]
    for word, path in fine_tunes.items():
        words += ["--fine-tune", f"{word}={relative(path)}"]
    words += ["--images", str(images), "--steps", str(steps)]
    return shlex.join(words if device == "cpu" else [*words, "--device", device])


def evaluate(
    model_dir: Path,
    fine_tunes: dict[str, Path],
    judge: Path,
    cache: Path,
    results: Path,
    images: int = 512,
    steps: int = 20,
    *,
    grid: Path = Path("pnp_trt/assets/emoji/grid.png"),
    scales: Sequence[float] = SCALES,
    batch: int = BATCH,
    device: str = "cpu",
) -> dict[str, Any]:
    """Sample and measure ``model_dir`` (a StableDiffusionPipeline folder) and its fine-tuned U-Nets.

    ``fine_tunes`` maps a style's word ("flat") to U-Net safetensors.  ``images`` is the number of images of trained
    captions for each w; held-out concepts and each fine-tune get a quarter of it, held-out colour × shape captions a
    sixteenth.  Write the record to ``results`` and the PNG ``grid``; return the record.  Work in progress is cached in
    ``cache/figures``.  Raises :class:`InputError` on values out of range.
    """
    if images < 4 or not 1 <= steps <= 1000:
        raise InputError(f"images must be at least 4 and steps 1 to 1000, got {images} and {steps}")
    if 1.0 not in scales:
        raise InputError(f"scales must include 1, with which the others are compared; got {list(scales)}")
    if unknown := sorted(set(fine_tunes) - {s.word for s in FINE_TUNE_STYLES}):
        raise InputError(f"unknown fine-tune {unknown[0]!r}; known: {', '.join(s.word for s in FINE_TUNE_STYLES)}")
    head, extract = AlignmentHead.load(judge), FeatureExtractor(device)
    facts = provenance(model_dir, fine_tunes, head, _command(model_dir, fine_tunes, judge, images, steps, device))
    sampler = Sampler(model_dir, device=device)
    parts = split()
    sets = {
        "train": asks(parts["train"], BASE_STYLES, images),
        "held_out": asks(parts["held_out"], BASE_STYLES, min(2 * len(parts["held_out"]), max(2, images // 4))),
        "held_out_colour_shape": asks(parts["held_out_colour_shape"], BASE_STYLES, max(2, images // 16)),
    }
    precision = sampler.choose_precision(sets["train"], steps)
    print(precision, flush=True)

    def work(sampler: Sampler, weights: Any, name: str, rows: Sequence[Ask], over: Sequence[float]) -> dict[str, Any]:
        """Sample and measure one set at each w; cached images of the same weights are reused."""
        key = [weights, facts["versions"]["torch"], precision["precision"], steps, batch, [astuple(a) for a in rows]]
        key += [] if device == "cpu" else [device]
        folder = cache / "figures" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        real = Shots.cached(folder / "real.npz", lambda: real_images(rows, cache), extract)
        again = Shots.cached(folder / "real-again.npz", lambda: real_images(rows, cache, 1), extract)
        at, by_w = {}, {}
        for w in over:
            note = f"{name}, w = {w:g}"
            at[w] = Shots.cached(folder / f"w-{w:g}.npz", lambda: sampler(rows, w, steps, batch, note), extract)  # noqa: B023
            by_w[f"{w:g}"] = measure(real, at[w], rows, head)
            print(note, {k: round(by_w[f"{w:g}"][k]["value"], 4) for k in ("kid", "R@1", "R@5")}, flush=True)
        add_gains(real, at, by_w)
        return {
            "asks": [list(astuple(a)) for a in rows],
            "real": real_ceiling(rows, real, again, head),
            "by_w": by_w,
            "verdict": verdict(by_w),
        }

    document: dict[str, Any] = {
        "schema": "pnp-trt/emoji-figures/2",
        "provenance": facts,
        "settings": {"images": images, "steps": steps, "sampler": "DDIM, eta 0", "batch": batch, **precision},
        "candidates": len(head.concepts),
        "split": {k: len(v) for k, v in parts.items()},
        "styles": {s.word: {"package": s.package, "licence": s.licence} for s in STYLES.values()},
    }
    mine = facts["weights_sha256"]
    document["sets"] = {name: work(sampler, mine, name, rows, scales) for name, rows in sets.items()}

    real = real_images(sets["train"], cache)
    through = sampler.reconstruct(real)
    level = fidelity.psnr(through, real)
    shots = Shots(through, extract(through))
    document["autoencoder"] = {
        **measure(Shots(real, extract(real)), shots, sets["train"], head),
        "psnr_db": fidelity.mean(level).as_dict(),
        "psnr_each": [round(float(v), 2) for v in level],
    }

    columns = [Ask(c, s, 7 + i) for i, (c, s) in enumerate(GRID)]
    strips = [("real", real_images(columns, cache, turn=None))]
    strips += [(f"w = {w:g}", sampler(columns, w, steps, batch)) for w in scales]
    draw_grid(columns, strips, grid)

    document["fine_tunes"] = {}
    for word, path in fine_tunes.items():
        tuned = Sampler(model_dir, path, device)
        tuned.bfloat16 = sampler.bfloat16
        rows = asks(parts["train"], [STYLES[word]], max(4, images // 4))
        over = [w for w in FINE_TUNE_SCALES if w in scales]
        weights = [mine, facts["fine_tunes_sha256"][word]]
        document["fine_tunes"][word] = work(tuned, weights, f"fine-tune {word}", rows, over)
    write_json(results, document)
    return document


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.emoji.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    assets = Path("pnp_trt/assets")
    add = parser.add_argument
    add("--model", type=Path, default=assets / "emoji", help="a diffusers StableDiffusionPipeline folder")
    add("--fine-tune", action="append", default=[], metavar="STYLE=FILE", help="flat=FILE or 3d=FILE; may repeat")
    add("--results", type=Path, default=Path("benchmarks/results/emoji-figures.json"))
    add("--grid", type=Path, default=assets / "emoji" / "grid.png")
    add("--card", type=Path, default=assets / "emoji" / "README.md")
    add("--card-only", action="store_true", help="only write the card, from the existing results")
    add_sampling_options(parser, "number of images of trained captions for each w", BATCH)
    add("--steps", type=int, default=20)
    args = parser.parse_args()
    try:
        if args.card_only:
            figures = read(args.results)
        else:
            fine_tunes = {}
            for argument in args.fine_tune:
                word, equals, file = argument.partition("=")
                if not equals or not Path(file).is_file():
                    raise InputError(f"--fine-tune needs STYLE=FILE with an existing file, got {argument!r}")
                fine_tunes[word] = Path(file)
            figures = evaluate(
                args.model,
                fine_tunes,
                args.judge,
                args.cache,
                args.results,
                args.images,
                args.steps,
                grid=args.grid,
                batch=args.batch,
                device=args.device,
            )
        write_card(figures, args.card)
    except (InputError, FileNotFoundError) as error:
        parser.error(str(error))
    print(json.dumps(figures["sets"]["train"]["verdict"], indent=1))


if __name__ == "__main__":
    main()
