"""The part of a guide that depends on w alone, as a separate network, computed once per image."""

from __future__ import annotations

from torch import Tensor, nn

from . import Guide


class Condition(nn.Module):
    """Scales ``guidance [B]`` → ``condition [B, C_0, H, W]``, what ``Student`` takes under that name.

    Args:
        guide: one whose class names ``constant_parts``; it keeps those and loses the rest.
        latent_size: (H, W) of the latents.
    """

    def __init__(self, guide: Guide, latent_size: tuple[int, int]) -> None:
        super().__init__()
        for name in [*dict(guide.named_children()), *dict(guide.named_parameters(recurse=False))]:
            if name not in guide.constant_parts:
                setattr(guide, name, None)
        self.guide = guide
        self.latent_size = (int(latent_size[0]), int(latent_size[1]))

    def forward(self, guidance: Tensor) -> Tensor | None:
        return self.guide.condition(guidance, self.latent_size)


def without_constant_parts(guide: Guide) -> Guide:
    """The guide without what ``Condition`` holds: from now on it has to be given its condition."""
    for name in guide.constant_parts:
        setattr(guide, name, None)
    return guide
