"""Feature extractors: EfficientNet with the alignment judge, and user-supplied Inception and CLIP weights."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle.store import cached_sha256
from ..plan import Plan
from .fidelity import EXTRACTOR_SHA256, AlignmentHead
from .tasks import JUDGE

#: number of images in the trial for the estimate
_TRIAL = 4


class Eyes:
    """The feature extractors of a plan; None if not requested or if their package is not installed.

    Raises:
        InputError: for weights that cannot be read, or that belong to another network.
    """

    def __init__(self, plan: Plan) -> None:
        self.efficientnet: Callable[[np.ndarray], np.ndarray] | None = None
        self.inception: Callable[[np.ndarray], np.ndarray] | None = None
        self.clip: Callable[[np.ndarray, Sequence[str]], np.ndarray] | None = None
        self.key: list[Any] = []
        if importlib.util.find_spec("efficientnet_lite_pytorch") is not None:
            from .fidelity import FeatureExtractor

            self.efficientnet = FeatureExtractor()
            self.key.append(EXTRACTOR_SHA256)
        if plan.inception is not None:
            from .inception import Inception

            self.inception = Inception(Path(plan.inception))
            self.key.append(cached_sha256(Path(plan.inception)))
        if plan.clip is not None:
            from .clip import ClipScorer

            self.clip = ClipScorer(Path(plan.clip))
            self.key.append([cached_sha256(p) for p in sorted(Path(plan.clip).glob("*.safetensors"))])

    @cached_property
    def judge(self) -> AlignmentHead:
        """The frozen alignment judge."""
        return AlignmentHead.load(JUDGE)

    def pace(self, size: tuple[int, int]) -> float:
        """Measure the seconds that feature extraction takes per image of ``size``, in a short trial."""
        trial = np.zeros((_TRIAL, *size, 3), np.uint8)
        start = time.perf_counter()
        self.look(trial, [""] * _TRIAL)
        return (time.perf_counter() - start) / _TRIAL

    def look(self, pixels: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Return ``features``, ``inception`` and ``clip`` (scores) of images ``[N, H, W, 3]``, as far as available."""
        features = {}
        if self.efficientnet is not None:
            features["features"] = self.efficientnet(pixels)
        if self.inception is not None:
            features["inception"] = self.inception(pixels)
        if self.clip is not None:
            features["clip"] = self.clip(pixels, prompts)
        return features
