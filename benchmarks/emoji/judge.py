"""Train the judge: the frozen alignment head that scores whether an image matches its caption.

It is trained only on the ``JUDGE_STYLES``, which no model here generates, so not on evaluated images.  Those sets are
older than the concepts and lack about 170 of the 584.  The meaning of such words comes only from MiniLM, so all other
images of these sets are trained on too; the ceiling of real images is reported with every figure.
``python -m benchmarks.emoji.judge`` trains it in minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pnp_trt.bench.metrics.fidelity import (
    EXTRACTOR,
    EXTRACTOR_SHA256,
    AlignmentHead,
    FeatureExtractor,
    recall,
    write_head,
)

from .data import BASE_STYLES, JUDGE_STYLES, Images, Style, caption, icons, images, split
from .text import MINILM, MiniLM

#: images that show no things: flags and signs, and variants that differ only in skin tone or profession
SKIP = re.compile(
    r"skin-tone|^flag|letter|keycap|digit|-thirty|clock|button$|^(man|woman|men|women|person|people|family|couple|kiss)-"
)
#: mean difference, in grey levels, below which two artists' images of a concept count as copies
SAME_DRAWING = 3.0
VARIANTS = 3


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of the head, chosen by training on one judge style and testing on the other."""

    hidden: int = 256
    text_hidden: int = 256
    width: int = 128
    steps: int = 600
    batch: int = 512
    lr: float = 1e-3
    weight_decay: float = 0.1
    dropout: float = 0.3
    text_dropout: float = 0.3
    temperature: float = 0.05
    seed: int = 0


def concepts() -> list[str]:
    """Concepts of all splits, which are the judge's candidates."""
    parts = split()
    return [c for part in ("train", "held_out", "held_out_colour_shape") for c in parts[part]]


def features(shots: Images, cache: Path, extract: FeatureExtractor | None = None) -> np.ndarray:
    """EfficientNet features ``[N, 1280]``, computed once per set of images."""
    key = hashlib.sha256(shots.pixels.tobytes() + EXTRACTOR_SHA256.encode()).hexdigest()[:16]
    path = cache / f"features-{key}.npy"
    if not path.exists():
        values = (extract or FeatureExtractor())(shots.pixels)
        partial = path.with_suffix(".part.npy")
        np.save(partial, values)
        partial.replace(path)
    return np.load(path)


def _modern(name: str, known: set[str]) -> str:
    """Current name of a concept: the old sets have "lion-face" where Unicode now has "lion"."""
    plain = name.removesuffix("-face")
    return plain if name not in known and plain in known else name


def _copies(style: Style, names: list[str], cache: Path) -> set[str]:
    """Names whose image is (nearly) a copy of a base style's, on which the judge must not be trained."""
    own = images((style,), names, cache)
    copied = set()
    for base in BASE_STYLES:
        theirs = images((base,), names, cache)
        at = {c: i for i, c in enumerate(theirs.concepts)}
        for i, c in enumerate(own.concepts):
            if c in at:
                gap = np.abs(own.pixels[i].astype(int) - theirs.pixels[at[c]].astype(int)).mean()
                if gap < SAME_DRAWING:
                    copied.add(c)
    return copied


def training_images(style: Style, cache: Path) -> Images:
    """The jittered images of a judge style, with current concept names."""
    known = set(concepts())
    names = sorted(n for n in icons(style, cache) if not SKIP.search(n))
    copies = _copies(style, names, cache)
    shots = images((style,), [n for n in names if n not in copies], cache, VARIANTS)
    return Images(shots.pixels, [_modern(c, known) for c in shots.concepts], shots.styles)


