"""Training loops of the recipe: the base (U-Net and text encoder), its fine-tunes, the decoder.

All three are plain denoising or reconstruction loops with AdamW, an exponential moving average and
atomic checkpoints; a killed run continues where it stopped.  Batches depend on (seed, step), so a
resumed run sees the same data as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pnp_trt import processor

from .data import caption
from .presets import Preset

ARTICLES = ("a ", "an ", "the ")


def scheduler_config() -> dict:
    """Stable Diffusion's schedule (scaled linear betas, ε-prediction) with a noisier end and trailing steps.

    SD's own end (beta_end 0.012) leaves 7 % of the signal at the last step.  Averaged over a latent of few, strongly
    correlated pixels, this reveals the image's mean colour, so the network would take the colour from the initial
    noise instead of from the text (Lin et al. 2024, "Common Diffusion Noise Schedules ... Are Flawed", section 3.1).
    """
    return dict(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.025, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon",
        timestep_spacing="trailing",
    )  # fmt: skip


def alphas_cumprod() -> torch.Tensor:
    c = scheduler_config()
    betas = torch.linspace(c["beta_start"] ** 0.5, c["beta_end"] ** 0.5, c["num_train_timesteps"]) ** 2
    return torch.cumprod(1 - betas, 0)


def write_caption(concept: str, style: str, rng: random.Random, drop: float) -> str:
    """A training caption: mostly "red apple, noto style"; sometimes without style, with an article, or empty."""
    if rng.random() < drop:
        return ""
    text = caption(concept, style if rng.random() < 0.85 else None)
    if rng.random() < 0.3:
        text = ("an " if text[0] in "aeiou" else rng.choice(("a ", "the "))) + text
    return text


class Ema:
    """Exponential moving average of parameters, with a warm-up in which early weights are forgotten quickly."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in module.named_parameters() if v.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        live = [v for k, v in module.named_parameters() if v.requires_grad]
        torch._foreach_lerp_(list(self.shadow.values()), live, 1 - decay)

    @contextlib.contextmanager
    def applied(self, module: nn.Module):
        """Swap the averaged weights in, and the live ones back on exit."""
        live = {k: v.detach().clone() for k, v in module.named_parameters() if k in self.shadow}
        params = dict(module.named_parameters())
        with torch.no_grad():
            for k, v in self.shadow.items():
                params[k].copy_(v)
        try:
            yield module
        finally:
            with torch.no_grad():
                for k, v in live.items():
                    params[k].copy_(v)


