"""A metric: mean colourfulness of the images (Hasler and Süsstrunk 2003, equation for M̂⁽³⁾)."""

import numpy as np

from pnp_trt.bench.metric import Images, Metric
from pnp_trt.bench.metrics.fidelity import Estimate, mean


def colourfulness(pixels: np.ndarray) -> np.ndarray:
    """Return the colourfulness ``[N]`` of images, uint8 ``[N, H, W, 3]``."""
    red, green, blue = np.moveaxis(pixels.astype(np.float64), -1, 0)
    opponents = np.stack([red - green, (red + green) / 2 - blue])
    spread = np.sqrt(opponents.var(axis=(2, 3)).sum(0))
    return spread + 0.3 * np.sqrt((opponents.mean(axis=(2, 3)) ** 2).sum(0))


def compute(images: Images) -> Estimate:
    return mean(colourfulness(images.pixels))


COLOURFULNESS = Metric(
    "colourfulness", "colourfulness", True, compute, "Hasler and Süsstrunk 2003", decimals=1, short=True
)
