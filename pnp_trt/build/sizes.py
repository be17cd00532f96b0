"""Image sizes and prompt lengths of a bundle: open axes of its graphs, and sizes at which parity is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..bundle.profiles import MAX_BATCH, MAX_SIDE, Extent, Profile, Size
from ..errors import InputError
from ..models.teacher import Sizes


@dataclass(frozen=True)
class OpenAxis:
    """A dynamic dimension of a graph besides the batch.

    Attributes:
        name: its name in the graph: ``height``, ``width`` or ``tokens``.
        axis: its index in every input of ``rank`` dimensions.
        low, high: smallest and largest size, in units of ``step``.
        step: sizes are multiples of this, since the U-Net halves heights and widths, and prompts are whole chunks.
        rank: number of dimensions of the inputs that have it.
    """

    name: str
    axis: int
    low: int
    high: int
    step: int
    rank: int = 4


@dataclass(frozen=True)
class SizePlan:
    """The sizes of one bundle, in image pixels.

    Attributes:
        profiles: the requested profiles; either all or none of them have sizes.
        default: size of images for which none is requested: the model's own, if it is legal.
        second: another legal size at which parity is checked; None if there is only one.
        factor: image pixels per latent pixel, along each side.
        channels: channels of a latent.
        open_axes: dynamic sizes of latents; empty if there is only one size.
        tokens: dynamic length of the U-Net's text states; None if prompts have one chunk.
    """

    profiles: tuple[Profile, ...]
    default: Size
    second: Size | None
    factor: int
    channels: int
    open_axes: tuple[OpenAxis, ...]
    tokens: OpenAxis | None = None

    def for_chunks(self, length: int, chunks: int) -> SizePlan:
        """This plan for prompts of up to ``chunks`` chunks of ``length`` tokens."""
        return replace(self, tokens=OpenAxis("tokens", 1, 1, chunks, length, rank=3)) if chunks > 1 else self

    def axes(self, network: str) -> tuple[OpenAxis, ...]:
        """Dynamic dimensions of a network's graph, besides the batch."""
        if network == "vae_encoder":  # it reads pixels
            return tuple(replace(a, step=a.step * self.factor) for a in self.open_axes)
        return self.open_axes + ((self.tokens,) if network == "unet" and self.tokens is not None else ())

    def for_any_batch(self) -> SizePlan:
        """This plan for a runtime that takes any batch size: every profile covers all of them."""
        by_size = {p.sizes().partition(" ")[0]: p for p in self.profiles}
        most = MAX_BATCH
        profiles = tuple(
            replace(p, name=f"b1-{most}@{sizes}", minimum=1, optimum=most, maximum=most) for sizes, p in by_size.items()
        )
        return replace(self, profiles=profiles)

    def latent(self, size: Size) -> tuple[int, int, int]:
        """Shape of a latent ``(C, H, W)`` for images of ``size``."""
        return self.channels, size[0] // self.factor, size[1] // self.factor

    def named(self, network: str, shape: Sequence[int], *, output: bool = False) -> list[int | str]:
        """A tensor's shape with names for its dynamic dimensions, as the manifest records it.

        ``height`` and ``width`` are sizes of a network's inputs, and of outputs of the same size.
        """
        dimensions: list[int | str] = ["batch", *(int(d) for d in shape[1:])]
        for a in self.axes(network):
            if len(dimensions) == a.rank:
                resized = output and network in ("vae_decoder", "vae_encoder")
                dimensions[a.axis] = output_names(network).format(a.name) if resized else a.name
        return dimensions

    def traced(self, network: str, tensor: Any) -> Any:
        """An example for tracing: ``tensor`` with its open axes at their largest sizes.

        The tracer treats a dimension of 1 as a constant, and the largest size is never 1.
        """
        shape = list(tensor.shape)
        for a in self.axes(network):
            if len(shape) == a.rank:
                shape[a.axis] = a.high * a.step
        return tensor if shape == list(tensor.shape) else tensor.new_zeros(shape)


def output_names(network: str) -> str:
    """Format of the names of an output's open sizes that differ from the input's."""
    return "latent_{}" if network == "vae_encoder" else "image_{}"


def plan_sizes(profiles: Sequence[Profile], sizes: Sizes) -> SizePlan:
    """Fit ``profiles`` to a model.

    Raises:
        InputError: for a size that the model cannot generate; the message has the legal range.
    """
    own = (sizes.latent[1] * sizes.factor, sizes.latent[2] * sizes.factor)
    if not any(p.sized for p in profiles):
        return SizePlan(tuple(profiles), own, None, sizes.factor, sizes.latent[0], ())
    fitted = tuple(_fitted(p, own, sizes.multiple) for p in profiles)
    extents = {name: [p.extent(name) for p in fitted] for name in ("height", "width")}
    latent_step = sizes.multiple // sizes.factor
    open_axes = []
    for axis, (name, ranges) in enumerate(extents.items(), start=2):
        low, high = min(e[0] for e in ranges), max(e[2] for e in ranges)
        if low < high:
            open_axes.append(OpenAxis(name, axis, low // sizes.multiple, high // sizes.multiple, latent_step))
    best = own if any(p.holds_size(own) for p in fitted) else (extents["height"][0][1], extents["width"][0][1])
    return SizePlan(fitted, best, _second(fitted, best), sizes.factor, sizes.latent[0], tuple(open_axes))


def _fitted(profile: Profile, own: Size, multiple: int) -> Profile:
    """The profile with sizes checked for the model, and the model's own size as optimum if it is in range."""
    height = profile.height or (own[0],) * 3
    width = profile.width or (own[1],) * 3

    def fit(extent: Extent, side: int) -> Extent:
        low, _, high = extent
        if low % multiple or high % multiple:
            raise InputError(
                f"profile is '{profile.name}', but sizes of this model are multiples of {multiple} pixels from "
                f"{multiple} to {MAX_SIDE // multiple * multiple}; its native size is {own[0]}x{own[1]}"
            )
        return low, side if low <= side <= high and side % multiple == 0 else high, high

    return replace(profile, height=fit(height, own[0]), width=fit(width, own[1]), step=multiple)


def _second(profiles: Sequence[Profile], first: Size) -> Size | None:
    """The smallest corner of all profiles other than ``first``, preferably not square.

    A square image would not reveal swapped height and width.
    """
    corners = {
        (h, w) for p in profiles for h in p.extent("height")[::2] for w in p.extent("width")[::2] if (h, w) != first
    }
    return min(corners, key=lambda s: (s[0] == s[1], s[0] * s[1], s), default=None)