def run_loop(
    name: str,
    module: nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    steps: int,
    lr: float,
    preset: Preset,
    out: Path,
    preview: Callable[[int], None] | None = None,
) -> Ema:
    """Optimise ``module`` for ``steps``; checkpoints and resumes in ``out/NAME.ckpt``; returns the EMA."""
    device = next(module.parameters()).device
    trainable = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    warmup = min(preset.warmup, max(1, steps // 10))

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    ema = Ema(module, preset.ema)
    checkpoint = out / f"{name}.ckpt"
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        module.load_state_dict(state["module"], strict=False)
        ema.shadow = state["ema"]
        optimiser.load_state_dict(state["optimiser"])
        start = state["step"]

    def save(step: int) -> None:
        state = {"module": module.state_dict(), "ema": ema.shadow, "optimiser": optimiser.state_dict(), "step": step}
        beside = checkpoint.with_suffix(".part")
        torch.save(state, beside)
        beside.replace(checkpoint)

    from tqdm import tqdm

    low_precision = device.type == "cuda" or processor.multiplies("bfloat16")
    # at these sizes, the backward pass of fused CPU attention takes a third of a step, that of plain attention a tenth
    attention = partial(sdpa_kernel, SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext
    module.train()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=20)
    smooth = None
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = lr * rate(step)
        with attention(), torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
            loss = loss_of(step)
        loss.backward()
        value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(f"{name}: the loss is {value} at step {step}; lower the learning rate ({lr})")
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        ema.update(module, step)
        smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
        bar.set_postfix_str(f"loss {smooth:.4f}", refresh=False)
        if (step + 1) % preset.checkpoint_every == 0 or step + 1 == steps:
            save(step + 1)
            if preview is not None:
                with ema.applied(module), torch.no_grad():
                    module.eval()
                    preview(step + 1)
                    module.train()
    module.eval()
    return ema


def min_snr_error(prediction: torch.Tensor, noise: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Min-SNR-5 weighted squared error (Hang et al. 2023, eq. 8) of ε for ᾱ ``a`` ``[B, 1, 1, 1]``, mean weight one."""
    snr = a / (1 - a)
    weight = snr.clamp(max=5.0) / snr
    return (weight * (prediction.float() - noise) ** 2).mean() / weight.mean().clamp(min=1e-3)


def reconstruction_error(decoded: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 of pixels and of their differences along both axes, plus twice the squared error; both ``[B, 3, H, W]``."""
    decoded = decoded.float()
    edges = sum(F.l1_loss(decoded.diff(dim=d), target.diff(dim=d)) for d in (2, 3))
    return F.l1_loss(decoded, target) + edges + 2 * F.mse_loss(decoded, target)


def denoising_loss(
    unet: nn.Module,
    text_encoder: nn.Module,
    tokenizer: Callable,
    latents: torch.Tensor,
    concepts: list[str],
    styles: list[str],
    preset: Preset,
    stream: str,
    jittered_until: int = 0,
) -> Callable[[int], torch.Tensor]:
    """Min-SNR-5 weighted ε loss (Hang et al. 2023, eq. 8) on batches that depend on (stream, seed, step).

    From step ``jittered_until`` on only every ``preset.variants``-th image is used: the centred renderings.
    """
    abar = alphas_cumprod().to(latents.device)

    def loss_of(step: int) -> torch.Tensor:
        rng = random.Random(f"{stream}/{preset.seed}/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        stride = 1 if step < jittered_until else preset.variants
        rows = [rng.randrange(len(concepts) // stride) * stride for _ in range(preset.batch)]
        texts = [write_caption(concepts[r], styles[r], rng, preset.caption_drop) for r in rows]
        unique = sorted(set(texts))
        ids = tokenizer(unique, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        states = text_encoder(ids.to(latents.device))[0]
        context = states[torch.tensor([unique.index(t) for t in texts], device=latents.device)]
        x = latents[rows]
        noise = torch.randn(x.shape, generator=generator).to(x)
        # stratified timesteps, one per equal slice, reduce the variance of a small batch's loss
        u = (torch.arange(len(rows)) + torch.rand(len(rows), generator=generator)) / len(rows)
        t = (u * 1000).long().clamp(0, 999)[torch.randperm(len(rows), generator=generator)].to(x.device)
        a = abar[t][:, None, None, None]
        prediction = unet(a.sqrt() * x + (1 - a).sqrt() * noise, t, context).sample
        return min_snr_error(prediction, noise, a)

    return loss_of


def decoder_loss(
    vae: nn.Module, pixels: torch.Tensor, latents: torch.Tensor, preset: Preset
) -> Callable[[int], torch.Tensor]:
    """L1 on pixels and on their gradients, with slightly noisy latents, so that generated latents decode well too."""

    def loss_of(step: int) -> torch.Tensor:
        rng = random.Random(f"decoder/{preset.seed}/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        rows = torch.tensor([rng.randrange(len(pixels)) for _ in range(preset.decoder_batch)])
        z = latents[rows].to(pixels.device)
        level = 0.06 * torch.rand(len(rows), 1, 1, 1, generator=generator)
        z = z + (level * torch.randn(z.shape, generator=generator)).to(z)
        target = pixels[rows].permute(0, 3, 1, 2).float().div(127.5).sub(1).to(z)
        return reconstruction_error(vae.decode(z).sample, target)

    return loss_of
