"""Measure gains of the guide's residuals: a table g(t), its square root and constants, compared with CFG's images.

``python -m benchmarks.emoji.gains measure`` samples the bundled tiny guide with each gain and CFG, from the same
captions and noise, and measures them; ``report`` writes ``docs/gain.md`` from the JSON.  A gain is compared with CFG at
equal w; each row also has the w of CFG whose images have the same strength of colour.  ``measure --base emoji-flat``
measures the base's guide in a fine-tune, against the fine-tune's own CFG.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pnp_trt.bench.metrics.fidelity import AlignmentHead, FeatureExtractor
from pnp_trt.bundle.store import sha256, write_json
from pnp_trt.errors import InputError
from pnp_trt.models.bases import resolve
from pnp_trt.models.catalog import guide_folder
from pnp_trt.models.guides.load import load_guide

from ..records import add_sampling_options, read
from . import compare
from .cells import FINE_TUNES, TEACHER
from .compare import Ranked
from .measures import Shots, chroma, real_images, recalls
from .network import FLOAT32, Network
from .provenance import machine
from .runner import SEED_STRIDE, captions
from .sampler import Ask, Guidance, Sampler
from .tables import spread

SCHEMA = "pnp-trt/emoji-gains/2"
RESULTS = Path("benchmarks/results/emoji-gains.json")
CONSTANTS = (1.3, 1.6)
SCALES = (2.0, 3.0, 5.0, 8.0)
#: the number of steps that is sampled at every w
EVERY_W = 16
STEPS = {w: (50, EVERY_W, 8) if w == 3.0 else (EVERY_W,) for w in SCALES}
TUNED_STEPS = {3.0: (50, EVERY_W), 5.0: (EVERY_W,)}
CFG, PLAIN = "cfg", "none"


def results_of(base: str) -> Path:
    """The record of the base or of a fine-tune."""
    return RESULTS if base == TEACHER else RESULTS.with_stem(f"{RESULTS.stem}-{base.removeprefix('emoji-')}")


def gains(table: Sequence[float]) -> dict[str, list[float] | None]:
    """Gains by name; ``table`` is the gain g(t) that matches the length of the teacher's change."""
    constants: dict[str, list[float] | None] = {f"{c:g}": [c] for c in CONSTANTS}
    return {
        PLAIN: None,
        **constants,
        "root of the table": [round(math.sqrt(g), 4) for g in table],
        "table": list(table),
    }


def equal_strength(curve: dict[float, float], value: float) -> float | None:
    """The w at which ``curve`` (chroma by w) reaches ``value``, linear in between; None outside of it."""
    points = sorted(curve.items())
    for (w, low), (v, high) in itertools.pairwise(points):
        if min(low, high) <= value <= max(low, high) and high != low:
            return round(w + (v - w) * (value - low) / (high - low), 2)
    return None


class Measurer:
    """Samples every (gain or CFG, steps, w, noise set) once, and measures it.

    Args:
        guide: folder of the guide; its own gain is replaced.
        table: the gain g(t) that matches lengths.
        images: images per noise set.
        seeds: number of noise sets.
        device: ``cpu`` or ``cuda``, float32 on both.
        base: the base or a fine-tune, whose captions and U-Net are used.
    """

    def __init__(
        self, guide: Path, table: Sequence[float], cache: Path, judge: Path, images: int, seeds: int, device: str,
        batch: int, extract: Any = None, base: str = TEACHER,
    ) -> None:  # fmt: skip
        self.batch, self.seeds, self.images = batch, seeds, images
        self.steps = STEPS if base == TEACHER else TUNED_STEPS
        self.head, self.extract = AlignmentHead.load(judge), extract or FeatureExtractor(device)
        self.sampler = Sampler(resolve(TEACHER).folder, device=device)
        self.unet = resolve(base).unet().to(device)
        self.guide, self.gains = load_guide(str(guide)).to(device), gains(table)
        self.rows = captions("train" if base == TEACHER else base, images)
        pixels = real_images(self.rows, cache)
        self.real = Shots(pixels, self.extract(pixels))
        self._shots: dict[tuple[str, int, float], list[Shots]] = {}

    def cells(self) -> list[tuple[str, int, float]]:
        return [(name, steps, w) for name in (CFG, *self.gains) for w in self.steps for steps in self.steps[w]]

    def sample(self) -> None:
        cells = self.cells()
        for name in (CFG, *self.gains):
            if name != CFG:
                self.guide.use_gain(self.gains[name])
            network = Network(self.unet, None if name == CFG else self.guide, FLOAT32, False, self.batch)
            for _, steps, w in tqdm([cell for cell in cells if cell[0] == name], desc=name):
                how, schedule = Guidance(CFG if name == CFG else "guided", w), self.sampler.schedule(steps)
                noise_sets = []
                for seed in range(self.seeds if w == 3.0 else 1):
                    rows = [Ask(a.concept, a.style, a.seed + SEED_STRIDE * seed) for a in self.rows]
                    pixels = self.sampler.draw(rows, network, how, schedule, self.batch)
                    noise_sets.append(Shots(pixels, self.extract(pixels)))
                self._shots[name, steps, w] = noise_sets

    def ranked(self, cell: tuple[str, int, float]) -> list[Ranked]:
        return [Ranked.of(s, [a.concept for a in self.rows], self.head) for s in self._shots[cell]]

    def about(self, cell: tuple[str, int, float]) -> dict[str, Any]:
        """Measures of a cell; with a guide also its comparison with CFG of the same steps, w, captions and noise."""
        name, steps, w = cell
        mine = self.ranked(cell)
        row = {"gain": name, "steps": steps, "w": w, "seeds": len(mine), **compare.quality(self.real, mine)}
        row["chroma"] = round(float(np.mean([chroma(s.shots.pixels) for s in mine])), 4)
        if name != CFG:
            teacher = self.ranked((CFG, steps, w))
            row |= {
                "gain_over_cfg": compare.gain(self.real, teacher, mine),
                "distance_to_cfg": compare.distance(mine, teacher),
            }
        return row


