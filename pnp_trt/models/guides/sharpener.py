"""Support of negative prompts by changing the prompt's text states once per image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError
from . import Guide
from .parts import sinusoid

W_FEATURES = 64
HEADS = 4


class Sharpener(nn.Module):
    """Changes the prompt's text states by the difference between a negative prompt and the empty prompt.

    Computes ``text + (w − 1) / 4 · (s(text, negative) − s(text, empty))``, where s has the form of DICE (Zhou et al.,
    AAAI 2026, "Distilling Classifier-Free Guidance into Text Embeddings", arXiv 2502.03726): one linear layer and a
    ReLU for both texts, attention from the prompt's tokens to the negative prompt's, a ReLU and a linear layer.  Unlike
    in DICE, the first layer also takes w for the prompt, so that it can be trained for all w.  It changes nothing at
    w = 1 or if the negative prompt is empty: images without a negative prompt are those of the guide without a
    sharpener.

    Args:
        width: D, width of the text states.
        inner: width between the linear layers, a multiple of ``HEADS``.

    Raises:
        InputError: if ``inner`` is not such a multiple.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        if not isinstance(inner, int) or inner < 1 or inner % HEADS:
            raise InputError(f"sharpener_width is {inner}; it must be a positive multiple of {HEADS}")
        self.enter = nn.Linear(width, inner)
        self.scale = nn.Linear(W_FEATURES, inner)
        self.q, self.k, self.v = (nn.Linear(inner, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, inner)
        self.leave = nn.Linear(inner, width, bias=False)  # a bias would cancel in the difference
        nn.init.zeros_(self.leave.weight)

    def forward(self, text: Tensor, negative: Tensor, empty: Tensor, guidance: Tensor) -> Tensor:
        """Return the changed states ``[B, tokens, D]``.

        Args:
            text, negative, empty: text states of the prompt, the negative and the empty prompt, ``[B, tokens, D]``.
            guidance: the scale w, ``[B]``.
        """
        of_w = self.scale(sinusoid(guidance.float() * 4, W_FEATURES, 100.0).to(text.dtype))
        query = self._heads(self.q(F.relu(self.enter(text) + of_w[:, None])))
        change = self._hidden(query, negative) - self._hidden(query, empty)
        factor = ((guidance.float() - 1.0) * 0.25).to(text.dtype)
        return text + self.leave(change) * factor[:, None, None]

    def _hidden(self, query: Tensor, other: Tensor) -> Tensor:
        h = F.relu(self.enter(other))
        attended = F.scaled_dot_product_attention(query, self._heads(self.k(h)), self._heads(self.v(h)))
        return F.relu(self.out(attended.transpose(1, 2).flatten(2)))

    def _heads(self, h: Tensor) -> Tensor:
        return h.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Sharpen(nn.Module):
    """A guide's sharpener as a separate network; inputs and output as of ``Sharpener``.

    Args:
        guide: a guide with a sharpener; all other parts are removed from it.
    """

    def __init__(self, guide: Guide) -> None:
        super().__init__()
        for name in [*dict(guide.named_children()), *dict(guide.named_parameters(recurse=False))]:
            if name != "sharpener":
                setattr(guide, name, None)
        self.guide = guide

    def forward(self, encoder_hidden_states: Tensor, negative: Tensor, empty: Tensor, guidance: Tensor) -> Tensor:
        sharpener = self.guide.sharpener
        assert isinstance(sharpener, Sharpener)
        return sharpener(encoder_hidden_states, negative, empty, guidance)


def without_sharpener(guide: Guide) -> Guide:
    """Remove a guide's sharpener, for use with text states that are already sharpened."""
    if guide.sharpener is not None:
        guide.sharpener = None
        guide.register_to_config(sharpener_width=None)
    return guide


def with_new_sharpener(guide: Guide, width: int) -> Guide:
    """A copy of ``guide`` with an untrained sharpener of inner width ``width``, which is its only trainable part.

    Raises:
        InputError: if it already supports negative prompts, its class does not support a sharpener, or it is of
            stage 2, whose targets are not the teacher's.
    """
    name = type(guide).__name__
    if guide.negative_prompts:
        raise InputError(f"this {name} already supports negative prompts; pass one that was distilled without")
    if "sharpener_width" not in guide.config:
        raise InputError(f"a {name} does not support a sharpener; distil it with --negative 0.3")
    if guide.sampling_steps is not None:
        raise InputError(
            f"this {name} was distilled for {guide.sampling_steps} steps, whose targets are not the teacher's; sharpen "
            "the stage 1 guide"
        )
    config = {k: v for k, v in guide.config.items() if not k.startswith("_")}
    copy = type(guide).from_config(config | {"sharpener_width": width})
    assert copy.sharpener is not None
    copy.load_state_dict(guide.state_dict() | {f"sharpener.{k}": v for k, v in copy.sharpener.state_dict().items()})
    copy.requires_grad_(False).sharpener.requires_grad_(True)
    return copy