def _tower(sizes: tuple[int, ...], dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [*([nn.ReLU()] if layers else []), nn.Dropout(dropout), nn.Linear(i, o)]
    return nn.Sequential(*layers)


def fit(x: np.ndarray, names: list[str], embed: dict[str, np.ndarray], recipe: Recipe) -> dict[str, np.ndarray]:
    """Train both towers with InfoNCE on features ``x`` ``[N, 1280]`` of images of the concepts ``names``.

    A batch has one image of each of its concepts, so that every other row is a true negative.
    """
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    unique = sorted(set(names))
    rows: dict[str, list[int]] = {c: [] for c in unique}
    for i, c in enumerate(names):
        rows[c].append(i)
    texts = np.stack([embed[c] for c in unique])
    stats = {"picture.mean": x.mean(0), "picture.spread": x.std(0) + 0.05, "text.mean": texts.mean(0)}
    pixels = torch.from_numpy((x - stats["picture.mean"]) / stats["picture.spread"]).float()
    words = torch.from_numpy(texts - stats["text.mean"]).float() * texts.shape[1] ** 0.5
    hidden = (recipe.hidden,) if recipe.hidden else ()
    text_hidden = (recipe.text_hidden,) if recipe.text_hidden else ()
    towers = nn.ModuleDict(
        {
            "picture": _tower((x.shape[1], *hidden, recipe.width), recipe.dropout),
            "text": _tower((texts.shape[1], *text_hidden, recipe.width), recipe.text_dropout),
        }
    )
    optimiser = torch.optim.AdamW(towers.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, recipe.steps)
    towers.train()
    for _ in range(recipe.steps):
        chosen = rng.permutation(len(unique))[: recipe.batch]
        pick = [rows[unique[c]][rng.integers(len(rows[unique[c]]))] for c in chosen]
        p = F.normalize(towers["picture"](pixels[pick]), dim=-1)
        t = F.normalize(towers["text"](words[chosen]), dim=-1)
        logits = p @ t.T / recipe.temperature
        target = torch.arange(len(chosen))
        loss = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    out = {k: v.astype(np.float32) for k, v in stats.items()}
    for side, tower in towers.items():
        for place, layer in enumerate(m for m in tower if isinstance(m, nn.Linear)):
            out[f"{side}.{place}.weight"] = layer.weight.detach().numpy()
            out[f"{side}.{place}.bias"] = layer.bias.detach().numpy()
    # training used embeddings of unit variance; the stored tower takes MiniLM's unscaled output
    out["text.0.weight"] = out["text.0.weight"] * texts.shape[1] ** 0.5
    return out


def train_judge(cache: Path, out: Path, recipe: Recipe | None = None) -> Path:
    """Train the judge on all ``JUDGE_STYLES``; store it in ``out`` (safetensors, FP16) and its sha256 next to it."""
    recipe = recipe or Recipe()
    extract = FeatureExtractor()
    sets = [training_images(style, cache) for style in JUDGE_STYLES]
    x = np.concatenate([features(shots, cache, extract) for shots in sets])
    names = [c for shots in sets for c in shots.concepts]
    candidates = concepts()
    every = sorted({*names, *candidates})
    embed = dict(zip(every, MiniLM(cache)([caption(c) for c in every]), strict=True))
    tensors = fit(x, names, embed, recipe)
    tensors["captions"] = np.stack([embed[c] for c in candidates])
    return write_head(
        out,
        {k: v.astype(np.float16) for k, v in tensors.items()},
        candidates,
        recipe=json.dumps(vars(recipe)),
        styles=json.dumps([s.package for s in JUDGE_STYLES]),
        drawn=json.dumps(sorted(set(names) & set(candidates))),
        extractor=EXTRACTOR,
        captions_from=MINILM,
    )


def ceiling(judge: Path, cache: Path) -> dict[str, dict[str, object]]:
    """R@1 and R@5 of the real base-style images, on which the judge was not trained."""
    head = AlignmentHead.load(judge)
    out: dict[str, dict[str, object]] = {}
    for style in BASE_STYLES:
        shots = images((style,), concepts(), cache)
        ranks = head.ranks(features(shots, cache), shots.concepts)
        out[style.word] = {f"R@{k}": recall(ranks, k).as_dict() for k in (1, 5)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("build/emoji"), help="downloads, images and features")
    parser.add_argument("--out", type=Path, default=Path("pnp_trt/assets/judge.safetensors"))
    args = parser.parse_args()
    path = train_judge(args.cache, args.out)
    print(path, path.stat().st_size, AlignmentHead.load(path).sha256)
    print(json.dumps(ceiling(path, args.cache), indent=1))


if __name__ == "__main__":
    main()
