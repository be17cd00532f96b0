"""Guidance by a change of the text states only, which is computed once per image."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnp_trt.models.guides.parts import strength

from .base import Encoded, Rival


class Sharpener(nn.Module):
    """The change of the prompt's states, ``[B, tokens, D]``, by attention to the negative's; starts at zero.

    Both pass through one linear layer and a ReLU.  Attention with queries from the prompt, and keys and values from the
    negative, is followed by a ReLU and a second linear layer.

    Args:
        width: D of the text states.
        inner: width between the two linear layers.
        heads: heads of the attention.
    """

    def __init__(self, width: int, inner: int = 192, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.enter = nn.Linear(width, inner)
        self.q, self.k, self.v = (nn.Linear(inner, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, inner)
        self.leave = nn.Linear(inner, width)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, text: Tensor, empty: Tensor) -> Tensor:
        prompt, negative = F.relu(self.enter(text)), F.relu(self.enter(empty))
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, h in ((self.q, prompt), (self.k, negative), (self.v, negative))
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.leave(F.relu(self.out(attended)))


def sharpen(sharpener: nn.Module, text: Tensor, empty: Tensor, w: Tensor) -> Tensor:
    """``text + α · sharpener(text, empty)`` with α = (w − 1) / 4; the start token is unchanged, as in DICE."""
    change = sharpener(text, empty)[:, 1:] * strength(w, text.dtype)[..., 0]
    return torch.cat([text[:, :1], text[:, 1:] + change], 1)


class Sharpened(Rival):
    """The unchanged U-Net on sharpened text states; the change does not depend on x and t, and on w only through α."""

    title: ClassVar[str] = "sharpener (DICE)"
    source: ClassVar[str] = (
        "DICE: Zhou et al., AAAI 2026, “Distilling Classifier-Free Guidance into Text Embeddings” (arXiv 2502.03726): "
        "c + α·s(c, c_neg), where s is two linear layers and one attention from the prompt's tokens to the "
        "negative's. The paper trains at one w with an L1 loss; here all w are trained and α = (w − 1)/4."
    )
    once: ClassVar[str | None] = "sharpener"
    reads_negative: ClassVar[bool] = True

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        self.sharpener = Sharpener(unet.config.cross_attention_dim)

    def forward(
        self, unet: Any, x: Tensor, t: Tensor, text: Tensor, empty: Tensor, w: Tensor, encoded: Encoded | None = None
    ) -> Tensor:
        return unet(x, t, sharpen(self.sharpener, text, empty, w), return_dict=False)[0]
