"""The bundled metrics: inputs, computation and presentation."""

from __future__ import annotations

from ..metric import Images, Metric
from . import fidelity
from .fidelity import Estimate


def _kid(images: Images) -> Estimate | None:
    if images.users_weights or images.real is None or "features" not in images.extracted:
        return None
    return fidelity.kid(images.real, images.extracted["features"])


def _kid_gain(images: Images) -> Estimate | None:
    if images.users_weights or images.real is None or "features" not in images.extracted or images.best_cfg is None:
        return None
    return fidelity.kid_gain(images.real, images.best_cfg.extracted["features"], images.extracted["features"])


def _recall(images: Images, k: int) -> Estimate | None:
    if images.users_weights or images.concepts is None or images.judge is None or "features" not in images.extracted:
        return None
    return fidelity.recall(images.judge().ranks(images.extracted["features"], images.concepts), k)


def _fid(images: Images) -> Estimate | None:
    from .inception import frechet

    if "inception" not in images.extracted or images.real_inception is None:
        return None
    return frechet(images.real_inception(), images.extracted["inception"])


def _clip_score(images: Images) -> Estimate | None:
    return fidelity.mean(images.extracted["clip"]) if "clip" in images.extracted else None


def _psnr(images: Images) -> Estimate | None:
    return None if images.cfg is None else fidelity.mean(fidelity.psnr(images.pixels, images.cfg.pixels))


def _cosine(images: Images) -> Estimate | None:
    if images.cfg is None or "features" not in images.extracted:
        return None
    return fidelity.mean(fidelity.cosine(images.extracted["features"], images.cfg.extracted["features"]))


KID = Metric(
    "kid", "KID", False, _kid, "EfficientNet-KID to real images of the same captions",
    quality=True, axis=True, short=True,
)  # fmt: skip
R_AT_1 = Metric(
    "r_at_1", "R@1", True, lambda images: _recall(images, 1), "share of images whose concept the judge ranks first",
    unit="%", decimals=0, scale=100, quality=True, short=True,
)  # fmt: skip
PSNR_TO_CFG_DB = Metric(
    "psnr_to_cfg_db", "PSNR to CFG", True, _psnr, "to the images of CFG at the same w, steps and seeds",
    unit="dB", decimals=1, axis=True, short=True,
)  # fmt: skip
FID_INCEPTION = Metric(
    "fid_inception", "FID", False, _fid, "Fréchet Inception distance to real images",
    decimals=2, quality=True, axis=True, short=True,
)  # fmt: skip
CLIP_SCORE = Metric(
    "clip_score", "CLIP score", True, _clip_score, "100 times the cosine of image and prompt in CLIP's space",
    decimals=2, quality=True, short=True,
)  # fmt: skip
KID_GAIN_OVER_CFG = Metric(
    "kid_gain_over_cfg", "KID gain over CFG", True, _kid_gain,
    "CFG's KID at the largest number of steps minus this one, paired", signed=True,
)  # fmt: skip
R_AT_5 = Metric(
    "r_at_5", "R@5", True, lambda images: _recall(images, 5),
    "share of images whose concept is among the judge's first five", unit="%", decimals=0, scale=100, quality=True,
)  # fmt: skip
FEATURE_COSINE_TO_CFG = Metric(
    "feature_cosine_to_cfg", "feature cosine to CFG", True, _cosine,
    "of EfficientNet features, to the images of CFG at the same w, steps and seeds",
)  # fmt: skip
