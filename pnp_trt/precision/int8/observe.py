"""Run the sampler in PyTorch and observe the inputs of all convolutions and linear layers.

The histograms and the ranges from them are computed by NVIDIA Model Optimizer (``HistogramCalibrator``).  Its ONNX
quantiser does not support opset 23, so ``precision/int8/qdq.py`` quantises the graph.
"""

from __future__ import annotations

import fnmatch
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import InputError, PnpError
from ...models.conditioning import Conditions
from ...models.student import Student, cfg
from ...sampling.schedules import ddim_coefficients
from .record import ObservedLayer

#: small layers that affect every pixel or block, never quantised: a thousandth of the arithmetic
NEVER = ("*.conv_in", "*.conv_out", "*time_emb*", "*add_embedding*", "*class_embedding*")
PERCENTILES = (99.9, 99.99, 99.999)
METHODS = ("max", *(f"percentile-{p:g}" for p in PERCENTILES))
#: number of parts of the timesteps for which the record has separate ranges
TENTHS = 10


@dataclass
class Loop:
    """The sampler in PyTorch: DDIM, with one evaluation per step with a guide, else classifier-free guidance.

    Attributes:
        network: ``Student`` or ``Teacher``.
        scheduler: config of the teacher's scheduler.
        conditions: encoded prompts.
        shape: ``(C, H, W)`` of a latent.
        w: smallest and largest guidance scale.
        steps: steps per run.
        exact: whether to use the sampler's schedule for this number of steps, the only one that a stage-2 guide
            supports; otherwise each run is shifted by a random part of a step, so that all timesteps are covered.
    """

    network: nn.Module
    scheduler: dict[str, Any]
    conditions: Conditions
    shape: tuple[int, int, int]
    w: tuple[float, float]
    steps: int
    exact: bool

    def predict(self, x: Tensor, t: int, rows: Tensor, w: Tensor) -> Tensor:
        """Return the guided prediction ``[N, C, H, W]`` at one timestep."""
        times = torch.full((len(x),), t)
        text = self.conditions.text(rows, x.device)
        nothing = torch.full_like(rows, self.conditions.empty)
        if isinstance(self.network, Student):
            negative = {}
            if getattr(self.network.guide.config, "negative_prompts", False):
                negative["negative"] = self.conditions.text(nothing, x.device)
            added = self.conditions.added(rows, x.device)
            out = self.network(x, times, text, w, **negative, added_cond_kwargs=added)
        else:
            empty = self.conditions.text(nothing, x.device)
            added = self.conditions.added(torch.cat([nothing, rows]), x.device)
            out = cfg(self.network.unet, x, times, text, empty, w, added)
        if not out.isfinite().all():
            raise PnpError(f"the prediction is not finite at timestep {t}; check the weights of base and guide")
        return out

    @torch.no_grad()
    def run(self, seed: int, images: int, at: Callable[[Tensor, int, Tensor, Tensor], None] | None = None) -> Tensor:
        """Sample latents ``[images, C, H, W]`` of one batch, calling ``at(x, t, rows, w)`` before each evaluation."""
        rng = random.Random(f"calibrate/{seed}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        rows = torch.tensor([rng.randrange(max(self.conditions.empty, 1)) for _ in range(images)])
        w = torch.tensor([rng.uniform(*self.w) for _ in range(images)])
        x = torch.randn(images, *self.shape, generator=generator)
        times, after = self._times(rng)
        a, b = ddim_coefficients(self.scheduler, times, after)
        for i, t in enumerate(times.tolist()):
            if at is not None:
                at(x, t, rows, w)
            x = float(a[i]) * x + float(b[i]) * self.predict(x, t, rows, w)
        return x

    def _times(self, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
        from ...sampling.schedules import spaced_timesteps

        n = self.scheduler.get("num_train_timesteps", 1000)
        stride = n // self.steps
        if self.exact:
            times = spaced_timesteps(self.scheduler, self.steps)
            return times, times - stride
        shift = rng.randrange(stride)
        times = np.array([stride * i + shift for i in reversed(range(self.steps))], np.int64)
        return times, np.append(times[1:], -1)


def candidates(network: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """Return the layers that could use INT8, by name: convolutions without groups, and linear layers.

    Raises:
        InputError: if no layer matches a pattern.
    """
    # parts of the guide that run once per image are separate networks, which are not quantised
    constant = getattr(getattr(network, "guide", None), "constant_parts", ())
    once = tuple(f"guide.{part}." for part in (*constant, "sharpener"))
    layers: dict[str, nn.Module] = {
        name: layer
        for name, layer in network.named_modules()
        if (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1))
        and not f"{name}.".startswith(once)
        and any(fnmatch.fnmatchcase(name, p) for p in patterns)
        and not any(fnmatch.fnmatchcase(name, p) for p in NEVER)
    }
    if not layers:
        raise InputError(
            f"no convolution or linear layer is named {', '.join(patterns)}; names begin with unet. or guide."
        )
    return layers


class Observer:
    """Observes the input of each layer while the sampler runs."""

    def __init__(self, layers: dict[str, nn.Module], steps_of_training: int) -> None:
        self.layers = layers
        self._n = steps_of_training
        self._t = 0
        self._observed = {name: _Observed(layer) for name, layer in layers.items()}

    def at(self, x: Tensor, t: int, *_: Any) -> None:
        """Record the timestep of the next evaluation."""
        self._t = t

    @contextmanager
    def watching(self, histogram: bool) -> Iterator[None]:
        """Collect the largest values inside the block, and optionally histograms."""
        handles = []
        for name, layer in self.layers.items():

            def hook(_: nn.Module, args: tuple[Tensor, ...], observed: _Observed = self._observed[name]) -> None:
                observed.collect(args[0], min(self._t * TENTHS // self._n, TENTHS - 1), histogram)

            handles.append(layer.register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def result(self) -> dict[str, ObservedLayer]:
        """Return the observations by layer."""
        return {name: observed.layer() for name, observed in self._observed.items()}


class _Observed:
    """Observations of one layer's input."""

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        self._linear = isinstance(layer, nn.Linear)
        self._weights = layer.weight.numel()
        self._stride = int(np.prod(layer.stride)) if isinstance(layer, nn.Conv2d) else 1
        self._macs = 0
        self._by_timestep = [0.0] * TENTHS
        self._channels: Tensor | None = None
        self._histogram: Any = None

    def collect(self, x: Tensor, tenth: int, histogram: bool) -> None:
        magnitude = x.detach().abs().float()
        largest = float(magnitude.max())
        self._by_timestep[tenth] = max(self._by_timestep[tenth], largest)
        # weights × positions of one image at which the layer is applied
        self._macs = self._weights * (x[0].numel() // x.shape[-1 if self._linear else 1]) // self._stride
        if self._linear:
            channels = magnitude.flatten(0, -2).amax(0)
            self._channels = channels if self._channels is None else torch.maximum(self._channels, channels)
        if not histogram:
            return
        if self._histogram is None:
            self._histogram = _histogram()
            # the first data set the bin width: 1.5 times the largest value so far, as small data would make it tiny
            self._histogram.collect(torch.tensor([1.5 * max(*self._by_timestep, 1e-6)]))
        self._histogram.collect(magnitude)

    def layer(self) -> ObservedLayer:
        largest = max(self._by_timestep)
        amax = {"max": largest}
        for p in PERCENTILES:
            amax[f"percentile-{p:g}"] = float(self._histogram.compute_amax("percentile", percentile=p))
        channels = [] if self._channels is None else self._channels.tolist()
        return ObservedLayer(
            "linear" if self._linear else "conv", self._macs,
            # a bin's edge may exceed the largest value
            {name: _short(min(v, largest)) for name, v in amax.items()},
            [_short(v) for v in self._by_timestep], [_short(v) for v in channels],
        )  # fmt: skip


def _histogram() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Model Optimizer warns about versions of packages that are not used here
        from modelopt.torch.quantization.calib import HistogramCalibrator
    return HistogramCalibrator(num_bits=8, axis=None, unsigned=False)


def _short(value: float) -> float:
    """Round to five digits, which is precise enough for a range and readable."""
    return float(f"{value:.5g}")
