"""Small adapters at every cross-attention: with attention per position, or with one vector for all positions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnp_trt.models.guides.parts import sinusoid, strength

from .base import Encoded, Hook, Rival, cross_attentions, hooked, time_width

_PAPER = (
    "AGD: Perez Jensen and Sadat, TMLR 2025, “Efficient Distillation of Classifier-Free Guidance using Adapters” "
    "(arXiv 2503.07274), "
)
_OURS = " The paper trains on CFG's trajectories alone and has no (w − 1) factor."


class ScaleEncoder(nn.Module):
    """w ``[B]`` → ``[B, width]``: sinusoids, a perceptron of one hidden layer, layer norm."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.net = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.LayerNorm(width)
        )  # fmt: skip

    def forward(self, w: Tensor) -> Tensor:
        return self.net(sinusoid(w.float() * 4, self.width, 100.0).to(self.net[0].weight.dtype))


class AttentionAdapter(nn.Module):
    """Attention of the positions to w, the time embedding and the prompt's tokens, in a narrow space; starts at zero.

    Args:
        channels: channels of the positions.
        time: width of the time embedding.
        text: width of the text states.
        width: width of the narrow space.
    """

    def __init__(self, channels: int, time: int, text: int, width: int = 32) -> None:
        super().__init__()
        self.scale = ScaleEncoder(width, 3 * width)
        self.time, self.text = nn.Linear(time, width), nn.Linear(text, width)
        self.q = nn.Linear(channels, width, bias=False)
        self.k, self.v = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, w: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        """``x [B, positions, C]``, ``w [B]``, ``emb [B, E]``, ``text [B, tokens, D]`` → ``[B, positions, C]``."""
        known = torch.cat([self.scale(w)[:, None], self.time(emb)[:, None], self.text(text)], 1)
        order = torch.arange(known.shape[1], device=known.device)
        known = known + sinusoid(order, known.shape[2], 10_000.0).to(known.dtype)
        # one head, which is as wide as a head of the usual U-Nets
        attended = F.scaled_dot_product_attention(self.q(x)[:, None], self.k(known)[:, None], self.v(known)[:, None])
        return self.out(attended[:, 0])


class AdditiveAdapter(nn.Module):
    """One vector for all positions, from w, the time embedding and the mean of the prompt's states; starts at zero."""

    def __init__(self, channels: int, time: int, text: int, width: int = 34) -> None:
        super().__init__()
        self.scale = ScaleEncoder(width, 4 * width)
        self.time, self.text = nn.Linear(time, width), nn.Linear(text, width)
        self.hidden = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width))
        self.out = nn.Linear(width, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, w: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        """Arguments as in :class:`AttentionAdapter` → ``[B, 1, C]``; ``x`` is not used."""
        known = self.scale(w) + self.time(emb) + self.text(text.mean(1))
        return self.out(self.hidden(known))[:, None]


class Adapters(nn.Module):
    """One adapter per cross-attention, which reads the attention's input and is added to its output."""

    def __init__(self, unet: Any, adapter: type[AttentionAdapter] | type[AdditiveAdapter]) -> None:
        super().__init__()
        places = cross_attentions(unet)
        self.names = tuple(name for name, _ in places)
        time, text = time_width(unet), unet.config.cross_attention_dim
        self.adapters = nn.ModuleList(adapter(channels, time, text) for _, channels in places)

    @contextmanager
    def attached(self, unet: Any, x: Tensor, t: Tensor, text: Tensor, w: Tensor) -> Iterator[None]:
        """Add the adapters' outputs, times (w − 1), within the block; arguments as in :meth:`.Rival.forward`."""
        gate = strength(w, x.dtype)[..., 0]
        emb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=t), None)

        def beside(adapter: nn.Module) -> Hook:
            return lambda _, inputs, output: output + adapter(inputs[0], w, emb, text) * gate

        with hooked(unet, [(n, beside(a)) for n, a in zip(self.names, self.adapters, strict=True)]):
            yield


class _WithAdapters(Rival):
    """The U-Net with adapters."""

    adapter: ClassVar[type[AttentionAdapter] | type[AdditiveAdapter]]

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        self.beside = Adapters(unet, self.adapter)

    def forward(
        self, unet: Any, x: Tensor, t: Tensor, text: Tensor, empty: Tensor, w: Tensor, encoded: Encoded | None = None
    ) -> Tensor:
        with self.beside.attached(unet, x, t, text, w):
            return unet(x, t, text, return_dict=False)[0]


class AttentionAdapters(_WithAdapters):
    """AGD's attention form: each position attends to w, t and the prompt."""

    title: ClassVar[str] = "adapters (AGD)"
    source: ClassVar[str] = (
        _PAPER + "its attention form: beside every cross-attention, an adapter in which the positions attend to "
        "embeddings of w, t and the prompt's tokens." + _OURS
    )
    adapter: ClassVar[type[AttentionAdapter] | type[AdditiveAdapter]] = AttentionAdapter


class AdditiveAdapters(_WithAdapters):
    """AGD's additive form: a function of w, t and the pooled prompt, added equally to every position."""

    title: ClassVar[str] = "additive adapters (AGD)"
    source: ClassVar[str] = (
        _PAPER + "its additive form: beside every cross-attention, a function of w, t and the mean of the prompt's "
        "states, the same for all positions." + _OURS
    )
    adapter: ClassVar[type[AttentionAdapter] | type[AdditiveAdapter]] = AdditiveAdapter
