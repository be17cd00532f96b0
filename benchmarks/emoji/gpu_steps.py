"""Fewer steps on a GPU: progressive distillation whose states advance on the device, for guides and for a LoRA.

The method of ``pnp_trt.distill.steps`` (Salimans & Ho 2022, algorithm 2), with trajectories that advance with every
optimizer step instead of states that are collected first.  No operation in a step waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pnp_trt.sampling.schedules import ddim, ddim_step

from .train import scheduler_config

#: steps of the student after each halving; the first teacher takes ``FIRST`` steps
CHAIN, FIRST = (16, 8, 4), 32
LORA_CHAIN = (16, 8)
#: layers that the step LoRA changes: attention's projections and those of the time embedding
LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "linear_1", "linear_2", "time_emb_proj")
LORA_RANK = 8

#: (x_t, t, text, w) → the prediction that a sampler uses
Predictor = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class HalvedStates:
    """Trajectories of a student with ``steps`` steps, and the targets: results of two steps of the last student.

    They start at different steps, so that every batch contains all of them.  A share ``own`` of the trajectories
    follows the new student, the others the last one.  The predictions of the loss advance them.

    Args:
        latents: latents of images, ``[pairs, variants, C, H, W]``; noised, they are the first trajectories' starts.
        prompts: text states ``[P, tokens, D]``.
    """

    def __init__(self, latents: Tensor, prompts: Tensor, batch: int, steps: int, own: float = 0.5) -> None:
        device, config = latents.device, scheduler_config()
        self.prompts, self.steps, self.own = prompts, steps, own
        schedule = ddim(config, steps)
        first, second, middles = [], [], []
        for t in schedule.timesteps.tolist():
            after = t - config["num_train_timesteps"] // steps
            middle = max(0, round((t + after) / 2))
            first.append(ddim_step(config, t, middle))
            second.append(ddim_step(config, middle, after))
            middles.append(middle)
        whole = list(zip(schedule.x_scale.tolist(), schedule.output_scale.tolist(), strict=True))
        #: (scale of the latent, scale of the prediction) of both steps and of the single step that replaces them
        self.scales = torch.tensor([first, second, whole], dtype=torch.float32, device=device)
        self.times = torch.tensor([schedule.timesteps.tolist(), middles], device=device)
        weight = self.scales[2, :, 1].square()
        self.weight = weight / weight.mean()
        self.k = torch.arange(batch, device=device) % steps
        noise_share = torch.from_numpy(schedule.noise_scale).float().to(device)[self.k][:, None, None, None]
        pair = torch.randint(len(latents), (batch,), device=device)
        self.x = (1 - noise_share**2).sqrt() * latents[pair, 0] + noise_share * torch.randn_like(latents[pair, 0])
        self.prompt = torch.randint(len(prompts), (batch,), device=device)
        self.w = 1 + 8 * torch.rand(batch, device=device)
        self.student = torch.rand(batch, device=device) < own

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x_t, t, text, w) of the current step."""
        # copies, as the backward pass may read them after the trajectories have advanced
        x = self.x.clone(memory_format=torch.channels_last)
        return x, self.times[0, self.k], self.prompts[self.prompt], self.w.clone()

    def _step(self, which: int, x: Tensor, prediction: Tensor) -> Tensor:
        scale, out = self.scales[which, self.k].unbind(-1)
        return scale[:, None, None, None] * x + out[:, None, None, None] * prediction.float()

    @torch.no_grad()
    def landing(self, last: Predictor) -> tuple[Tensor, Tensor]:
        """Result of two steps of the last student, and the prediction with which one step gives the same result."""
        x, t, text, w = self.batch()
        between = self._step(0, x, last(x, t, text, w))
        landed = self._step(1, between, last(between, self.times[1, self.k], text, w))
        scale, out = self.scales[2, self.k].unbind(-1)
        return landed, (landed - scale[:, None, None, None] * x) / out[:, None, None, None]

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Squared error of each state, weighted by its effect on the step's result, ``[N]``."""
        return (prediction.float() - target).pow(2).flatten(1).mean(1) * self.weight[self.k]

    @torch.no_grad()
    def advance(self, landed: Tensor, prediction: Tensor) -> None:
        """Advance every trajectory by one step; finished ones are replaced by new ones."""
        x = torch.where(self.student[:, None, None, None], self._step(2, self.x, prediction), landed)
        n, device, k = len(x), x.device, self.k + 1
        over = (k >= self.steps) | ~torch.isfinite(x).flatten(1).all(1)
        self.x.copy_(torch.where(over[:, None, None, None], torch.randn_like(x), x))
        self.k.copy_(torch.where(over, torch.zeros_like(k), k))
        self.prompt.copy_(torch.where(over, torch.randint(len(self.prompts), (n,), device=device), self.prompt))
        self.w.copy_(torch.where(over, 1 + 8 * torch.rand(n, device=device), self.w))
        self.student.copy_(torch.where(over, torch.rand(n, device=device) < self.own, self.student))


