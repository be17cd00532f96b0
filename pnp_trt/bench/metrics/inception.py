"""The standard FID, computed with user-supplied Inception weights; none are bundled or downloaded.

Two kinds of weights are distinguished by their classifier: those of FID's own network (Heusel et al. 2017; 1,008
classes, as in pytorch-fid and torch-fidelity) and torchvision's ``inception_v3`` (1,000 classes).  The two give
different figures, and so does another method of resizing: compare only figures computed with the same file by this
module.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InputError
from .fidelity import Z95, Estimate, check_features, check_images

if TYPE_CHECKING:
    from torch import Tensor, nn

WIDTH = 2048
SIDE = 299
_FID_CLASSES, _TORCHVISION_CLASSES = 1008, 1000
_DRAWS = 50


def frechet(real: np.ndarray, generated: np.ndarray, *, seed: int = 0, draws: int = _DRAWS) -> Estimate:
    r"""Fréchet distance between Gaussians fitted to features ``[M, D]`` and ``[N, D]`` (Heusel et al. 2017, eq. 6).

    .. math:: |\mu_1 - \mu_2|^2 + \mathrm{tr}(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1 \Sigma_2)^{1/2})

    It is biased upwards for small numbers of images.  The 95 % interval is normal, with the standard deviation of a
    seeded bootstrap over both sets. The bootstrap's percentiles would be too high, as a resample has fewer distinct
    images.
    Raises :class:`InputError` for fewer than 2 images, non-finite values, or different widths.
    """
    x = check_features(real, "real features", least=2)
    y = check_features(generated, "generated features", least=2, width=x.shape[1])
    value = _distance(x, y)
    rng = np.random.default_rng(seed)
    resampled = [
        _distance(x[rng.integers(0, len(x), len(x))], y[rng.integers(0, len(y), len(y))]) for _ in range(draws)
    ]
    half = Z95 * float(np.std(resampled, ddof=1)) if draws > 1 else float("nan")
    return Estimate(value, value - half, value + half, len(y))


def _distance(x: np.ndarray, y: np.ndarray) -> float:
    factors: list[np.ndarray] = []
    spread = 0.0
    for z in (x, y):
        centred = (z - z.mean(0)) / np.sqrt(len(z) - 1)
        spread += float((centred**2).sum())
        # covariance is factor' · factor; use the smaller of two equivalent factors
        factors.append(centred if len(centred) <= centred.shape[1] else np.asarray(np.linalg.qr(centred, mode="r")))
    # the eigenvalues of Σ₁Σ₂ are the squared singular values of the factors' product
    cross = float(np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum())
    return float(((x.mean(0) - y.mean(0)) ** 2).sum()) + spread - 2 * cross


class Inception:
    """Inception v3 up to its pooled features, with weights of pytorch-fid, torch-fidelity or torchvision.

    Args:
        path: a ``.safetensors`` file with the state dict, under torchvision's names, which the others use as well.

    Raises:
        InputError: if the file is not a safetensors file, or lacks weights of the network.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if path.suffix != ".safetensors":
            raise InputError(
                f"--inception {path.name} is not a .safetensors file, and pickled weights are not read; "
                "save its state dict with safetensors.torch.save_file"
            )
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as e:
            raise InputError(f"--inception {path} is not a readable safetensors file ({e}); download it again") from e
        classes = len(state["fc.weight"]) if "fc.weight" in state else None
        if classes not in (_FID_CLASSES, _TORCHVISION_CLASSES):
            raise InputError(
                f"--inception {path.name} has {classes or 'no'} classes in 'fc.weight'; FID's network has "
                f"{_FID_CLASSES:,} and torchvision's inception_v3 {_TORCHVISION_CLASSES:,}: use one of these"
            )
        network = build(fid=classes == _FID_CLASSES)
        expected = network.state_dict()
        bad = [k for k, v in expected.items() if k not in state or state[k].shape != v.shape]
        if bad := [k for k in bad if not k.endswith("num_batches_tracked")]:
            raise InputError(f"--inception {path.name} is not Inception v3: '{bad[0]}' is missing or has another shape")
        network.load_state_dict({k: state.get(k, v) for k, v in expected.items()})
        self._network = network.eval().requires_grad_(False).float()

    def __call__(self, images: np.ndarray, batch: int = 16) -> np.ndarray:
        """Return features float32 ``[N, 2048]`` of uint8 ``[N, H, W, 3]``, resized to 299 × 299 (bilinear)."""
        import torch
        import torch.nn.functional as F

        images = check_images(images)
        out = []
        with torch.inference_mode():
            for i in range(0, len(images), batch):
                x = torch.from_numpy(np.ascontiguousarray(images[i : i + batch]))
                x = F.interpolate(x.permute(0, 3, 1, 2).float(), (SIDE, SIDE), mode="bilinear", align_corners=False)
                out.append(self._network(x / 127.5 - 1).mean((2, 3)).cpu().numpy())
        return np.concatenate(out)


#: a convolution in a branch of a mixed block: name, channels, kernel, stride; kernels are padded unless strided
_Conv = tuple[str, int, Any, int]


