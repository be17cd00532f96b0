"""Training of the bundled model on a GPU, within minutes: base, decoder, fine-tunes and guides.

``python -m benchmarks.emoji.gpu_train pack`` renders the data and tokenizes the captions into one file (no GPU).
``python -m benchmarks.emoji.gpu_train train --data FILE --out FOLDER`` trains each part for a number of seconds. An
optimizer step is one CUDA graph: random numbers, forward, backward, clipping, optimizer and weight average.
``python -m benchmarks.emoji.gpu_train unpack --from FOLDER`` copies the weights into the package's assets.
``python -m benchmarks.emoji.gpu_train guides --from FOLDER`` writes a folder of guides for the tables, including the
full one and the step LoRA's, which are not shipped.

The U-Net is small (6.9 M parameters, 16 × 16 latents), so an eager step is limited by its kernel launches.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gpu_steps import (
    CHAIN,
    FIRST,
    LORA_CHAIN,
    LORA_RANK,
    HalvedStates,
    add_lora,
    halving_loss,
    landing_error,
    lora_state,
    merge_lora,
    with_cfg,
)  # fmt: skip
from .train import alphas_cumprod, min_snr_error, reconstruction_error

CAPTION_FORMS = 6
#: optimizer steps of each part without a GPU, enough to check that everything runs
CPU_STEPS = 3
#: shares of the forms of :func:`caption_forms`: with and without style; plain, "a", "the"
FORM_SHARES = (0.595, 0.105, 0.13, 0.02, 0.125, 0.025)


def caption_forms(concept: str, style: str) -> list[str]:
    """The training captions of one image, in the order of :data:`FORM_SHARES`."""
    from .data import caption

    out = []
    for article in (False, "a", "the"):
        for word in (style, None):
            text = caption(concept, word)
            if article == "a":
                text = ("an " if text[0] in "aeiou" else "a ") + text
            elif article:
                text = "the " + text
            out.append(text)
    return out


# ------------------------------------------------------------------------------------------------------ data


def pack(out: Path, cache: Path) -> None:
    """Write the pixels of the trained concepts in all four styles, and the token ids of every caption form."""
    from pnp_trt.models.bases import resolve

    from .data import BASE_STYLES, FINE_TUNE_STYLES, images, split

    tokenizer = resolve("emoji").tokenizer()

    def ids(texts: list[str]) -> np.ndarray:
        tokens = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="np")
        return tokens["input_ids"].astype(np.uint16)

    arrays: dict[str, np.ndarray] = {"empty": ids([""])}
    concepts = split()["train"]
    for name, styles, variants, keep in (
        ("base", BASE_STYLES, 5, 5), ("flat", FINE_TUNE_STYLES[:1], 5, 2), ("3d", FINE_TUNE_STYLES[1:], 5, 2),
    ):  # fmt: skip
        shots = images(styles, concepts, cache, variants)
        pixels = shots.pixels.reshape(-1, variants, *shots.pixels.shape[1:])[:, :keep]
        pairs = list(zip(shots.concepts[::variants], shots.styles[::variants], strict=True))
        arrays[f"{name}.pixels"] = np.ascontiguousarray(pixels)
        arrays[f"{name}.ids"] = ids([t for c, s in pairs for t in caption_forms(c, s)]).reshape(len(pairs), -1, 77)
    arrays["prompts"] = ids(Path("calibration/emoji-prompts.txt").read_text().splitlines())
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, **arrays)
    print({k: v.shape for k, v in arrays.items()}, out.stat().st_size)


# ------------------------------------------------------------------------------------------------ optimisation


class MuonAdamW:
    """Muon for hidden matrices and kernels, AdamW for the rest, with the learning rate in device memory.

    ``torch.optim.Muon`` reads its learning rate on the host, which a CUDA graph would freeze, and orthogonalizes matrix
    by matrix, which takes many launches.  Here, matrices of one shape are orthogonalized together (Jordan et al. 2024;
    the step size is matched to AdamW's, Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2).
    """

    def __init__(self, module: nn.Module, lr: Tensor, weight_decay: float = 0.01, muon: bool = True) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        other = []
        for name, p in module.named_parameters():
            if not p.requires_grad:
                continue
            outer = p.ndim < 2 or "embedding" in name or name.endswith(("conv_in.weight", "conv_out.weight"))
            if outer or not muon or min(p.shape[0], p[0].numel()) < 8:
                other.append(p)
            else:
                groups.setdefault((p.shape[0], p[0].numel()), []).append(p)
        self.groups = [(ps, torch.zeros(len(ps), *shape, device=lr.device)) for shape, ps in groups.items()]
        self.adamw = torch.optim.AdamW(
            other, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99), capturable=lr.is_cuda, foreach=lr.is_cuda
        ) if other else None  # fmt: skip

    def parameters(self) -> list[nn.Parameter]:
        params = [p for ps, _ in self.groups for p in ps]
        return params + ([p for g in self.adamw.param_groups for p in g["params"]] if self.adamw else [])

    @torch.no_grad()
    def step(self) -> None:
        for ps, momentum in self.groups:
            grad = torch.stack([p.grad.reshape(p.shape[0], -1) for p in ps if p.grad is not None])
            momentum.lerp_(grad, 0.05)
            update = orthogonalized(grad.lerp(momentum, 0.95))
            update = update * (0.2 * math.sqrt(max(update.shape[-2:])))
            for p, u in zip(ps, update, strict=True):
                p.mul_(1 - self.lr * self.weight_decay)
                p.sub_(self.lr * u.view_as(p))
        if self.adamw is not None:
            self.adamw.step()

    def zero_grad(self) -> None:
        for p in self.parameters():
            p.grad = None


def orthogonalized(x: Tensor) -> Tensor:
    """Matrices ``[N, R, C]`` → nearly orthogonal ones, by the quintic Newton–Schulz iteration of Jordan et al. 2024."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


@dataclass
class Trainer:
    """Repeats one optimizer step for a number of seconds; on a GPU the step is captured into a graph once.

    Attributes:
        loss_of: returns the loss on fresh random data; it must not wait for the device.
        lr: peak learning rate; constant for a share ``constant`` of the seconds, then decays to zero along a cosine.
        max_steps: ends the training if reached before the seconds are over; the rate then depends on the steps.
        warmup: steps in which the rate rises to its peak.
    """

    name: str
    module: nn.Module
    loss_of: Callable[[], Tensor]
    lr: float
    seconds: float
    constant: float = 0.6
    ema: float = 0.9995
    muon: bool = True
    max_steps: int | None = None
    warmup: int = 200
    graph: Any = None
    log: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = next(self.module.parameters()).device
        self.rate = torch.zeros((), device=self.device)
        self.smooth = torch.zeros((), device=self.device)
        self.optimizer = MuonAdamW(self.module, self.rate, muon=self.muon)
        self.live = [p for p in self.module.parameters() if p.requires_grad]
        self.shadow = [p.detach().clone() for p in self.live]

    def _step(self) -> None:
        loss = self.loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(self.live, 1.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.shadow, self.live, 1 - self.ema)
            self.smooth.lerp_(loss.detach().float(), 0.02)

    def _capture(self) -> None:
        """Warm up on a side stream at a learning rate of zero, then capture; run without a graph if that fails."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
                self.optimizer.zero_grad()
        torch.cuda.current_stream().wait_stream(side)
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self.graph = graph
        except Exception as e:
            print(f"{self.name}: no CUDA graph: {type(e).__name__}: {str(e).splitlines()[0]}", flush=True)
            torch.cuda.synchronize()
            self.optimizer.zero_grad()

    def run(self, every: Callable[[float], None] | None = None) -> dict[str, Any]:
        """Train; ``every`` is called about once a minute with the completed share."""
        begun = time.monotonic()
        if self.device.type == "cuda":
            self._capture()
        started = reported = saved = time.monotonic()
        step, trouble, lr = 0, 0, self.lr
        averaged = False
        snapshot = [p.detach().clone() for p in self.live]
        while True:
            spent = time.monotonic() - started
            done = spent / self.seconds
            if self.max_steps is not None:
                done = max(done, step / self.max_steps)
            if done >= 1:
                break
            if not averaged and done > 0.25:
                torch._foreach_copy_(self.shadow, self.live)
                averaged = True
            tail = max(0.0, done - self.constant) / (1 - self.constant)
            self.rate.fill_(lr * min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * tail)))
            for _ in range(20 if self.max_steps is None else min(20, self.max_steps - step)):
                if self.graph is not None:
                    self.graph.replay()
                else:
                    self._step()
                    self.optimizer.zero_grad()
                step += 1
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.monotonic()
            if now - reported > 5 or step == self.max_steps:
                value = float(self.smooth) / (1 - 0.98**step)
                if not math.isfinite(value):
                    trouble += 1
                    lr /= 3
                    if trouble > 3:
                        raise RuntimeError(f"{self.name}: the loss is not finite")
                    print(
                        f"{self.name}: the loss is not finite at step {step}; restored the last good weights, rate {lr}"
                    )
                    with torch.no_grad():
                        torch._foreach_copy_(self.live, snapshot)
                        torch._foreach_copy_(self.shadow, snapshot)
                        for _, momentum in self.optimizer.groups:
                            momentum.zero_()
                        for state in (self.optimizer.adamw.state if self.optimizer.adamw else {}).values():
                            for v in state.values():
                                v.zero_()
                        self.smooth.zero_()
                else:
                    torch._foreach_copy_(snapshot, self.live)
                    self.log.append({"seconds": round(now - started, 1), "step": step, "loss": value})
                    print(f"{self.name}: {now - started:.0f} s, step {step}, loss {value:.5f}", flush=True)
                reported = now
            if every is not None and now - saved > 60:
                every(done)
                saved = time.monotonic()
        with torch.no_grad():
            torch._foreach_copy_(self.live, self.shadow)
        self.optimizer.zero_grad()
        return {
            "steps": step, "seconds": round(time.monotonic() - started, 1),
            "preparation_seconds": round(started - begun, 1), "lr": self.lr, "optimizer": "muon" if self.muon else
            "adamw", "ema": self.ema, "captured": self.graph is not None, "restarts": trouble,
            "log": self.log[:-1:6] + self.log[-1:],
        }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ model


def text_states(encoder: nn.Module, ids: Tensor) -> Tensor:
    """CLIP's text transformer on ids ``[B, 77]`` → states ``[B, 77, D]``, in operations that can be captured."""
    model = getattr(encoder, "text_model", encoder)
    x = model.embeddings.token_embedding(ids) + model.embeddings.position_embedding.weight[: ids.shape[1]]
    for layer in model.encoder.layers:
        a = layer.self_attn
        h = layer.layer_norm1(x)
        q, k, v = (
            p(h).unflatten(-1, (a.num_heads, -1)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj)
        )  # fmt: skip
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + a.out_proj(h)
        h = layer.mlp.fc1(layer.layer_norm2(x))
        x = x + layer.mlp.fc2(h * torch.sigmoid(1.702 * h))
    return model.final_layer_norm(x)


class Base(nn.Module):
    """U-Net and text encoder, trained together; the token table is frozen."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        model = getattr(text_encoder, "text_model", text_encoder)
        model.embeddings.token_embedding.requires_grad_(False)


class Data:
    """Latents ``[pairs, variants, C, 16, 16]`` and token ids ``[pairs, forms, 77]`` of one set, on the device."""

    def __init__(self, arrays: Any, name: str, vae: Any, device: torch.device) -> None:
        self.pixels = torch.from_numpy(arrays[f"{name}.pixels"]).to(device)
        flat = self.pixels.flatten(0, 1)
        rows = [
            vae.encode(flat[i : i + 512].permute(0, 3, 1, 2).float().div(127.5).sub(1)).latents
            for i in range(0, len(flat), 512)
        ]
        self.raw = torch.cat(rows).unflatten(0, self.pixels.shape[:2])
        self.latents = self.raw * vae.config.scaling_factor
        self.ids = torch.from_numpy(arrays[f"{name}.ids"].astype(np.int64)).to(device)


def alphas(device: torch.device) -> Tensor:
    """ᾱ of the bundled model's schedule."""
    return alphas_cumprod().to(device)


def diffusion_loss(
    unet: nn.Module, states_of: Callable[[Tensor, Tensor, Tensor], Tensor], data: Data, batch: int, centred: float,
    drop: float = 0.1,
) -> Callable[[], Tensor]:  # fmt: skip
    """Min-SNR-5 weighted ε loss (Hang et al. 2023, eq. 8), as in the CPU recipe, on random data on the device."""
    device = data.latents.device
    abar = alphas(device)
    edges = torch.tensor(FORM_SHARES).cumsum(0)[:-1].to(device)
    ladder = torch.arange(batch, device=device)
    pairs, variants = data.latents.shape[:2]

    def loss_of() -> Tensor:
        pair = torch.randint(pairs, (batch,), device=device)
        middle = torch.rand(batch, device=device) < centred
        variant = torch.where(middle, torch.zeros_like(pair), torch.randint(variants, (batch,), device=device))
        form = torch.bucketize(torch.rand(batch, device=device), edges)
        dropped = torch.rand(batch, device=device) < drop
        x = data.latents[pair, variant]
        noise = torch.randn_like(x)
        t = ((ladder + torch.rand(batch, device=device)) / batch * 1000).long().clamp(0, 999)
        a = abar[t][:, None, None, None]
        noisy = (a.sqrt() * x + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            context = states_of(pair, form, dropped)
            prediction = unet(noisy, t, context, return_dict=False)[0]
        return min_snr_error(prediction, noise, a)

    return loss_of


def decoder_loss(vae: Any, sets: list[Data], batch: int) -> Callable[[], Tensor]:
    """The CPU recipe's decoder loss: L1 on pixels and their differences, and squared error; latents slightly noisy."""
    device = sets[0].latents.device
    pixels = torch.cat([d.pixels[:, :2].flatten(0, 1) for d in sets])
    latents = torch.cat([d.raw[:, :2].flatten(0, 1) for d in sets])

    def loss_of() -> Tensor:
        rows = torch.randint(len(pixels), (batch,), device=device)
        z = latents[rows]
        z = z + 0.06 * torch.rand(batch, 1, 1, 1, device=device) * torch.randn_like(z)
        target = pixels[rows].permute(0, 3, 1, 2).float().div(127.5).sub(1)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            decoded = vae.decode(z.contiguous(memory_format=torch.channels_last)).sample
        return reconstruction_error(decoded, target)

    return loss_of


# ----------------------------------------------------------------------------------------------------- guides


class GuideStates:
    """States to distil on, new in every optimizer step: noised images, and trajectories that advance by one step.

    Half of a batch are noised training images (forward states).  The other half are DDIM trajectories of 8, 16, 20 or
    50 steps; half of those follow classifier-free guidance and half the student's own predictions (Ross et al. 2011,
    "A Reduction of Imitation Learning and Structured Prediction to No-Regret Online Learning").  The predictions of the
    loss advance them, so that they cost no further evaluation.
    """

    COUNTS = (8, 16, 20, 50)

    def __init__(
        self, data: Data, prompts: Tensor, captions: Tensor, batch: int, own: float = 0.5,
        counts: tuple[int, ...] = COUNTS,
    ) -> None:  # fmt: skip
        device = data.latents.device
        self.data, self.prompts, self.captions, self.own = data, prompts, captions, own
        self.half = batch // 2
        self.abar = torch.cat([alphas(device), torch.ones(1, device=device)])
        self.times = torch.full((len(counts), max(counts) + 1), 1000, device=device)
        for row, count in enumerate(counts):
            # trailing steps, as in the bundled scheduler; the last one ends at ᾱ_0 (set_alpha_to_one is off)
            steps = np.round(np.arange(1000, 0, -1000 / count)).astype(np.int64) - 1
            self.times[row, :count] = torch.from_numpy(steps)
            self.times[row, count] = 0
        self.counts = torch.tensor(counts, device=device)
        n = self.half
        self.x = torch.randn(n, *data.latents.shape[2:], device=device)
        self.row = torch.randint(len(self.counts), (n,), device=device)
        self.k = torch.zeros(n, dtype=torch.long, device=device)
        self.prompt = torch.randint(len(prompts), (n,), device=device)
        self.w = 1 + 8 * torch.rand(n, device=device)
        self.student = torch.rand(n, device=device) < own

    def stagger(self) -> None:
        """Start the trajectories at different steps, on noised images, so that those of one count do not coincide."""
        self.k.copy_(torch.arange(self.half, device=self.k.device) % self.counts[self.row])
        a = self.abar[self.times[self.row, self.k]][:, None, None, None]
        pair = torch.randint(len(self.data.latents), (self.half,), device=self.k.device)
        self.x.copy_(a.sqrt() * self.data.latents[pair, 0] + (1 - a).sqrt() * torch.randn_like(self.x))

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x_t, t, text, w) of the current step; the trajectories are the second half."""
        device, n = self.x.device, self.half
        pair = torch.randint(len(self.data.latents), (n,), device=device)
        variant = torch.randint(self.data.latents.shape[1], (n,), device=device)
        x0 = self.data.latents[pair, variant]
        t = ((torch.arange(n, device=device) + torch.rand(n, device=device)) / n * 1000).long().clamp(0, 999)
        a = self.abar[t][:, None, None, None]
        noisy = a.sqrt() * x0 + (1 - a).sqrt() * torch.randn_like(x0)
        w = 1 + 8 * torch.rand(n, device=device)
        here = self.times[self.row, self.k]
        text = torch.cat([self.captions[pair], self.prompts[self.prompt]])
        return torch.cat([noisy, self.x]), torch.cat([t, here]), text, torch.cat([w, self.w])

    @torch.no_grad()
    def advance(self, target: Tensor, prediction: Tensor) -> None:
        """Advance every trajectory by one DDIM step; finished ones are replaced by new ones."""
        n, device = self.half, self.x.device
        own = self.student[:, None, None, None]
        e = torch.where(own, prediction[n:].float(), target[n:].float())
        a = self.abar[self.times[self.row, self.k]][:, None, None, None]
        b = self.abar[self.times[self.row, self.k + 1]][:, None, None, None]
        x = b.sqrt() * (self.x - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
        k = self.k + 1
        over = (k >= self.counts[self.row]) | ~torch.isfinite(x).flatten(1).all(1)
        self.x.copy_(torch.where(over[:, None, None, None], torch.randn_like(x), x))
        self.k.copy_(torch.where(over, torch.zeros_like(k), k))
        self.row.copy_(torch.where(over, torch.randint(len(self.counts), (n,), device=device), self.row))
        self.prompt.copy_(torch.where(over, torch.randint(len(self.prompts), (n,), device=device), self.prompt))
        self.w.copy_(torch.where(over, 1 + 8 * torch.rand(n, device=device), self.w))
        self.student.copy_(torch.where(over, torch.rand(n, device=device) < self.own, self.student))


class NegativeStates(GuideStates):
    """States with a negative prompt each, chosen like the prompts; CFG's trajectories use it too."""

    def __init__(self, data: Data, prompts: Tensor, captions: Tensor, batch: int, own: float = 0.5) -> None:
        super().__init__(data, prompts, captions, batch, own)
        self.negative = torch.randint(len(prompts), (self.half,), device=self.x.device)

    def negatives(self) -> Tensor:
        """Text states of the negative prompts of a batch, ``[B, tokens, D]``; the trajectories' are the second half."""
        fresh = torch.randint(len(self.prompts), (self.half,), device=self.x.device)
        return self.prompts[torch.cat([fresh, self.negative])]

    @torch.no_grad()
    def advance(self, target: Tensor, prediction: Tensor) -> None:
        super().advance(target, prediction)
        begun = self.k == 0
        fresh = torch.randint(len(self.prompts), (self.half,), device=self.x.device)
        self.negative.copy_(torch.where(begun, fresh, self.negative))


#: (x_t, t, text, w, the frozen encoder's time embedding and features) → prediction
Predict = Callable[[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Any]], Tensor]


