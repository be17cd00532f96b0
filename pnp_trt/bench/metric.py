"""Definition of an image metric: how to compute it, and how tables, charts and comparisons present it.

The fidelity part of ``pnp-trt bench`` computes every registered metric whose inputs are available.  Reports and
comparisons take label, unit, decimals and direction from here, and values from the document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..registry import Registry

if TYPE_CHECKING:
    from .metrics.fidelity import AlignmentHead, Estimate


@dataclass(frozen=True)
class Images:
    """A set of N images and what to compare it with; anything unavailable is None.

    Attributes:
        pixels: uint8 ``[N, H, W, 3]``.
        prompts: the prompt of each image.
        extracted: outputs of the feature extractors for each image, ``[N, …]``: ``features`` (EfficientNet),
            ``inception``, ``clip`` (scores); only those whose weights are available.
        concepts: the concept that each prompt names, for the alignment judge.
        cfg: images of classifier-free guidance at the same w and steps.
        best_cfg: images of classifier-free guidance at the same w and the largest number of steps.
        real: EfficientNet features of real images, float32 ``[M, 1280]``.
        real_inception: returns Inception features of the real images.
        judge: returns the alignment judge.
    """

    pixels: np.ndarray
    prompts: tuple[str, ...]
    extracted: Mapping[str, np.ndarray]
    concepts: tuple[str, ...] | None = None
    cfg: Images | None = None
    best_cfg: Images | None = None
    real: np.ndarray | None = None
    real_inception: Callable[[], np.ndarray] | None = None
    judge: Callable[[], AlignmentHead] | None = None

    @property
    def users_weights(self) -> bool:
        """Whether the user supplied Inception or CLIP weights, which replace the bundled extractor."""
        return "inception" in self.extracted or "clip" in self.extracted


@dataclass(frozen=True)
class Metric:
    """A metric of images.

    Attributes:
        key: key in the fidelity rows of a results document.
        label: short name.
        higher_is_better: its direction.
        compute: returns the metric of a set of images with its 95 % interval; None if its inputs are missing.
        description: one clause.
        unit: unit of a value times ``scale``; empty for none.
        decimals: decimals in tables of a value times ``scale``.
        scale: factor from the document's value to the unit.
        signed: whether tables write a plus sign.
        quality: whether it measures the images' own quality rather than their similarity to the teacher's.
        axis: whether charts may use it as an axis; if several do, quality metrics come first.
        short: whether the terminal's table shows it.
    """

    key: str
    label: str
    higher_is_better: bool
    compute: Callable[[Images], Estimate | None]
    description: str
    unit: str = ""
    decimals: int = 3
    scale: float = 1
    signed: bool = False
    quality: bool = False
    axis: bool = False
    short: bool = False

    @property
    def name(self) -> str:
        """Label and unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def head(self) -> str:
        """Column heading: label, unit, direction."""
        return f"{self.name} {'↑' if self.higher_is_better else '↓'}"

    @property
    def axis_title(self) -> str:
        """Title of a chart axis."""
        return f"{self.name}, {'↑' if self.higher_is_better else '↓'} is better"


#: metrics by key, in the order of tables
METRICS: Registry[Metric] = Registry(
    "metrics",
    "metric",
    {
        key: f"pnp_trt.bench.metrics.definitions:{key.upper()}"
        for key in (
            *("kid", "r_at_1", "psnr_to_cfg_db", "fid_inception", "clip_score"),
            *("kid_gain_over_cfg", "r_at_5", "feature_cosine_to_cfg"),
        )
    },
)


def axis_metrics() -> list[Metric]:
    """Metrics that charts may use as an axis, quality metrics first."""
    return sorted((m for m in METRICS.values() if m.axis), key=lambda m: not m.quality)


def judges_quality(row: Mapping[str, object]) -> bool:
    """Whether a fidelity row has a metric of the images' own quality."""
    return any(row.get(metric.key) for metric in METRICS.values() if metric.quality)
