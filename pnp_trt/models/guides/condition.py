"""The part of a guide that depends only on w, as a separate network that runs once per image."""

from __future__ import annotations

from torch import Tensor, nn

from . import Guide


class Condition(nn.Module):
    """Scales ``guidance [B]`` → ``condition [B, C_0, H, W]``, an input of ``Student``.

    Args:
        guide: a guide whose class has ``constant_parts``; all other parts are removed from it.
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
    """Remove the parts that ``Condition`` contains from a guide, which must then be passed its condition."""
    for name in guide.constant_parts:
        setattr(guide, name, None)
    return guide
