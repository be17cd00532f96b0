"""The scale as an embedding in addition to the timestep's, and low-rank changes of the network's weights."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from torch import Tensor, nn

from pnp_trt.models.guides.parts import sinusoid, strength

from .base import Encoded, Hook, Rival, hooked, time_width

#: projections of every attention, and both convolutions of every residual block
_CHANGED = re.compile(r"\.attn[12]\.to_(q|k|v|out\.0)$|\.resnets\.\d+\.conv[12]$")
W_WIDTH = 32


class LowRank(nn.Module):
    """A change of rank ``rank`` of one linear layer or convolution (Hu et al. 2021, "LoRA"); starts at zero."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            self.down: nn.Module = nn.Conv2d(
                layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False
            )
            self.up: nn.Module = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """``x`` is the layer's input; ``gate [B, 1, 1, 1]`` multiplies the change."""
        h = self.down(x)
        return self.up(h * (gate if h.ndim == 4 else gate[..., 0]))


class WEmbedding(Rival):
    """w enters the network like the timestep, and the network's weights are adapted.

    Stage 1 of Meng et al. trains all weights of the network.  At this budget, low-rank changes of attention projections
    and convolutions replace that, so that a fine-tune can be used instead of the base.

    Args:
        rank: rank of every change.
    """

    title: ClassVar[str] = "w-embedding, LoRA"
    source: ClassVar[str] = (
        "Meng et al. 2023, “On Distillation of Guided Diffusion Models” (arXiv 2210.03142), stage 1: a sinusoidal "
        "embedding of w, through a perceptron of its own, is added to the time embedding. The paper trains the whole "
        "network; here it is frozen, and LoRA on attention projections and residual convolutions follows w."
    )

    def __init__(self, unet: Any, rank: int = 4) -> None:
        super().__init__(unet)
        self.embed = nn.Sequential(nn.Linear(W_WIDTH, W_WIDTH), nn.SiLU(), nn.Linear(W_WIDTH, time_width(unet)))
        nn.init.zeros_(self.embed[2].weight)
        nn.init.zeros_(self.embed[2].bias)
        layers = [(n, m) for n, m in unet.named_modules() if _CHANGED.search(n)]
        self.names = tuple(name for name, _ in layers)
        self.changes = nn.ModuleList(LowRank(m, rank) for _, m in layers)

    def forward(
        self, unet: Any, x: Tensor, t: Tensor, text: Tensor, empty: Tensor, w: Tensor, encoded: Encoded | None = None
    ) -> Tensor:
        gate = strength(w, x.dtype)
        extra = self.embed(sinusoid(w.float() * 4, W_WIDTH, 100.0).to(x.dtype)) * gate[:, :, 0, 0]

        def changed(change: nn.Module) -> Hook:
            return lambda _, inputs, output: output + change(inputs[0], gate)

        hooks = [("time_embedding", lambda _, inputs, output: output + extra)]
        hooks += [(name, changed(c)) for name, c in zip(self.names, self.changes, strict=True)]
        with hooked(unet, hooks):
            return unet(x, t, text, return_dict=False)[0]