def _branches(kind: str, width: int) -> list[list[_Conv]]:
    """Branches of a block in the order of their concatenation (Szegedy et al. 2016, figures 5 to 7)."""
    wide, high = (1, 7), (7, 1)
    if kind == "A":
        return [
            [("branch1x1", 64, 1, 1)],
            [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 1)],
            [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 1)],
            [("branch_pool", width, 1, 1)],
        ]
    if kind == "B":
        return [
            [("branch3x3", 384, 3, 2)],
            [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 2)],
        ]
    if kind == "C":
        return [
            [("branch1x1", 192, 1, 1)],
            [("branch7x7_1", width, 1, 1), ("branch7x7_2", width, wide, 1), ("branch7x7_3", 192, high, 1)],
            [
                ("branch7x7dbl_1", width, 1, 1), ("branch7x7dbl_2", width, high, 1), ("branch7x7dbl_3", width, wide, 1),
                ("branch7x7dbl_4", width, high, 1), ("branch7x7dbl_5", 192, wide, 1),
            ],
            [("branch_pool", 192, 1, 1)],
        ]  # fmt: skip
    return [
        [("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 2)],
        [
            ("branch7x7x3_1", 192, 1, 1), ("branch7x7x3_2", 192, wide, 1), ("branch7x7x3_3", 192, high, 1),
            ("branch7x7x3_4", 192, 3, 2),
        ],
    ]  # fmt: skip


def build(fid: bool) -> nn.Module:
    """Inception v3 (Szegedy et al. 2016) without classifier, with random weights and torchvision's names.

    Long: the blocks are defined in this function so that importing the module does not import torch.

    Args:
        fid: pool as FID's network does: averages exclude padding, and the last block uses a maximum.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Conv(nn.Module):
        def __init__(self, inside: int, outside: int, kernel: Any, stride: int = 1, padding: Any = 0) -> None:
            super().__init__()
            self.conv = nn.Conv2d(inside, outside, kernel, stride, padding, bias=False)
            self.bn = nn.BatchNorm2d(outside, eps=0.001)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn(self.conv(x)))

    def pool(x: Tensor, largest: bool = False) -> Tensor:
        if largest:
            return F.max_pool2d(x, 3, 1, 1)
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=not fid)

    class Block(nn.Module):
        """Kinds A and C (three branches and a pooled one), and B and D (half the size, with a pooled input)."""

        def __init__(self, kind: str, inside: int, width: int = 0) -> None:
            super().__init__()
            self.smaller = kind in "BD"
            self.names = []
            for branch in _branches(kind, width):
                before = inside
                self.names.append([name for name, *_ in branch])
                for name, channels, kernel, stride in branch:
                    size = kernel if isinstance(kernel, tuple) else (kernel, kernel)
                    padding = (0, 0) if stride == 2 else (size[0] // 2, size[1] // 2)
                    setattr(self, name, Conv(before, channels, kernel, stride, padding))
                    before = channels

        def forward(self, x: Tensor) -> Tensor:
            out = []
            for names in self.names:
                y = pool(x) if names == ["branch_pool"] else x
                for name in names:
                    y = getattr(self, name)(y)
                out.append(y)
            return torch.cat([*out, F.max_pool2d(x, 3, 2)] if self.smaller else out, 1)

    class Last(nn.Module):
        """Kind E, in which some branches split again."""

        def __init__(self, inside: int, largest: bool) -> None:
            super().__init__()
            self.largest = largest
            self.branch1x1 = Conv(inside, 320, 1)
            self.branch3x3_1 = Conv(inside, 384, 1)
            self.branch3x3_2a, self.branch3x3_2b = _pair(384)
            self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inside, 448, 1), Conv(448, 384, 3, padding=1)
            self.branch3x3dbl_3a, self.branch3x3dbl_3b = _pair(384)
            self.branch_pool = Conv(inside, 192, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.branch3x3_1(x)
            z = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
            parts = [self.branch1x1(x), self.branch3x3_2a(y), self.branch3x3_2b(y)]
            parts += [self.branch3x3dbl_3a(z), self.branch3x3dbl_3b(z), self.branch_pool(pool(x, self.largest))]
            return torch.cat(parts, 1)

    def _pair(channels: int) -> Sequence[nn.Module]:
        return (
            Conv(channels, 384, (1, 3), padding=(0, 1)),
            Conv(channels, 384, (3, 1), padding=(1, 0)),
        )

    class Largest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool2d(x, 3, 2)

    parts: dict[str, nn.Module] = {
        "Conv2d_1a_3x3": Conv(3, 32, 3, 2), "Conv2d_2a_3x3": Conv(32, 32, 3),
        "Conv2d_2b_3x3": Conv(32, 64, 3, padding=1), "maxpool1": Largest(), "Conv2d_3b_1x1": Conv(64, 80, 1),
        "Conv2d_4a_3x3": Conv(80, 192, 3), "maxpool2": Largest(), "Mixed_5b": Block("A", 192, 32),
        "Mixed_5c": Block("A", 256, 64), "Mixed_5d": Block("A", 288, 64), "Mixed_6a": Block("B", 288),
        "Mixed_6b": Block("C", 768, 128), "Mixed_6c": Block("C", 768, 160), "Mixed_6d": Block("C", 768, 160),
        "Mixed_6e": Block("C", 768, 192), "Mixed_7a": Block("D", 768), "Mixed_7b": Last(1280, False),
        "Mixed_7c": Last(2048, fid),
    }  # fmt: skip
    network = nn.Sequential()
    for name, part in parts.items():
        network.add_module(name, part)
    return network
