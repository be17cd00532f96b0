"""Profiles: ranges of batch and image sizes that an engine is compiled for.

Image sizes are written ``HEIGHTxWIDTH`` in image pixels; the profiles of a network are in latent pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import InputError

#: largest batch size
MAX_BATCH = 32
#: largest side of an image in pixels; attention's work grows with its fourth power
MAX_SIDE = 4096
#: height and width
Size = tuple[int, int]
#: smallest, best and largest
Extent = tuple[int, int, int]

_RANGE = r"([0-9]{1,5})(?:-([0-9]{1,5}))?"
_FORM = re.compile(f"b{_RANGE}(?:@{_RANGE}(?:x{_RANGE})?)?")


@dataclass(frozen=True)
class Profile:
    """A named range of batch sizes, and of image sizes if the engine has several.

    Attributes:
        name: ``b1``, ``b2-8``, ``b1@512x768`` …
        minimum, optimum, maximum: batch sizes; kernels are chosen for the optimum.
        height, width: smallest, best and largest size in image pixels, or in latent pixels for a network
            (``in_latents``).  None if the engine has only its model's own size.
        step: height and width are multiples of it.
        tokens: smallest, best and largest number of tokens of a U-Net's text states if prompts may have several chunks;
            None if the network takes only one number, or any.
    """

    name: str
    minimum: int
    optimum: int
    maximum: int
    height: Extent | None = None
    width: Extent | None = None
    step: int = 1
    tokens: Extent | None = None

    @classmethod
    def parse(cls, text: str) -> Profile:
        """Parse a profile: ``b4`` is batch size 4; ``b2-8`` is 2 to 8, fastest at 8; ``@`` adds sizes in pixels.

        ``b1@512x768`` is 512 high and 768 wide, ``b1@256-768`` is any height and width from 256 to 768, and
        ``b1@512-768x512`` is any height from 512 to 768 and width 512.

        Raises:
            InputError: if it is malformed or out of range; the message has the form and the range.
        """
        match = _FORM.fullmatch(text)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if match is None or not 1 <= low <= high <= MAX_BATCH:
            raise _malformed(text)
        if match[3] is None:
            return cls(text, low, high, high)
        sides = [(int(match[i]), int(match[i + 1] or match[i])) for i in (3, 5) if match[i]]
        if not all(1 <= least <= most <= MAX_SIDE for least, most in sides):
            raise _malformed(text)
        height, width = ((least, most, most) for least, most in (sides[0], sides[-1]))
        return cls(text, low, high, high, height, width)

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Profile:
        """A profile from the result of ``as_dict``, which may have been stored as JSON."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in document.items()}
        return cls(**fields)

    def as_dict(self) -> dict[str, Any]:
        """The form for a manifest; sizes and tokens are omitted if there are none."""
        out: dict[str, Any] = {k: getattr(self, k) for k in ("name", "minimum", "optimum", "maximum")}
        if self.height is not None and self.width is not None:
            out |= {"height": list(self.height), "width": list(self.width), "step": self.step}
        return out if self.tokens is None else out | {"tokens": list(self.tokens)}

    @property
    def sized(self) -> bool:
        """Whether it has image sizes."""
        return self.height is not None

    def extent(self, dimension: str) -> Extent:
        """Smallest, best and largest ``batch``, ``height``, ``width`` or ``tokens``."""
        extent = (self.minimum, self.optimum, self.maximum) if dimension == "batch" else getattr(self, dimension)
        assert extent is not None, f"profile {self.name} has no {dimension}"
        return extent

    def doubled(self) -> Profile:
        """The profile for a network that evaluates every image twice: with its prompt and without."""
        least, best, most = (2 * self.extent("batch")[i] for i in range(3))
        return replace(self, name=f"{self.name} twice", minimum=least, optimum=best, maximum=most)

    def in_latents(self, factor: int) -> Profile:
        """The profile in latent pixels, each of which is ``factor`` image pixels high and wide."""
        if self.height is None or self.width is None:
            return self
        h, w = ((low // factor, best // factor, high // factor) for low, best, high in (self.height, self.width))
        return replace(self, height=h, width=w, step=self.step // factor)

    def for_tokens(self, least: int, most: int) -> Profile:
        """The profile for ``least`` to ``most`` tokens, fastest at ``least``, since most prompts are short."""
        count = f"{least}" if least == most else f"{least}-{most}"
        return replace(self, name=f"{self.name} of {count} tokens", tokens=(least, least, most))

    def holds(self, batch: int, size: Size | None = None, tokens: int | None = None) -> bool:
        """Whether ``batch``, ``size`` and ``tokens`` are within the profile."""
        if tokens is not None and self.tokens is not None and not self.tokens[0] <= tokens <= self.tokens[2]:
            return False
        return self.minimum <= batch <= self.maximum and (size is None or self.holds_size(size))

    def holds_size(self, size: Size) -> bool:
        """Whether ``size`` is within the profile; always true without sizes, since the engine then has only one."""
        if self.height is None or self.width is None:
            return True
        return all(
            low <= n <= high and n % self.step == 0
            for n, (low, _, high) in zip(size, (self.height, self.width), strict=True)
        )

    @property
    def shapes(self) -> int:
        """Number of combinations of batch size, height and width in the profile."""
        count = self.maximum - self.minimum + 1
        for extent in (self.height, self.width):
            count *= 1 if extent is None else (extent[2] - extent[0]) // self.step + 1
        return count

    def sizes(self) -> str:
        """Its sizes in words: ``512x768``, or ``256-768x256-768 in steps of 64``; empty if it has none."""
        if self.height is None or self.width is None:
            return ""
        ranges = [f"{low}" if low == high else f"{low}-{high}" for low, _, high in (self.height, self.width)]
        stepped = any("-" in r for r in ranges)
        return "x".join(ranges) + (f" in steps of {self.step}" if stepped else "")


def _malformed(text: str) -> InputError:
    return InputError(
        f"profile is '{text}'; write b1 for batch size 1, b2-8 for two to eight, at most {MAX_BATCH}; "
        "then optionally @512x768 for a height and width in pixels, or @256-768 for a range of both, "
        f"at most {MAX_SIDE}"
    )


def parse_size(text: str) -> Size:
    """Parse ``512x768`` as height and width in pixels; ``512`` is square.

    Raises:
        InputError: if it is malformed or out of range; the message has the form and the range.
    """
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text)
    size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not all(1 <= n <= MAX_SIDE for n in size):
        raise InputError(
            f"size is '{text}'; write height x width in pixels, such as 512x768, each from 1 to {MAX_SIDE}"
        )
    return size


def tightest(profiles: Sequence[Profile], holds: Callable[[Profile], bool]) -> int | None:
    """Index of the profile with the fewest shapes among those that ``holds`` accepts; None if there is none."""
    fitting = [(p.shapes, i) for i, p in enumerate(profiles) if holds(p)]
    return min(fitting)[1] if fitting else None


def split(count: int, batches: Sequence[int]) -> list[int]:
    """Split ``count`` images into the fewest batches of legal sizes, the largest first.

    Args:
        batches: legal batch sizes, each at least 1.

    Returns:
        The batch sizes.  If no sum of legal sizes is ``count``, as many of the largest as fit, and the remainder.
    """
    fewest: list[int | None] = [0]
    for n in range(1, count + 1):
        before = [fewest[n - b] for b in batches if b <= n]
        fewest.append(min((k + 1 for k in before if k is not None), default=None))
    if fewest[count] is None:
        most = max(batches, default=count)
        return [min(most, count - done) for done in range(0, count, most)]
    sizes = []
    while count:
        steps = fewest[count]
        assert steps is not None
        sizes.append(max(b for b in batches if b <= count and fewest[count - b] == steps - 1))
        count -= sizes[-1]
    return sizes


def once_and_twice(profiles: Sequence[Profile]) -> tuple[Profile, ...]:
    """The profiles, and doubled ones for evaluating every image twice, without duplicates.

    One profile for both would not be static, and TensorRT fuses less if the batch size is dynamic: a small U-Net of
    Stable Diffusion's architecture has 240 kernels for one to two rows, 210 for two and 192 for one (TensorRT-RTX
    1.7.1).
    """
    distinct: dict[Profile, Profile] = {}
    for profile in (*profiles, *(p.doubled() for p in profiles)):
        distinct.setdefault(replace(profile, name=""), profile)
    return tuple(distinct.values())


def by_chunks(profiles: Sequence[Profile], length: int, chunks: int) -> tuple[Profile, ...]:
    """The profiles for prompts of one chunk of ``length`` tokens, and for prompts of two to ``chunks`` chunks.

    Prompts of one chunk keep static profiles, as on an engine for only these; see :func:`once_and_twice`.
    """
    return tuple(p.for_tokens(*ends) for ends in ((length, length), (2 * length, chunks * length)) for p in profiles)


def legal_sizes(profiles: Sequence[Profile]) -> str:
    """The distinct sizes of all profiles in words."""
    return ", ".join(dict.fromkeys(p.sizes() for p in profiles if p.sized))


def size_of(inputs: dict[str, np.ndarray]) -> Size | None:
    """Height and width of a network's image-shaped input, ``[B, C, H, W]``; None if it has none."""
    return next(((v.shape[2], v.shape[3]) for v in inputs.values() if v.ndim == 4), None)