def guided(unet: Any, guide: Any) -> Predict:
    """The prediction with a guide, from features that the frozen encoder has already computed."""
    from pnp_trt.models.guides import Features, GuideInput
    from pnp_trt.models.student import decode

    def predict(x: Tensor, t: Tensor, text: Tensor, w: Tensor, encoded: tuple[Tensor, Features]) -> Tensor:
        emb, features = encoded
        added = guide(GuideInput(x, t, text, w, features))
        skips = tuple(
            s if r is None else s + r
            for s, r in zip(features.down_block_res_samples, added.down_block_res_samples, strict=True)
        )
        whole = Features(skips, features.mid_block_res_sample + added.mid_block_res_sample)
        return decode(unet, emb, whole, text)

    return predict


def distillation_loss(unet: Any, predict: Predict, states: GuideStates, empty: Tensor) -> Callable[[], Tensor]:
    """Weighted squared error of ``predict`` to eps_w (the paper's formula I), x0 weighting over w, on fresh states."""
    from pnp_trt.models.student import decode, encode

    by_time = x0_weights(empty.device)

    def loss_of() -> Tensor:
        with torch.no_grad():
            x, t, text, w = states.batch()
            n = len(x)
            x = x.contiguous(memory_format=torch.channels_last)
            emb, features = encode(unet, x, t, text)
            conditional = decode(unet, emb, features, text)
            unconditional = unet(x, t, empty.expand(n, -1, -1), return_dict=False)[0]
            target = unconditional + w[:, None, None, None] * (conditional - unconditional)
        prediction = predict(x, t, text, w, (emb, features))
        weight = by_time[t] / w
        loss = ((prediction - target) ** 2 * weight[:, None, None, None]).mean()
        states.advance(target, prediction.detach())
        return loss

    return loss_of