def measure(
    guide: Path, table: Sequence[float], cache: Path, judge: Path, results: Path, *, images: int = 512,
    seeds: int = 3, device: str = "cpu", batch: int = 64, processes: int = 1, command: str = "", extract: Any = None,
    base: str = TEACHER,
) -> dict[str, Any]:  # fmt: skip
    """Sample and measure all gains; write the record to ``results`` and return it."""
    facts, begun = machine(command), time.monotonic()
    measurer = Measurer(guide, table, cache, judge, images, seeds, device, batch, extract, base)
    measurer.sample()
    rows = spread(measurer.about, measurer.cells(), processes, "measuring")
    strength = {r["w"]: r["chroma"] for r in rows if (r["gain"], r["steps"]) == (CFG, EVERY_W)}
    for row in rows:
        if row["gain"] != CFG and row["steps"] == EVERY_W:
            row["w_of_equal_chroma"] = equal_strength(strength, row["chroma"])
    document = {
        "schema": SCHEMA,
        "provenance": facts | {"guide_sha256": {p.name: sha256(p) for p in sorted(guide.glob("*.safetensors"))}},
        "settings": {
            "base": base, "images": images, "seeds": seeds, "device": device, "batch": batch, "sampler": "DDIM, eta 0",
            "gains": measurer.gains, "seconds": round(time.monotonic() - begun, 1),
        },
        "real": recalls(measurer.head.ranks(measurer.real.features, [a.concept for a in measurer.rows]))
        | {"chroma": chroma(measurer.real.pixels)},
        "cells": rows,
    }  # fmt: skip
    write_json(results, document)
    return document


# ------------------------------------------------------------------------------------------------------- page


def finding(rows: Sequence[dict[str, Any]]) -> str:
    """Sentence on whether the guide needs a gain: the settings in which its KID without one is worse than CFG's."""
    plain = [r for r in rows if r["gain"] == PLAIN]
    worse = [r for r in plain if not r["gain_over_cfg"]["no_worse"]]
    if not worse:
        return (
            "Without a gain, the guide's KID is shown to be worse than CFG's in none of the "
            f"{len(plain)} settings measured, so this guide needs no gain."
        )
    return (
        "Without a gain, the guide's KID is worse than CFG's at "
        + "; ".join(f"w = {r['w']:g}, {r['steps']} steps" for r in worse)
        + "."
    )


def _made_by(document: dict[str, Any], path: Path) -> str:
    stated = document["provenance"]
    device = stated["device"]["gpu"] or stated["device"]["processor"]
    return (
        f"`{path}`, which was made by `{stated['command']}` ({stated['date'][:10]}, {device}, torch "
        f"{stated['versions']['torch']})"
    )


def tables(document: dict[str, Any], level: str) -> list[str]:
    """One table for each number of steps, under headings of this level."""
    lines = []
    for steps in sorted({r["steps"] for r in document["cells"]}, reverse=True):
        lines += [
            f"{level} {steps} steps",
            "",
            "| gain | w | KID ↓ | KID gain over CFG ↑ | R@1, % ↑ | R@1 gain over CFG, points ↑ "
            "| PSNR to CFG's image, dB ↑ | chroma | CFG's w of equal chroma |",
            "|---|---:|---|---|---|---|---:|---:|---:|",
        ]
        for r in (r for r in document["cells"] if r["steps"] == steps):
            kid, recall = r["kid"], r["R@1"]
            over, points, psnr, equal = "–", "–", "–", "–"
            if r["gain"] != CFG:
                g, h = (r["gain_over_cfg"][k] for k in ("kid", "R@1"))
                over = f"{g['value']:+.4f} [{g['low']:+.4f}, {g['high']:+.4f}]"
                points = f"{100 * h['value']:+.1f} [{100 * h['low']:+.1f}, {100 * h['high']:+.1f}]"
                psnr = f"{r['distance_to_cfg']['psnr_db']['value']:.1f}"
                equal_w = r.get("w_of_equal_chroma")
                equal = "–" if equal_w is None else f"{equal_w:g}"
            name = "CFG" if r["gain"] == CFG else "no gain" if r["gain"] == PLAIN else r["gain"]
            lines.append(
                f"| {name} | {r['w']:g} | {kid['value']:.4f} [{kid['low']:.4f}, {kid['high']:.4f}] | {over} |"
                f" {100 * recall['value']:.1f} | {points} | {psnr} | {r['chroma']:.4f} | {equal} |"
            )
        lines.append("")
    return lines


