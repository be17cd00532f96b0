"""Inputs of the fidelity part: captions and seeds, with the real images' features and concepts for the metrics."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...assets import ROOT
from ...bundle.store import digest, sha256
from ...errors import InputError
from ...io.image_files import SUFFIXES, ImageError, read_rgb
from ..plan import IMAGES, IMAGES_UNJUDGED, Plan

#: prompts of the image grid and of the timed loop, for any base
PROMPTS = (
    "red apple", "red heart", "automobile", "tulip", "house", "cactus", "ghost", "mushroom",
    "grinning face", "crown", "banana", "strawberry", "tangerine", "balloon", "tomato", "star",
)  # fmt: skip
STYLES = ("noto", "twemoji")
#: columns of the image grid
COLUMNS = 8
#: the base model whose real images' features are bundled
BUNDLED = "emoji"
FEATURES = ROOT / "emoji" / "real-features.safetensors"
JUDGE = ROOT / "judge.safetensors"

#: features ``[N, D]`` of uint8 images ``[N, H, W, 3]``
Extract = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Task:
    """What to generate.

    Attributes:
        prompts, seeds: of the measured images, N each.
        columns: short names of the grid's images.
        shown, shown_seeds: prompts and seeds of the grid's images, which are not measured.
        source: description of where the prompts come from.
        concepts: the concept that each prompt names, for the alignment judge; None if the judge has no captions for
            them.
        real: float32 ``[M, 1280]``, EfficientNet features of real images; None if there are none.
        real_folder: folder of real images whose features are not computed yet; None if there is none.
        reason: why the quality of the images cannot be measured; None if it can.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    columns: tuple[str, ...]
    shown: tuple[str, ...]
    shown_seeds: tuple[int, ...]
    source: str
    concepts: tuple[str, ...] | None = None
    real: np.ndarray | None = None
    real_folder: Path | None = None
    reason: str | None = None

    @property
    def key(self) -> str:
        """A digest of the images to generate."""
        return digest([self.prompts, self.seeds, self.shown, self.shown_seeds])


def make_task(plan: Plan, base: str) -> Task:
    """Return the task of a plan, for engines of the base model named ``base``.

    Raises:
        InputError: for a prompts file without prompts, a folder without images, or more images than there are bundled
            captions.
    """
    if plan.prompts is not None:
        return _named(plan, Path(plan.prompts))
    grid = tuple(f"{p}, {STYLES[0]} style" for p in PROMPTS[:COLUMNS])
    if base == BUNDLED:
        return _bundled(plan, grid)
    texts = [f"{p}, {style} style" for style in STYLES for p in PROMPTS]
    prompts, seeds = _repeat(texts, plan.images or IMAGES_UNJUDGED)
    reason = (
        f"no real images are bundled for the base model '{base}'; name prompts and real images with "
        "--prompts FILE --real DIR"
    )
    if plan.clip is not None:
        reason = ""
    return Task(prompts, seeds, PROMPTS[:COLUMNS], grid, tuple(range(COLUMNS)), "the bundled demonstration prompts",
                reason=reason or None)  # fmt: skip


def _bundled(plan: Plan, grid: tuple[str, ...]) -> Task:
    features, rows, _ = read_features(FEATURES)
    count = plan.images or IMAGES
    if count > len(rows):
        raise InputError(f"images is {count}, but only {len(rows)} bundled captions have real images; choose fewer")
    concepts, styles, seeds = (tuple(column) for column in zip(*rows[:count], strict=True))
    prompts = tuple(f"{c.replace('-', ' ')}, {s} style" for c, s in zip(concepts, styles, strict=True))
    return Task(prompts, seeds, PROMPTS[:COLUMNS], grid, tuple(range(COLUMNS)), "captions that the base was trained on",
                concepts, features[:count])  # fmt: skip


def _named(plan: Plan, file: Path) -> Task:
    from ...models.prompts import read_prompts

    texts = read_prompts(file)
    prompts, seeds = _repeat(texts, plan.images or (IMAGES if plan.real else IMAGES_UNJUDGED))
    shown = tuple(prompts[:COLUMNS])
    reason = None
    if plan.real is None and plan.clip is None:
        reason = f"no real images were named for the prompts of {file.name}; name them with --real DIR"
    folder = None if plan.real is None else Path(plan.real)
    if folder is not None:
        find_real(folder)
    return Task(prompts, seeds, shown, shown, seeds[:COLUMNS], file.name, real_folder=folder, reason=reason)


def _repeat(texts: Sequence[str], count: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Cycle through ``texts`` for ``count`` prompts, each with a different seed."""
    return tuple(texts[i % len(texts)] for i in range(count)), tuple(range(count))


def read_features(path: Path) -> tuple[np.ndarray, list[tuple[str, str, int]], dict[str, Any]]:
    """Return the real images' features float32 ``[N, 1280]``, their (concept, style, seed), and the file's metadata.

    Raises:
        InputError: if the file cannot be read, or was created with another extractor.
    """
    from safetensors import SafetensorError, safe_open

    from .fidelity import EXTRACTOR_SHA256

    try:
        with safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            features = file.get_tensor("features").astype(np.float32)
        rows = [(str(c), str(s), int(seed)) for c, s, seed in json.loads(about["captions"])]
    except (OSError, SafetensorError, KeyError, ValueError) as e:
        raise InputError(f"{path} has no valid features of real images ({e}); reinstall pnp-trt") from e
    if about.get("extractor_sha256") != EXTRACTOR_SHA256 or len(rows) != len(features):
        raise InputError(
            f"{path} was created with another extractor; recreate it: python -m benchmarks.emoji.real_features"
        )
    return features, rows, about


def find_real(folder: Path) -> list[Path]:
    """Return the images under a folder, sorted.

    Raises:
        InputError: if there are fewer than two.
    """
    images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if len(images) < 2:
        raise InputError(f"--real {folder} holds {len(images)} images ({', '.join(SUFFIXES)}); at least 2 are needed")
    return images


def real_key(folder: Path) -> str:
    """Return a digest of a folder's images."""
    return digest([sha256(p) for p in find_real(folder)])


def real_features(folder: Path, extract: Extract) -> np.ndarray:
    """Return features ``[M, D]`` of a folder's images, each at its own size; skip unreadable ones with a warning.

    Raises:
        InputError: if fewer than two can be read.
    """
    rows, bad = [], []
    for path in find_real(folder):
        try:
            pixels = read_rgb(path)
        except ImageError as e:
            bad.append(f"{path.name} ({e.reason})")
            continue
        rows.append(extract(pixels[None])[0])
    if bad:
        warnings.warn(
            f"{len(bad)} files of {folder} cannot be read and are left out: {', '.join(bad[:5])}", stacklevel=2
        )
    if len(rows) < 2:
        raise InputError(f"--real {folder} holds {len(rows)} images that can be read; at least 2 are needed")
    return np.stack(rows)