def x0_weights(device: torch.device) -> Tensor:
    """Weight of each timestep's error, ``[1000]``, with mean 1: that of the squared x0 error, (1 − ᾱ)/ᾱ, at most 5."""
    abar = alphas(device)
    weights = ((1 - abar) / abar).clamp(max=5.0)
    return weights / weights.mean()


def negative_loss(
    unet: Any, predict: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor], states: NegativeStates
) -> Callable[[], Tensor]:
    """:func:`distillation_loss` with a negative prompt for each state.

    Args:
        predict: (x_t, t, text, w, text states of the negative prompts) → prediction.
    """
    by_time = x0_weights(states.x.device)

    def loss_of() -> Tensor:
        x, t, text, w = states.batch()
        negative = states.negatives()
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            conditional = unet(x, t, text, return_dict=False)[0]
            unconditional = unet(x, t, negative, return_dict=False)[0]
            target = unconditional + w[:, None, None, None] * (conditional - unconditional)
        prediction = predict(x, t, text, w, negative)
        loss = ((prediction - target) ** 2 * (by_time[t] / w)[:, None, None, None]).mean()
        states.advance(target, prediction.detach())
        return loss

    return loss_of


def sharpening_loss(unet: Any, guide: Any, states: NegativeStates, empty: Tensor) -> Callable[[], Tensor]:
    """:func:`negative_loss` of a guide with a sharpener."""
    from pnp_trt.models.student import Student

    student = Student(unet, guide)

    def predict(x: Tensor, t: Tensor, text: Tensor, w: Tensor, negative: Tensor) -> Tensor:
        return student(x, t, text, w, negative=negative, empty=empty.expand_as(text))

    return negative_loss(unet, predict, states)