def page(document: dict[str, Any], tuned: Sequence[dict[str, Any]] = ()) -> str:
    """Render the record of the base, and those of fine-tunes, as ``docs/gain.md``."""
    settings = document["settings"]
    seeds = settings["seeds"]
    noises = "one set of noise" if seeds == 1 else f"w = 3 has {seeds} sets of noise, the others one"
    intro = (
        "A guide trained by least squares changes the prediction in the right direction, but by too little. A gain "
        "g(t) in the guide's config scales its residuals at no cost. `pnp-trt distill gain` fits a table of g(t) with "
        "which the change is as long as the teacher's. This page compares the bundled tiny guide without a gain, with "
        "constant gains, with a table and with the square root of the table, on "
        f"{settings['images']} trained captions; {noises}. "
        "Intervals are 95 %. The gains in KID and R@1 are relative to CFG with the same w, steps, captions and noise, "
        "and paired; above 0 is better than CFG. The last column is the w at which CFG's images have the same chroma; "
        "it means little where chroma hardly depends on w."
    )
    lines = [
        "# The gain of a guide's residuals",
        "",
        f"Written by `python -m benchmarks.emoji.gains report` from {_made_by(document, RESULTS)}.",
        "",
        intro,
        "",
        finding(document["cells"]),
        "",
        "The table, from t = 0 to 999: " + ", ".join(f"{g:.2f}" for g in settings["gains"]["table"]) + ".",
        "",
        *tables(document, "##"),
    ]
    for other in tuned:
        base = other["settings"]["base"]
        lines += [
            f"## In {base}",
            "",
            f"The base's guide and gains in a fine-tune, compared with the fine-tune's own CFG on "
            f"{other['settings']['images']} of its captions: {_made_by(other, results_of(base))}.",
            "",
            *tables(other, "###"),
        ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.emoji.gains", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    what = parser.add_subparsers(dest="what", required=True)
    one = what.add_parser("measure")
    one.add_argument("--guide", default="emoji-tiny", help="name or folder")
    one.add_argument("--table", help="values from t = 0 to 999, separated by commas; default: fit it first")
    add_sampling_options(one, "number of images of trained captions for each row", 64)
    one.add_argument("--base", choices=(TEACHER, *FINE_TUNES), default=TEACHER)
    one.add_argument("--json", type=Path, help="default: by the base, in benchmarks/results")
    one.add_argument("--seeds", type=int, default=3)
    one.add_argument("--processes", type=int, default=1)
    two = what.add_parser("report")
    two.add_argument("--json", type=Path, default=RESULTS)
    two.add_argument("--document", type=Path, default=Path("docs/gain.md"))
    a = parser.parse_args(arguments)
    if a.what == "report":
        tuned = [read(path) for path in map(results_of, FINE_TUNES) if path.is_file()]
        a.document.write_text(page(read(a.json), tuned))
        return
    try:
        folder = guide_folder(a.guide)
        table = fitted(a.guide) if a.table is None else [float(v) for v in a.table.split(",")]
        words = ["python", "-m", "benchmarks.emoji.gains", "measure", "--guide", folder.name]
        words += ["--table", ",".join(f"{g:g}" for g in table), "--images", str(a.images), "--seeds", str(a.seeds)]
        words += ["--base", a.base] if a.base != TEACHER else []
        words += ["--device", a.device, "--batch", str(a.batch)] if a.device != "cpu" else []
        measure(
            folder, table, a.cache, a.judge, a.json or results_of(a.base), images=a.images, seeds=a.seeds,
            device=a.device, batch=a.batch, processes=a.processes, command=shlex.join(words), base=a.base,
        )  # fmt: skip
    except (InputError, ValueError) as error:
        parser.error(str(error))


def fitted(guide: str) -> list[float]:
    """The table that ``pnp-trt distill gain`` fits for a guide."""
    from pnp_trt.distill.gain import GainConfig, fit

    with tempfile.TemporaryDirectory(prefix="pnp-trt-gain-") as folder:
        return list(fit(GainConfig(guide, Path(folder) / "guide"))["gain"])


if __name__ == "__main__":
    main()
