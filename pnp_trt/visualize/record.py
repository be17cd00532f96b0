"""Run the guided sampler and measure the residuals that the guide adds to each feature map, at every step and scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distill.monitor import run_schedule
from ..errors import PnpError
from ..io.progress import Progress
from ..models.conditioning import encode_prompts
from ..models.guides import GuideInput, GuideOutput
from ..models.latents import to_vae
from ..models.student import Student
from ..sampling.schedules import ddim

#: cycles per position; the Nyquist frequency is one half
HALF_NYQUIST = 0.25


@dataclass(frozen=True)
class FeatureMap:
    """A feature map of the U-Net that guides add to.

    Attributes:
        name: ``skip-0`` (the shallowest decoder skip), ``skip-1`` …, ``mid``.
        channels, height, width: the shape of the feature map.
        emits: whether this guide adds anything here.
    """

    name: str
    channels: int
    height: int
    width: int
    emits: bool


@dataclass
class Recording:
    """The measured residuals, for W scales, L layers (shallow to deep, mid last) and S steps.

    Attributes:
        guidance: the scales, ascending.
        timesteps: the timesteps of the steps, descending.
        layers: the L feature maps.
        residual: RMS of the residual over prompts, channels and positions, float64 ``[W, L, S]``.
        feature: RMS of the U-Net's own feature map to which the residual is added, ``[W, L, S]``.
        high: share of the residual's energy above half the Nyquist frequency, ``[W, L, S]``; NaN without a residual.
        shown: indices of the steps whose maps are stored, ascending.
        maps: the first prompt's residual, RMS over channels relative to the feature's RMS; ``maps[w][layer][k]`` is
            the map of step ``shown[k]``, ``[H, W]`` float32.
        images: the first prompt's image for each scale, uint8 ``[H, W, 3]``.
    """

    guidance: list[float]
    timesteps: list[int]
    layers: list[FeatureMap]
    residual: np.ndarray
    feature: np.ndarray
    high: np.ndarray
    shown: list[int]
    maps: list[list[list[np.ndarray]]]
    images: list[np.ndarray]

    @property
    def relative(self) -> np.ndarray:
        """The strength: RMS of the residual / RMS of the feature map to which it is added, ``[W, L, S]``."""
        return np.divide(self.residual, self.feature, out=np.zeros_like(self.residual), where=self.feature > 0)

    @property
    def emitting(self) -> list[int]:
        """Indices of the layers that this guide adds to."""
        return [i for i, layer in enumerate(self.layers) if layer.emits]


def layer_names(skips: int) -> list[str]:
    """Return the layer names of a U-Net with ``skips`` decoder skips, shallow to deep, mid last."""
    return [*(f"skip-{i}" for i in range(skips)), "mid"]


@torch.no_grad()
def record(
    base: Any,
    student: Student,
    prompts: Sequence[str],
    guidance: Sequence[float],
    steps: int,
    seed: int,
    shown: Sequence[int],
    progress: Progress | None = None,
) -> Recording:
    """Sample every prompt at every scale from the same noise, and measure the guide's residuals meanwhile.

    The noise is that of :meth:`pnp_trt.runtime.pipeline.Pipeline.noise`, so that the images are those of
    ``pnp-trt sample`` with this seed.

    Args:
        base: the student's :class:`~pnp_trt.models.teacher.BaseModel`.
        guidance: scales w, ascending.
        shown: indices of the steps whose maps are stored, ascending.

    Raises:
        InputError: if the base's images are not square.
        PnpError: if a residual or an image is not finite; the message names the layer, w and the timestep.
    """
    unet, guide = student.unet, student.guide
    device = next(guide.parameters()).device
    schedule = ddim(base.scheduler_config(), steps)
    size = base.side()
    noise = np.random.Generator(np.random.Philox(seed)).standard_normal((unet.config.in_channels, size, size), "f4")
    start = torch.from_numpy(noise).to(device).expand(len(prompts), -1, -1, -1) * schedule.init_scale
    conditions = encode_prompts(base, list(prompts), device)
    rows = torch.arange(len(prompts))
    text, added = conditions.text(rows, device), conditions.added(rows, device)
    empty = conditions.text(torch.full_like(rows, conditions.empty), device) if guide.negative_prompts else None
    vae = base.vae().float().to(device)
    names = layer_names(len(guide.config["skip_channels"]))

    layers: list[FeatureMap] = []
    current: list[list[Measured]] = []  # of the current scale, a list per step
    images: list[np.ndarray] = []
    measured: list[list[list[Measured]]] = []  # [W][S][L]

    def record_step(_: Any, arguments: tuple[GuideInput], output: GuideOutput) -> None:
        pairs = _maps_and_residuals(arguments[0], output)
        if not layers:
            for name, (x, r) in zip(names, pairs, strict=True):
                layers.append(FeatureMap(name, x.shape[1], x.shape[2], x.shape[3], r is not None))
        current.append([measure(r, x) for x, r in pairs])
        for layer, m in zip(layers, current[-1], strict=True):
            if not np.isfinite(m.residual):
                raise PnpError(
                    f"the guide's residual for {layer.name} at w = {w_value:g}, timestep "
                    f"{int(arguments[0].timestep[0])} is not finite; check the guide's weights"
                )
        if progress is not None:
            progress(f"w = {w_value:g}", len(measured) * steps + len(current), len(guidance) * steps)

    # a hook measures the guide's actual inputs and outputs, so that the student's forward pass is not duplicated here
    hook = guide.register_forward_hook(record_step)
    try:
        for w_value in guidance:
            w = torch.full((len(prompts),), w_value, device=device)
            guide_condition = guide.condition(w, (size, size))

            def predict(
                x: Tensor, t: Tensor, w: Tensor = w, guide_condition: Tensor | None = guide_condition
            ) -> Tensor:
                return student(x, t, text, w, negative=empty, condition=guide_condition, added_cond_kwargs=added)

            current = []
            latents = run_schedule(predict, start, schedule)
            images.append(_pixels(vae, latents[:1], w_value))
            measured.append(current)
    finally:
        hook.remove()

    def table(name: str) -> np.ndarray:
        return np.array([[[getattr(m, name) for m in step] for step in run] for run in measured]).transpose(0, 2, 1)

    maps = [[[run[s][i].map for s in shown] for i in range(len(layers))] for run in measured]
    return Recording(
        list(guidance), schedule.timesteps.tolist(), layers,
        table("residual"), table("feature"), table("high"), list(shown), maps, images,
    )  # fmt: skip


def _maps_and_residuals(inputs: GuideInput, output: GuideOutput) -> list[tuple[Tensor, Tensor | None]]:
    """Each feature map ``[B, C, H, W]`` with the guide's residual for it, mid last."""
    maps = (*inputs.features.down_block_res_samples, inputs.features.mid_block_res_sample)
    return list(zip(maps, (*output.down_block_res_samples, output.mid_block_res_sample), strict=True))


