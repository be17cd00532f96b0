"""Which image sizes and prompts a bundle is for: what that asks of the graphs, and where parity is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..bundle.profiles import MAX_BATCH, MAX_SIDE, Extent, Profile, Size
from ..errors import InputError
from ..models.teacher import Sizes


@dataclass(frozen=True)
class OpenAxis:
    """A dimension that a graph leaves open besides the batch.

    Attributes:
        name: ``height``, ``width`` or ``tokens``, as the graph calls it.
        axis: its place in every input of ``rank`` dimensions.
        low, high: of its sizes, in units of ``step``.
        step: its sizes are multiples of this: what the U-Net halves must come out even, and prompts are whole chunks.
        rank: dimensions of the inputs that have it.
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
        profiles: those requested; where one states sizes, all do.
        default: the size where none is requested: the model's own, if it is legal.
        second: another legal size, at which parity is checked too; None where there is only one.
        factor: image pixels to a latent's.
        channels: of a latent.
        open_axes: the sizes of latents that the graphs leave open; empty where there is only one size.
        tokens: of the U-Net's text states, where prompts may have several chunks; None where they have one.
    """

    profiles: tuple[Profile, ...]
    default: Size
    second: Size | None
    factor: int
    channels: int
    open_axes: tuple[OpenAxis, ...]
    tokens: OpenAxis | None = None

    def for_chunks(self, length: int, chunks: int) -> SizePlan:
        """The same for prompts of up to ``chunks`` chunks of ``length`` tokens."""
        return replace(self, tokens=OpenAxis("tokens", 1, 1, chunks, length, rank=3)) if chunks > 1 else self

    def axes(self, network: str) -> tuple[OpenAxis, ...]:
        """What the graph of a network leaves open."""
        if network == "vae_encoder":  # it reads pixels
            return tuple(replace(a, step=a.step * self.factor) for a in self.open_axes)
        return self.open_axes + ((self.tokens,) if network == "unet" and self.tokens is not None else ())

    def for_any_batch(self) -> SizePlan:
        """The same sizes for a runtime that takes any batch: every profile holds them all."""
        found = {p.sizes().partition(" ")[0]: p for p in self.profiles}
        most = MAX_BATCH
        profiles = tuple(
            replace(p, name=f"b1-{most}@{sizes}", minimum=1, optimum=most, maximum=most) for sizes, p in found.items()
        )
        return replace(self, profiles=profiles)

    def latent(self, size: Size) -> tuple[int, int, int]:
        """Shape of a latent ``(C, H, W)`` for images of ``size``."""
        return self.channels, size[0] // self.factor, size[1] // self.factor

    def named(self, network: str, shape: Sequence[int], *, output: bool = False) -> list[int | str]:
        """A tensor's shape with names in place of what the graph leaves open, as the manifest records it.

        ``height`` and ``width`` are of a network's inputs, and of an output of the same size.
        """
        found: list[int | str] = ["batch", *(int(d) for d in shape[1:])]
        for a in self.axes(network):
            if len(found) == a.rank:
                resized = output and network in ("vae_decoder", "vae_encoder")
                found[a.axis] = output_names(network).format(a.name) if resized else a.name
        return found

    def traced(self, network: str, tensor: Any) -> Any:
        """An example with the shape to trace a graph with: ``tensor``, its open axes at their largest.

        The tracer takes a dimension of one for a constant, and the largest one is never one.
        """
        shape = list(tensor.shape)
        for a in self.axes(network):
            if len(shape) == a.rank:
                shape[a.axis] = a.high * a.step
        return tensor if shape == list(tensor.shape) else tensor.new_zeros(shape)


def output_names(network: str) -> str:
    """Form of the names of an output's open sizes where they are not the input's."""
    return "latent_{}" if network == "vae_encoder" else "image_{}"


def plan_sizes(profiles: Sequence[Profile], sizes: Sizes) -> SizePlan:
    """Fit ``profiles`` to a model.

    Raises:
        InputError: for a size that the model cannot generate, with the legal range.
    """
    own = (sizes.latent[1] * sizes.factor, sizes.latent[2] * sizes.factor)
    if not any(p.sized for p in profiles):
        return SizePlan(tuple(profiles), own, None, sizes.factor, sizes.latent[0], ())
    fitted = tuple(_fitted(p, own, sizes.multiple) for p in profiles)
    extents = {name: [p.extent(name) for p in fitted] for name in ("height", "width")}
    latent_step = sizes.multiple // sizes.factor
    open_axes = []
    for axis, (name, found) in enumerate(extents.items(), start=2):
        low, high = min(e[0] for e in found), max(e[2] for e in found)
        if low < high:
            open_axes.append(OpenAxis(name, axis, low // sizes.multiple, high // sizes.multiple, latent_step))
    best = own if any(p.holds_size(own) for p in fitted) else (extents["height"][0][1], extents["width"][0][1])
    return SizePlan(fitted, best, _second(fitted, best), sizes.factor, sizes.latent[0], tuple(open_axes))


def _fitted(profile: Profile, own: Size, multiple: int) -> Profile:
    """The profile with sizes that the model can generate, best at the model's own where that is inside."""
    height = profile.height or (own[0],) * 3
    width = profile.width or (own[1],) * 3

    def fit(extent: Extent, side: int) -> Extent:
        low, _, high = extent
        if low % multiple or high % multiple:
            raise InputError(
                f"profile is '{profile.name}', and sizes of this model are multiples of {multiple} pixels from "
                f"{multiple} to {MAX_SIDE // multiple * multiple}; its own is {own[0]}x{own[1]}"
            )
        return low, side if low <= side <= high and side % multiple == 0 else high, high

    return replace(profile, height=fit(height, own[0]), width=fit(width, own[1]), step=multiple)


def _second(profiles: Sequence[Profile], first: Size) -> Size | None:
    """The smallest legal corner of all profiles other than ``first``, an oblong one if there is any.

    A square does not show where height and width were taken for each other.
    """
    corners = {
        (h, w) for p in profiles for h in p.extent("height")[::2] for w in p.extent("width")[::2] if (h, w) != first
    }
    return min(corners, key=lambda s: (s[0] == s[1], s[0] * s[1], s), default=None)