def guide_loss(unet: Any, guide: Any, states: GuideStates, empty: Tensor) -> Callable[[], Tensor]:
    """:func:`distillation_loss` of a guide."""
    return distillation_loss(unet, guided(unet, guide), states, empty)


def guide_error(unet: Any, guide: Any, states: GuideStates, empty: Tensor, rounds: int) -> dict[str, Any]:
    """:func:`prediction_error` of a guide."""
    from pnp_trt.models.student import Student

    return prediction_error(unet, Student(unet, guide), states, empty, rounds)


@torch.no_grad()
def prediction_error(
    unet: Any, predict: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], states: GuideStates, empty: Tensor,
    rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """Share of the guidance left unexplained, length and cosine of the change, over five bins of time.

    Args:
        predict: (x_t, t, text, w) → prediction; compared with the teacher's eps_w, both minus eps(c), over w − 1.
        rounds: number of batches of ``states``.
    """
    sums = torch.zeros(5, 4, device=empty.device, dtype=torch.float64)
    for _ in range(rounds):
        x, t, text, w = states.batch()
        x = x.contiguous(memory_format=torch.channels_last)
        n = len(x)
        c = unet(x, t, text, return_dict=False)[0]
        u = unet(x, t, empty.expand(n, -1, -1), return_dict=False)[0]
        target = u + w[:, None, None, None] * (c - u)
        prediction = predict(x, t, text, w)
        scale = (w - 1).clamp(min=1e-3)[:, None, None, None]
        a, b = ((target - c) / scale).double().flatten(1), ((prediction - c) / scale).double().flatten(1)
        rows = torch.stack([(a * a).sum(1), (b * b).sum(1), (a * b).sum(1), ((a - b) ** 2).sum(1)], 1)
        sums.index_add_(0, (t // 200).clamp(0, 4), rows)
        states.advance(target, prediction)
    names = ("0-199", "200-399", "400-599", "600-799", "800-999")

    def figures(r: Tensor) -> dict[str, float]:
        aa, bb, ab, left = (float(v) for v in r)
        return {
            "residual": round(left / max(aa, 1e-30), 4), "length": round(math.sqrt(bb / max(aa, 1e-30)), 4),
            "cosine": round(ab / math.sqrt(max(aa * bb, 1e-30)), 4),
        }  # fmt: skip

    return {"all": figures(sums.sum(0)), **{k: figures(v) for k, v in zip(names, sums, strict=True)}}


@torch.no_grad()
def fitted_gain(unet: Any, guide: Any, states: GuideStates, empty: Tensor, count: int, rounds: int) -> dict[str, Any]:
    """Give the guide a gain of ``count`` values by ``pnp_trt.distill.gain``'s fit, on CFG's trajectories of ``states``.

    Returns:
        The table and the lengths before and after, in the form of a report.
    """
    from pnp_trt.distill.gain import SCALES, fit_table, length_sums, nodes
    from pnp_trt.models.student import Student

    student, n = Student(unet, guide), states.half
    w = torch.tensor(SCALES, device=empty.device)[torch.arange(n, device=empty.device) % len(SCALES)]

    def measured() -> list[float]:
        sums = torch.zeros(2, count, dtype=torch.float64)
        for _ in range(rounds):
            x, t, text, own = (v[n:] for v in states.batch())
            c = unet(x, t, text, return_dict=False)[0]
            u = unet(x, t, empty.expand(n, -1, -1), return_dict=False)[0]
            change = (student(x, t, text, w) - c) / (w - 1)[:, None, None, None]
            sums += length_sums(change, c - u, t, count)
            followed = u + own[:, None, None, None] * (c - u)
            states.advance(torch.cat([followed, followed]), torch.cat([followed, followed]))
        return (sums[0] / sums[1]).sqrt().tolist()

    lengths = fit_table(guide, measured, count)
    return {
        "gain": list(guide.config.gain), "states": rounds * n,
        "length": {"timestep": nodes(count), "before": lengths[0], "after": lengths[-1]},
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- grid


@torch.no_grad()
def sample_grid(
    unet: Any, vae: Any, states: Tensor, empty: Tensor, w: float, path: Path, guide: Any = None, steps: int = 20
) -> None:
    """Write samples of text ``states`` ``[N, 77, D]`` by DDIM, with CFG or a guide, as one row of images."""
    from PIL import Image

    from pnp_trt.models.student import Student

    device, n = states.device, len(states)
    abar = alphas(device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, unet.config.in_channels, 16, 16, generator=generator).to(device)
    times = np.round(np.arange(1000, 0, -1000 / steps)).astype(int) - 1
    student = None if guide is None else Student(unet, guide)
    for i, now in enumerate(times):
        t = torch.full((n,), int(now), device=device)
        if student is not None:
            e = student(x, t, states, torch.full((n,), w, device=device))
        else:
            c = unet(x, t, states, return_dict=False)[0]
            u = unet(x, t, empty.expand(n, -1, -1), return_dict=False)[0]
            e = u + w * (c - u)
        a, b = abar[now], abar[times[i + 1]] if i + 1 < steps else abar[0]
        x = b.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
    pixels = vae.decode(x / vae.config.scaling_factor).sample.div(2).add(0.5).clamp(0, 1).mul(255).round().byte()
    sheet = pixels.permute(0, 2, 3, 1).cpu().numpy()
    Image.fromarray(np.concatenate(list(sheet), 1)).save(path)


# ----------------------------------------------------------------------------------------------------- assets


def unpack(source: Path, assets: Path, results: Path) -> None:
    """Copy the weights of ``train`` into the package's assets, in the same formats and names.

    The untrained parts (token table, encoder of the VAE) are kept from the existing files.

    Raises:
        RuntimeError: if tensors differ in names or shapes from those of the shipped file.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    def replace(path: Path, state: dict[str, Tensor], partly: bool = False) -> None:
        with safe_open(path, "pt") as f:
            metadata = f.metadata()
            own = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        state = {k: v for k, v in state.items() if k in own or not partly}
        if not partly and set(state) != set(own):
            raise RuntimeError(f"{path}: tensor names differ: {sorted(set(state) ^ set(own))[:3]}")
        for k, v in state.items():
            if v.shape != own[k].shape:
                raise RuntimeError(f"{path}: {k} has shape {tuple(own[k].shape)}, but the new one has {tuple(v.shape)}")
        merged = own | {k: v.to(own[k].dtype) for k, v in state.items()}
        beside = path.with_suffix(".part")
        save_file(merged, beside, metadata=metadata)
        beside.chmod(0o644)
        beside.replace(path)

    def text_name(key: str, own: set[str]) -> str:
        """Name of a tensor in the shipped file; versions of transformers differ in a leading ``text_model.``."""
        plain = key.removeprefix("text_model.")
        return plain if plain in own else f"text_model.{plain}"

    if (source / "unet.safetensors").exists():
        replace(assets / "emoji/unet/diffusion_pytorch_model.safetensors", load_file(source / "unet.safetensors"))
    if (source / "small.safetensors").exists():
        small = load_file(source / "small.safetensors")
        path = assets / "emoji/text_encoder/model.safetensors"
        with safe_open(path, "pt") as f:
            own = set(f.keys())
        text = {text_name(k[5:], own): v for k, v in small.items() if k.startswith("text.")}
        text = {k: v for k, v in text.items() if "position_ids" not in k}
        replace(path, {**load_file(path), **text})
        vae = {k[4:]: v for k, v in small.items() if k.startswith("vae.")}
        replace(assets / "emoji/vae/diffusion_pytorch_model.safetensors", vae)
    for name in ("flat", "3d"):
        if (source / f"{name}.safetensors").exists():
            replace(assets / f"fine-tunes/emoji-{name}.safetensors", load_file(source / f"{name}.safetensors"))
    report = json.loads((source / "train.json").read_text())
    former = json.loads(results.read_text()) if results.exists() and "base" not in report["parts"] else None
    results.write_text(json.dumps(with_former(report, former), indent=1) + "\n")
    installer = Installer(source, assets, report)
    if (source / "guide-tiny.safetensors").exists():
        installer.install(assets / "guides/emoji-tiny", "guide tiny", "guide-tiny")
    for count in CHAIN:
        if (source / f"guide-tiny-{count}.safetensors").exists():
            installer.install_steps(assets / f"guides/emoji-tiny-{count}", count)


def with_former(report: dict[str, Any], former: dict[str, Any] | None) -> dict[str, Any]:
    """A run's report, with the parts of the previous record that this run did not train again."""
    if former is None:
        return report
    aged = {k: former[k] for k in ("device", "date", "batch")}
    parts = {name: aged | part for name, part in former["parts"].items()}
    commands = [former["command"], report["command"]]
    lines = [line for c in commands for line in (c if c and isinstance(c[0], list) else [c])]
    return report | {
        "parts": parts | report["parts"], "command": lines, "seconds": round(former["seconds"] + report["seconds"], 1)
    }  # fmt: skip


#: options of the tiny guide: the ablation's best, and the prompt's text states
TINY_OPTIONS = {"text": True, "trunk_kind": "depthwise"}
#: command line of ``train``, without its seconds
COMMAND = "python -m benchmarks.emoji.gpu_train train"


class Installer:
    """Writes weights of ``train`` to guide folders in the format of ``pnp-trt distill``, with their records."""

    def __init__(self, source: Path, assets: Path, report: dict[str, Any]) -> None:
        self.source, self.assets, self.report = source, assets, report
        self.prompts = Path("calibration/emoji-prompts.txt")
        self._teacher: Any = None

    @property
    def teacher(self) -> Any:
        """The bundled model in the assets, loaded on first use."""
        from pnp_trt.distill.run import TeacherModel

        if self._teacher is None:
            lines = self.prompts.read_text().splitlines()
            self._teacher = TeacherModel.load(str(self.assets / "emoji"), lines, torch.device("cpu"))
        return self._teacher

    def _save(self, folder: Path, file: str, kind: str, gain: list[float] | None, steps: int | None) -> Any:
        from safetensors.torch import load_file

        from pnp_trt.distill.run import save_guide
        from pnp_trt.models.guides import GUIDES

        options = TINY_OPTIONS if kind == "tiny" else {}
        guide = GUIDES[kind].from_unet(self.teacher.unet, **options)
        guide.load_state_dict({k: v.float() for k, v in load_file(self.source / f"{file}.safetensors").items()})
        guide.register_to_config(sampling_steps=steps)
        if gain is not None:
            guide.use_gain(gain)
        folder.mkdir(parents=True, exist_ok=True)
        save_guide(guide.float(), folder)
        return guide

    def _record(self, folder: Path, guide: Any, part: dict[str, Any], settings: dict[str, Any], **facts: Any) -> None:
        from pnp_trt.bundle.store import digest, write_json
        from pnp_trt.distill.run import report_head

        settings = settings | {
            "base": "emoji", "prompts": self.prompts.as_posix(), "w_min": 1.0, "w_max": 9.0,
            "train": {k: part[k] for k in ("steps", "lr", "optimizer", "ema")} | {"batch": self.report["batch"]},
            "command": COMMAND,
        }  # fmt: skip
        head = report_head(self.teacher, guide, settings, part["seconds"])
        head |= {"device": self.report["device"], "date": self.report["date"]}
        head["versions"] |= {"torch": self.report["torch"]}
        identity = {"teacher": self.teacher.hashes, "prompts": digest(self.teacher.prompts)}
        record = {"schema": "pnp-trt/distill/2", **head, "identity": identity, "processes": 1}
        record |= {"states": part["steps"] * self.report["batch"], "final_loss": part["log"][-1]["loss"], **facts}
        write_json(folder / "distill.json", record)

    def install(self, folder: Path, name: str, file: str, kind: str = "tiny") -> None:
        """Write a guide of stage 1."""
        part = self.report["parts"][name]
        fitted = part.get("gain")
        guide = self._save(folder, file, kind, fitted and fitted["gain"], part.get("steps_of"))
        settings = {
            "guide": kind, "options": TINY_OPTIONS if kind == "tiny" else {}, "w_distribution": "uniform",
            "weighting": "x0",
            "states": {"kind": "forward, and trajectories of CFG and of the student itself", "renewed": "every step"},
        }  # fmt: skip
        facts = {k: part[k] for k in ("continued_from",) if k in part} | ({"gain": fitted} if fitted else {})
        if "steps_of" in part:
            facts["teacher_lora"] = f"step-lora-{part['steps_of']}.safetensors"
        self._record(folder, guide, part, settings, stage="guidance", fresh_states=part["error"], **facts)

    def install_steps(self, folder: Path, steps: int) -> None:
        """Write a guide of stage 2."""
        from pnp_trt.bundle.store import sha256

        part = self.report["parts"][f"halve {steps}"]
        guide = self._save(folder, f"guide-tiny-{steps}", "tiny", part["gain"], steps)
        weights = self.assets / "guides/emoji-tiny/diffusion_pytorch_model.safetensors"
        settings = {
            "guide": sha256(weights) if part["of"] == "this run" else part["of"], "to": CHAIN[-1], "start": FIRST,
            "weighting": "landing",
            "states": {"kind": "trajectories of the last student and of the new one", "renewed": "every step"},
        }  # fmt: skip
        ends = {"from": part["from"], "to": part["to"]}
        self._record(folder, guide, part, settings, stage="steps", fresh_states=part["error"], **ends)

    def install_sharpener(self, folder: Path) -> None:
        """Write the bundled tiny guide with the run's sharpener.

        Raises:
            RuntimeError: if the sharpener was trained with a different guide.
        """
        from safetensors.torch import load_file

        from pnp_trt.bundle.store import sha256, write_json
        from pnp_trt.distill.run import save_guide
        from pnp_trt.models.guides.load import load_guide
        from pnp_trt.models.guides.sharpener import with_new_sharpener, without_sharpener

        part, bundled = self.report["parts"]["sharpener"], self.assets / "guides/emoji-tiny"
        if part["of"] not in ("this run", sha256(bundled / "diffusion_pytorch_model.safetensors")):
            raise RuntimeError(f"the sharpener was trained with a guide that differs from {bundled}")
        state = load_file(self.source / "sharpener.safetensors")
        guide = with_new_sharpener(without_sharpener(load_guide(str(bundled))), len(state["enter.bias"]))
        assert guide.sharpener is not None
        guide.sharpener.load_state_dict(state)
        folder.mkdir(parents=True, exist_ok=True)
        save_guide(guide.float(), folder)
        record = json.loads((bundled / "distill.json").read_text())
        facts = {k: self.report[k] for k in ("device", "date", "torch", "batch")}
        write_json(folder / "distill.json", record | {"sharpener": {"command": COMMAND, **facts, **part}})


def guide_folders(source: Path, assets: Path, out: Path) -> None:
    """Write the guides that the tables sample to ``out``: copies of the bundled ones, and those that are not shipped.

    ``full`` is from ``guide-full.safetensors``, ``tiny-sharpened`` from the bundled guide and
    ``sharpener.safetensors``, and ``step-lora-N`` from ``guide-step-lora.safetensors``, each if the run trained it.
    """
    for count in (None, *CHAIN):
        name = "tiny" if count is None else f"tiny-{count}"
        shutil.copytree(assets / f"guides/emoji-{name}", out / name, dirs_exist_ok=True)
    report = json.loads((source / "train.json").read_text())
    installer = Installer(source, assets, report)
    if (source / "guide-full.safetensors").exists():
        installer.install(out / "full", "guide full", "guide-full", "full")
    if (source / "sharpener.safetensors").exists():
        installer.install_sharpener(out / "tiny-sharpened")
    if (source / "guide-step-lora.safetensors").exists():
        steps = report["parts"]["guide step lora"]["steps_of"]
        installer.install(out / f"step-lora-{steps}", "guide step lora", "guide-step-lora")
    print(f"{out}: {', '.join(sorted(p.name for p in out.iterdir()))}")


# --------------------------------------------------------------------------------------------------- training


def train(a: argparse.Namespace) -> None:
    """Train all parts in order; weights are written as soon as a part is finished."""
    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextModel

    from pnp_trt.bundle.store import sha256
    from pnp_trt.models.guides import GUIDES
    from pnp_trt.models.guides.sharpener import with_new_sharpener, without_sharpener
    from pnp_trt.models.student import Student

    begun = time.monotonic()
    torch.manual_seed(a.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = None if device.type == "cuda" else CPU_STEPS
    out: Path = a.out
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "schema": "pnp-trt/gpu-train/1", "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__, "python": platform.python_version(), "command": sys.argv[1:],
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "batch": a.batch, "parts": {},
    }  # fmt: skip

    def tell(name: str, result: dict[str, Any]) -> None:
        report["parts"][name] = result | {k: report[k] for k in ("device", "date", "batch")}
        (out / "train.json").write_text(json.dumps(report, indent=1))

    def save(state: dict[str, Tensor], name: str, dtype: torch.dtype = torch.float16) -> None:
        arrays = {k: v.detach().to(dtype).cpu().contiguous() for k, v in state.items()}
        save_file(arrays, out / f"{name}.safetensors.part")
        (out / f"{name}.safetensors.part").replace(out / f"{name}.safetensors")

    assets: Path = a.assets
    arrays = np.load(a.data)
    unet = UNet2DConditionModel.from_pretrained(assets / "emoji/unet").float().to(device)
    vae = AutoencoderTiny.from_pretrained(assets / "emoji/vae").float().to(device)
    encoder = CLIPTextModel.from_pretrained(assets / "emoji/text_encoder").float().to(device).train()
    unet.to(memory_format=torch.channels_last).train()
    vae.to(memory_format=torch.channels_last).requires_grad_(False)
    sets = {name: Data(arrays, name, vae, device) for name in ("base", "flat", "3d")}
    empty_ids = torch.from_numpy(arrays["empty"].astype(np.int64)).to(device)
    prompt_ids = torch.from_numpy(arrays["prompts"].astype(np.int64)).to(device)

    def finished(name: str) -> Path | None:
        for folder in (out, a.resume) if a.resume else (out,):
            if (folder / f"{name}.safetensors").exists():
                return folder / f"{name}.safetensors"
        return None

    def rounded(module: nn.Module) -> None:
        """Round weights as when stored, so that later parts are trained with the model that is shipped."""
        for p in module.parameters():
            p.data.copy_(p.data.half().float())

    # ---- base
    base = Base(unet, encoder)

    def small_state() -> dict[str, Tensor]:
        result = {f"text.{k}": v for k, v in encoder.state_dict().items() if "token_embedding" not in k}
        return result | {f"vae.{k}": v for k, v in vae.state_dict().items()}

    def load_half(module: nn.Module, state: dict[str, Tensor]) -> None:
        missing, extra = module.load_state_dict({k: v.float().to(device) for k, v in state.items()}, strict=False)
        assert not extra and all("token_embedding" in m or "position_ids" in m for m in missing), (missing, extra)

    def save_base(_: float) -> None:
        save(unet.state_dict(), "unet-live")

    if done := finished("unet"):
        load_half(unet, load_file(done))
    elif a.base:
        d = sets["base"]

        def states_of(pair: Tensor, form: Tensor, dropped: Tensor) -> Tensor:
            ids = torch.where(dropped[:, None], empty_ids, d.ids[pair, form])
            return text_states(encoder, ids)

        trainer = Trainer("base", base, diffusion_loss(unet, states_of, d, a.batch, a.centred), a.lr, a.base,
                          ema=0.9995, max_steps=steps)  # fmt: skip
        tell("base", trainer.run(save_base))
        save(unet.state_dict(), "unet")
    base.requires_grad_(False).eval()
    rounded(unet)
    small = finished("small")
    if small:
        state = load_file(small)
        load_half(encoder, {k[5:]: v for k, v in state.items() if k.startswith("text.")})
        load_half(vae, {k[4:]: v for k, v in state.items() if k.startswith("vae.")})
    elif a.base:
        save(small_state(), "small")

    rounded(encoder)

    # ---- decoder
    if a.decoder:
        vae.decoder.requires_grad_(True)
        loss = decoder_loss(vae, list(sets.values()), min(128, a.batch))
        trainer = Trainer(
            "decoder", vae, loss, 1e-3, a.decoder, constant=0.4, ema=0.999, muon=False, max_steps=steps
        )  # fmt: skip
        tell("decoder", trainer.run())
        rounded(vae.requires_grad_(False))
        save(small_state(), "small")

    with torch.no_grad():
        empty = text_states(encoder, empty_ids)
        prompts = torch.cat([text_states(encoder, prompt_ids[i : i + 256]) for i in range(0, len(prompt_ids), 256)])
        everything = {
            k: torch.cat(
                [text_states(encoder, d.ids.flatten(0, 1)[i : i + 512]) for i in range(0, d.ids[..., 0].numel(), 512)]
            ).unflatten(0, d.ids.shape[:2])
            for k, d in sets.items()
        }
    shown = everything["base"][:: max(1, len(everything["base"]) // 16), 0][:16]

    # ---- guides, before the fine-tunes, because they need only the base
    checked = 60 if steps is None else 2

    def train_guide(
        part: str, file: str, network: Any, guide: Any, seconds: float, lr: float,
        counts: tuple[int, ...] | None = None, **facts: Any,
    ) -> Any:  # fmt: skip
        """Train a guide of stage 1 on ``network``, with trajectories of the step counts in ``counts``."""
        torch.manual_seed(a.seed + 1)
        guide = guide.to(device).to(memory_format=torch.channels_last).requires_grad_(True).train()
        inputs = (sets["base"], prompts, everything["base"][:, 0], a.batch)
        states = GuideStates(*inputs) if counts is None else GuideStates(*inputs, counts=counts)
        if counts is not None:
            states.stagger()
        trainer = Trainer(file, guide, guide_loss(network, guide, states, empty), lr, seconds, constant=0.3, ema=0.998,
                          muon=False, max_steps=steps)  # fmt: skip
        result = trainer.run() | facts
        guide.requires_grad_(False).eval()
        result["error"] = guide_error(network, guide, states, empty, checked)
        print(file, result["error"], flush=True)
        tell(part, result)
        save(guide.state_dict(), file, torch.float16 if part == "guide full" else torch.float32)
        return guide

    tiny_folder: Path = a.guide or assets / "guides/emoji-tiny"
    weights = tiny_folder / "diffusion_pytorch_model.safetensors"
    tiny: Any = None
    if a.continue_guide:
        tiny = GUIDES["tiny"].from_pretrained(tiny_folder)
        tiny.use_gain(None)  # the weights were trained without one
        known = {k: tiny.config[k] for k in TINY_OPTIONS}
        if known != TINY_OPTIONS:
            raise RuntimeError(f"{tiny_folder} was created with {known}, not with {TINY_OPTIONS}")
        tiny = train_guide(
            "guide tiny", "guide-tiny", unet, tiny, a.continue_guide, 1.5e-3, continued_from=sha256(weights)
        )  # fmt: skip
    elif a.tiny:
        new = GUIDES["tiny"].from_unet(unet, **TINY_OPTIONS)
        tiny = train_guide("guide tiny", "guide-tiny", unet, new, a.tiny, 3e-3)
    if tiny is not None and a.gain:
        states = GuideStates(sets["base"], prompts, everything["base"][:, 0], a.batch, own=0.0)
        states.stagger()
        result = fitted_gain(unet, tiny, states, empty, a.gain, checked // 2)
        print("gain", result, flush=True)
        tell("guide tiny", report["parts"]["guide tiny"] | {"gain": result})
    if tiny is not None:
        sample_grid(unet, vae, shown, empty, 3.0, out / "grid-tiny.png", tiny)
    if a.sharpen:
        beside = tiny if tiny is not None else GUIDES["tiny"].from_pretrained(tiny_folder)
        torch.manual_seed(a.seed + 2)
        sharp = with_new_sharpener(without_sharpener(copy.deepcopy(beside)).cpu(), a.sharpener_width).to(device).train()
        negatives = NegativeStates(sets["base"], prompts, everything["base"][:, 0], a.batch)
        loss = sharpening_loss(unet, sharp, negatives, empty)
        trainer = Trainer("sharpener", sharp, loss, 1e-3, a.sharpen, constant=0.3, ema=0.998, muon=False,
                          max_steps=steps)  # fmt: skip
        result = trainer.run() | {"of": "this run" if tiny is not None else sha256(weights)}
        with torch.no_grad():
            losses = {
                name: float(torch.stack([sharpening_loss(unet, g, negatives, empty)() for _ in range(checked)]).mean())
                for name, g in (("with", sharp.eval()), ("without", without_sharpener(copy.deepcopy(sharp))))
            }
        result["loss_on_fresh_states"] = losses
        print("sharpener", losses, flush=True)
        tell("sharpener", result)
        save(sharp.sharpener.state_dict(), "sharpener", torch.float32)
    if a.full:
        full = train_guide("guide full", "guide-full", unet, GUIDES["full"].from_unet(unet), a.full, 3e-4)
        sample_grid(unet, vae, shown, empty, 3.0, out / "grid-full.png", full)

    # ---- fewer steps: each student starts from the previous one, the first from the run's or the assets' tiny guide
    if a.halve:
        origin = {"of": "this run" if tiny is not None else sha256(weights)}
        last = tiny if tiny is not None else GUIDES["tiny"].from_pretrained(tiny_folder)
        last = last.to(device).to(memory_format=torch.channels_last).requires_grad_(False).eval()
        before = FIRST
        for count in CHAIN:
            torch.manual_seed(a.seed + count)
            guide = copy.deepcopy(last).requires_grad_(True).train()
            guide.register_to_config(sampling_steps=count)
            student, teacher = Student(unet, guide), Student(unet, last)
            halved = HalvedStates(sets["base"].latents, prompts, a.batch, count)
            trainer = Trainer(f"halve {count}", guide, halving_loss(student, teacher, halved), 1e-3,
                              a.halve / len(CHAIN), constant=0.3, ema=0.995, muon=False, max_steps=steps)  # fmt: skip
            result = trainer.run() | origin | {"from": before, "to": count, "gain": guide.config.get("gain")}
            guide.requires_grad_(False).eval()
            result["error"] = landing_error(student, teacher, halved, checked)
            print(f"halve {count}", result["error"], flush=True)
            tell(f"halve {count}", result)
            save(guide.state_dict(), f"guide-tiny-{count}", torch.float32)
            sample_grid(unet, vae, shown, empty, 3.0, out / f"grid-tiny-{count}.png", guide, steps=count)
            before, last = count, guide

    # ---- a step LoRA for CFG in fewer steps, and a tiny guide for the U-Net with it
    if a.step_lora:
        share, before, lora = a.step_lora / (len(LORA_CHAIN) + 1), FIRST, None
        for count in LORA_CHAIN:
            torch.manual_seed(a.seed + count)
            teacher = with_cfg(unet if lora is None else copy.deepcopy(lora).requires_grad_(False), empty)
            if lora is None:
                lora = add_lora(copy.deepcopy(unet))
            halved = HalvedStates(sets["base"].latents, prompts, max(1, a.batch // 2), count)
            student = with_cfg(lora, empty)
            trainer = Trainer(f"step lora {count}", lora, halving_loss(student, teacher, halved), 1e-3, share,
                              constant=0.3, ema=0.995, muon=False, max_steps=steps)  # fmt: skip
            result = trainer.run() | {"from": before, "to": count, "rank": LORA_RANK, "states": len(halved.x)}
            result["error"] = landing_error(student, teacher, halved, checked)
            print(f"step lora {count}", result["error"], flush=True)
            tell(f"step lora {count}", result)
            save(lora_state(lora), f"step-lora-{count}")
            before = count
        merged = merge_lora(lora)
        sample_grid(merged, vae, shown, empty, 3.0, out / f"grid-step-lora-{before}.png", steps=before)
        guide = GUIDES["tiny"].from_unet(merged, **TINY_OPTIONS)
        guide.register_to_config(sampling_steps=before)
        guide = train_guide(
            "guide step lora", "guide-step-lora", merged, guide, share, 3e-3, (before,), steps_of=before
        )  # fmt: skip
        sample_grid(merged, vae, shown, empty, 3.0, out / "grid-guide-step-lora.png", guide, steps=before)

    # ---- fine-tunes
    for name in ("flat", "3d"):
        if not a.fine_tunes or finished(name):
            continue
        tuned = UNet2DConditionModel.from_config(unet.config).to(device).to(memory_format=torch.channels_last)
        tuned.load_state_dict(unet.state_dict())
        tuned.requires_grad_(True).train()
        table = everything[name]

        def states_of(pair: Tensor, form: Tensor, dropped: Tensor, table: Tensor = table) -> Tensor:
            return torch.where(dropped[:, None, None], empty, table[pair, form])

        trainer = Trainer(name, tuned, diffusion_loss(tuned, states_of, sets[name], a.batch, 0.6), a.lr * 0.5,
                          a.fine_tunes, constant=0.5, ema=0.999, max_steps=steps)  # fmt: skip
        tell(name, trainer.run())
        save(tuned.state_dict(), name)
    sample_grid(unet, vae, shown, empty, 3.0, out / "grid-base.png")
    (out / "unet-live.safetensors").unlink(missing_ok=True)
    report["seconds"] = round(time.monotonic() - begun, 1)
    (out / "train.json").write_text(json.dumps(report, indent=1))
    print(f"all parts: {report['seconds']} s", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    one = what.add_parser("pack")
    one.add_argument("--out", type=Path, default=Path("build/emoji/pack.npz"))
    one.add_argument("--cache", type=Path, default=Path("build/emoji"))
    two = what.add_parser("train")
    two.add_argument("--data", type=Path, default=Path("build/emoji/pack.npz"))
    two.add_argument("--assets", type=Path, default=Path("pnp_trt/assets"))
    two.add_argument("--out", type=Path, default=Path("build/emoji/gpu"))
    two.add_argument("--resume", type=Path, help="a folder with weights of parts that need not be trained again")
    two.add_argument("--batch", type=int, default=256)
    two.add_argument("--lr", type=float, default=1e-3)
    two.add_argument("--centred", type=float, default=0.4)
    two.add_argument("--seed", type=int, default=0)
    for name, seconds in (
        ("base", 240), ("decoder", 45), ("tiny", 100), ("full", 0), ("fine-tunes", 35), ("continue-guide", 0),
        ("sharpen", 0), ("halve", 0), ("step-lora", 0),
    ):  # fmt: skip
        two.add_argument(f"--{name}", type=float, default=seconds, help="seconds; 0 leaves the part out")
    two.add_argument("--guide", type=Path, help="the tiny guide to continue or halve; default: that of the assets")
    two.add_argument("--sharpener-width", type=int, default=256)
    two.add_argument(
        "--gain", type=int, default=0, help="number of values of a gain to fit to the tiny guide; 0: no gain"
    )
    three = what.add_parser("unpack")
    three.add_argument("--from", dest="source", type=Path, default=Path("build/emoji/gpu"))
    three.add_argument("--assets", type=Path, default=Path("pnp_trt/assets"))
    three.add_argument("--results", type=Path, default=Path("benchmarks/results/emoji-gpu-train.json"))
    four = what.add_parser("guides")
    four.add_argument("--from", dest="source", type=Path, default=Path("build/emoji/gpu"))
    four.add_argument("--assets", type=Path, default=Path("pnp_trt/assets"))
    four.add_argument("--out", type=Path, default=Path("build/emoji/guides"))
    a = parser.parse_args(arguments)
    if a.what == "pack":
        pack(a.out, a.cache)
    elif a.what == "guides":
        guide_folders(a.source, a.assets, a.out)
    elif a.what == "unpack":
        unpack(a.source, a.assets, a.results)
    else:
        train(a)


if __name__ == "__main__":
    main()
