"""Images with their features, the artists' own images, and measurements on both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pnp_trt.bench.metrics import fidelity
from pnp_trt.bench.metrics.fidelity import AlignmentHead, FeatureExtractor

from .data import BASE_STYLES, FINE_TUNE_STYLES, images, split
from .sampler import Ask

#: same as in the ``cpu`` preset, so that its cache is used
VARIANTS = 5


@dataclass
class Shots:
    """Images and their features, cached in one ``.npz`` that is written only when complete."""

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


def real_images(rows: Sequence[Ask], cache: Path, turn: int | None = 0) -> np.ndarray:
    """The artists' images of the captions, jittered as in training; each ``turn`` selects a different jitter.

    With ``turn=None`` they are centred.
    """
    variants_of: dict[tuple[str, str], np.ndarray] = {}
    # the same sets as in training, so that its cache is used
    for group in (BASE_STYLES, *((style,) for style in FINE_TUNE_STYLES)):
        for part in split().values():
            words = {s.word for s in group}
            if not any(a.style in words and a.concept in part for a in rows):
                continue
            shots = images(group, part, cache, VARIANTS)
            for i in range(0, len(shots), VARIANTS):
                variants_of[shots.concepts[i], shots.styles[i]] = shots.pixels[i : i + VARIANTS]
    which = [0 if turn is None else 1 + (i + turn) % (VARIANTS - 1) for i in range(len(rows))]
    return np.stack([variants_of[a.concept, a.style][v] for a, v in zip(rows, which, strict=True)])


def chroma(pixels: np.ndarray) -> float:
    """Mean strength of colour, 0 (grey) to 1: the spread of each pixel's channels; strong guidance oversaturates."""
    return round(float(np.ptp(pixels.astype(np.int16), axis=-1).mean() / 255), 4)


def recalls(ranks: np.ndarray) -> dict[str, Any]:
    return {f"R@{k}": fidelity.recall(ranks, k).as_dict() for k in (1, 5)}


def measure(real: Shots, shots: Shots, rows: Sequence[Ask], head: AlignmentHead) -> dict[str, Any]:
    """EfficientNet-KID and alignment of one set, with the rank of every image."""
    ranks = head.ranks(shots.features, [a.concept for a in rows])
    out: dict[str, Any] = {"kid": fidelity.kid(real.features, shots.features).as_dict(), **recalls(ranks)}
    out["chroma"] = chroma(shots.pixels)
    known = set(json.loads(head.about.get("drawn", "[]")))
    drawn = np.array([a.concept in known for a in rows])
    if 2 <= drawn.sum() < len(rows):
        out["drawn_by_the_judges_styles"] = recalls(ranks[drawn])
    return {**out, "ranks": ranks.tolist()}


def add_gains(real: Shots, at: dict[float, Shots], by_w: dict[str, Any]) -> None:
    """Add to each w its gain over w = 1 on the same captions and noise (paired intervals)."""
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
    """Scores of real images: the ceiling of alignment, and the KID between two sets of real images."""
    out = measure(real, again, rows, head)
    out["kid_same_captions_other_jitter"] = out.pop("kid")
    if len(rows) >= 4:
        out["kid_other_captions"] = fidelity.kid(real.features[::2], again.features[1::2]).as_dict()
    by_style = {}
    for style in sorted({a.style for a in rows}):
        mine = np.array([a.style == style for a in rows])
        if mine.sum() >= 2:
            by_style[style] = recalls(np.array(out["ranks"])[mine])
    return {**out, "by_style": by_style}


def verdict(by_w: dict[str, Any]) -> dict[str, Any]:
    """Whether some w beats w = 1: by the paired interval, and with disjoint intervals."""
    out: dict[str, Any] = {}
    for name, better in (("kid", min), ("R@1", max), ("R@5", max)):
        best = better(by_w, key=lambda w: by_w[w][name]["value"])
        one, top = by_w["1"][name], by_w[best][name]
        apart = top["high"] < one["low"] if better is min else top["low"] > one["high"]
        gain = by_w[best].get("gain_over_w1", {}).get(name)
        out[name] = {"best_w": float(best), "gain": gain, "helps": bool(gain and gain["low"] > 0), "apart": bool(apart)}
    return out