def halving_loss(new: Predictor, last: Predictor, states: HalvedStates) -> Callable[[], Tensor]:
    """The new student's weighted squared error on fresh states."""

    def loss_of() -> Tensor:
        landed, target = states.landing(last)
        prediction = new(*states.batch())
        loss = states.error(prediction, target).mean()
        states.advance(landed, prediction.detach())
        return loss

    return loss_of


@torch.no_grad()
def landing_error(new: Predictor, last: Predictor, states: HalvedStates, rounds: int) -> dict[str, float]:
    """Mean weighted squared error of a single step of the last student (``before``) and the new one (``after``)."""
    sums = torch.zeros(2, dtype=torch.float64)
    for _ in range(rounds):
        landed, target = states.landing(last)
        inputs = states.batch()
        prediction = new(*inputs)
        for row, predicted in enumerate((last(*inputs), prediction)):
            sums[row] += float(states.error(predicted, target).mean())
        states.advance(landed, prediction)
    before, after = (float(v) / rounds for v in sums)
    return {"states": rounds * len(states.x), "before": before, "after": after, "residual": after / before}


def with_cfg(unet: Any, empty: Tensor) -> Predictor:
    """Classifier-free guidance in one doubled batch; ``empty`` is ``[1, tokens, D]``."""
    from pnp_trt.models.student import cfg

    def predict(x: Tensor, t: Tensor, text: Tensor, w: Tensor) -> Tensor:
        return cfg(unet, x, t, text, empty.expand(len(x), -1, -1), w)

    return predict


# -------------------------------------------------------------------------------------------------------- LoRA


class LowRank(nn.Module):
    """A weight ``[out, in, …]`` plus B·A of a rank (Hu et al. 2021); B starts at zero, and alpha is the rank."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        a = torch.randn(rank, columns, device=weight.device) / math.sqrt(columns)
        self.a, self.b = nn.Parameter(a), nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).view_as(weight)


def lora_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """The layers that :func:`add_lora` changes, by name."""
    return {n: m for n, m in unet.named_modules() if n.endswith(LORA_LAYERS) and isinstance(m, nn.Linear | nn.Conv2d)}


def add_lora(unet: nn.Module, rank: int = LORA_RANK) -> nn.Module:
    """Freeze ``unet`` and add trainable low-rank changes to its layers; return it."""
    unet.requires_grad_(False)
    for layer in lora_layers(unet).values():
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight.detach(), rank))
    return unet


def lora_state(unet: nn.Module) -> dict[str, Tensor]:
    """The LoRA of :func:`add_lora` under diffusers' keys; weights of 1×1 convolutions have two more dimensions."""
    out = {}
    for name, layer in lora_layers(unet).items():
        low_rank: Any = layer.parametrizations.weight[0]
        ones = (1, 1) if isinstance(layer, nn.Conv2d) else ()
        out[f"unet.{name}.lora_A.weight"] = low_rank.a.detach().reshape(*low_rank.a.shape, *ones)
        out[f"unet.{name}.lora_B.weight"] = low_rank.b.detach().reshape(*low_rank.b.shape, *ones)
    return out


@torch.no_grad()
def merge_lora(unet: nn.Module) -> nn.Module:
    """Merge the LoRA, rounded to float16 as when stored, into the weights; return ``unet`` without parametrizations."""
    for layer in lora_layers(unet).values():
        low_rank: Any = layer.parametrizations.weight[0]
        for p in (low_rank.a, low_rank.b):
            p.copy_(p.half().float())
        parametrize.remove_parametrizations(layer, "weight")
    return unet.requires_grad_(False)
