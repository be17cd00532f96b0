"""A teacher's conditions: text states, and for SDXL pooled text and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import wrappers


@dataclass
class Conditions:
    """Text conditions of a list of prompts; the last row is the empty prompt.

    Attributes:
        states: ``[P + 1, tokens, D]`` float32.
        pooled: SDXL's pooled text, ``[P + 1, D2]``, or None.
        time_ids: SDXL's sizes and crop, ``[6]``, or None.
    """

    states: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    @property
    def empty(self) -> int:
        """Row of the empty prompt."""
        return len(self.states) - 1

    def text(self, rows: Tensor, device: torch.device) -> Tensor:
        """Text states of these prompts, ``[N, tokens, D]``."""
        return self.states[rows].to(device)

    def added(self, rows: Tensor, device: torch.device) -> dict[str, Tensor] | None:
        """The U-Net's ``added_cond_kwargs`` for these prompts; None if it takes none."""
        if self.pooled is None or self.time_ids is None:
            return None
        return {"text_embeds": self.pooled[rows].to(device), "time_ids": self.time_ids.to(device).expand(len(rows), -1)}


@torch.no_grad()
def encode_prompts(base: Any, prompts: list[str], device: torch.device, batch: int = 64) -> Conditions:
    """Encode ``prompts`` as diffusers' pipelines do; prompts longer than the encoder's length are truncated.

    Args:
        base: a :class:`~pnp_trt.models.teacher.BaseModel`.
    """
    parts: list[Tensor] = []
    pooled: list[Tensor] = []
    rows = [*prompts, ""]
    encoders = []
    for spec, (tokenizer, encoder) in zip(base.text_specs, base.text_encoders(), strict=True):
        encoders.append((tokenizer, getattr(wrappers, spec.wrapper)(encoder.to(device))))
    for i in range(0, len(rows), batch):
        states = []
        for tokenizer, encoder in encoders:
            ids = tokenizer(
                rows[i : i + batch], padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                return_tensors="pt",
            ).input_ids  # fmt: skip
            out = encoder(ids.to(device))
            if isinstance(out, tuple):
                out, projected = out
                pooled.append(projected.float().cpu())
            states.append(out)
        parts.append(torch.cat(states, -1).float().cpu())
    all_states = torch.cat(parts)
    if not pooled:
        return Conditions(all_states)
    all_pooled = torch.cat(pooled)
    if base.zero_empty_prompt():
        all_states[-1].zero_()
        all_pooled[-1].zero_()
    sizes = base.sizes()
    height, width = (float(sizes.factor * side) for side in sizes.latent[1:])
    return Conditions(all_states, all_pooled, torch.tensor([height, width, 0.0, 0.0, height, width]))