@dataclass(frozen=True)
class Measured:
    """The measurement of one layer at one step; see :class:`Recording`."""

    residual: float
    feature: float
    high: float
    map: np.ndarray


def measure(residual: Tensor | None, feature: Tensor) -> Measured:
    """Measure the strength, high-frequency share and map of a residual ``[B, C, H, W]`` (None: nothing is added)."""
    if residual is None:
        residual = torch.zeros_like(feature)
    r, x = residual.double(), feature.double()
    first = x[0].pow(2).mean().sqrt()
    relative = r[0].pow(2).mean(0).sqrt() / first if first > 0 else torch.zeros_like(r[0, 0])
    return Measured(
        float(r.pow(2).mean().sqrt()), float(x.pow(2).mean().sqrt()), high_frequency_share(r),
        relative.float().cpu().numpy(),
    )  # fmt: skip


def high_frequency_share(maps: Tensor) -> float:
    """Return the share of the energy of maps ``[…, H, W]`` above half the Nyquist frequency; NaN for zero maps.

    The energy is that of the 2-D discrete Fourier transform, including the mean. A frequency counts as high if its
    radius exceeds a quarter of a cycle per position.
    """
    energy = torch.fft.fft2(maps).abs().pow(2).flatten(0, -3).sum(0)
    total = float(energy.sum())
    mask = _high_frequencies(*maps.shape[-2:]).to(energy.device)
    return float(energy[mask].sum()) / total if total > 0 else float("nan")


def white_noise_share(height: int, width: int) -> float:
    """Return :func:`high_frequency_share` of white noise, which has equal energy in all frequencies: about 0.8."""
    return float(_high_frequencies(height, width).double().mean())


def _high_frequencies(height: int, width: int) -> Tensor:
    y, x = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]
    return (y.pow(2) + x.pow(2)).sqrt() > HALF_NYQUIST


def _pixels(vae: Any, latents: Tensor, w: float) -> np.ndarray:
    """Decode latents ``[1, C, H, W]`` to an image, uint8 ``[H, W, 3]``."""
    out = vae.decode(to_vae(latents, vae), return_dict=False)[0][0]
    if not out.isfinite().all():
        raise PnpError(f"the image at w = {w:g} is not finite; check the guide's and the base's weights")
    return out.div(2).add(0.5).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
