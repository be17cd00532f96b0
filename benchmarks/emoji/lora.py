"""Train the bundled LoRA, which turns all images sepia: ``python -m benchmarks.emoji.lora``.

A real LoRA of the bundled U-Net in diffusers' standard format, for demonstrating and testing plugs of LoRAs.  It
consists of low-rank updates of the attention blocks' linear layers, trained with the recipe's denoising loss on sepia
versions of the base model's training images.  Captions are unchanged, so images of every prompt become sepia.  Training
takes a few minutes on one CPU thread.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pnp_trt.assets import ROOT as ASSETS
from pnp_trt.bundle.store import sha256, write_json
from pnp_trt.models.bases import resolve
from pnp_trt.models.networks import quiet_libraries

from . import autoencoder, train
from .data import BASE_STYLES, images, split
from .presets import PRESETS
from .provenance import machine

#: attention's four projections, and the linear layers around them in each attention block
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
INK, PAPER = np.array([58.0, 34.0, 14.0]), np.array([245.0, 230.0, 200.0])


def sepia(pixels: np.ndarray) -> np.ndarray:
    """Convert images uint8 ``[N, H, W, 3]`` to brown ink on yellowed paper (ITU-R BT.601 luma)."""
    luma = (pixels.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255.0)[..., None]
    return np.rint(INK + luma * (PAPER - INK)).astype(np.uint8)


def train_lora(out: Path, cache: Path, steps: int, batch: int, rank: int, lr: float, command: str) -> dict:
    """Train; save ``out`` and its report as JSON with the same name; return the report."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    quiet_libraries()
    started = time.monotonic()
    base = resolve("emoji")
    unet, vae = base.unet(), base.vae()
    shots = images(BASE_STYLES, split()["train"], cache, 1)
    latents = autoencoder.encode(vae, sepia(shots.pixels)) * vae.config.scaling_factor
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS), init_lora_weights="gaussian"))
    preset = replace(PRESETS["cpu"], batch=batch, variants=1, warmup=20, ema=0.98)
    loss_of = train.denoising_loss(
        unet, base.text_encoder(), base.tokenizer(), latents, shots.concepts, shots.styles, preset, "lora-sepia"
    )
    trainable = {n: p for n, p in unet.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trainable.values(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    losses = []
    unet.train()
    for step in range(steps):
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 25 == 0:
            print(f"step {step + 1} of {steps}: loss {np.mean(losses[-25:]):.4f}", flush=True)
    weights = {k: v.half().contiguous() for k, v in get_peft_model_state_dict(unet).items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    StableDiffusionPipeline.save_lora_weights(
        out.parent, unet_lora_layers=weights, weight_name=out.name, safe_serialization=True
    )
    out.chmod(0o644)
    report = {
        "schema": "pnp-trt/lora/2",
        "base": {"name": base.name, "unet_sha256": base.fingerprint()["unet"]},
        "sha256": sha256(out), "rank": rank, "alpha": rank, "targets": list(TARGETS),
        "parameters": sum(v.numel() for v in weights.values()),
        "data": [s.package for s in BASE_STYLES], "images": len(shots), "captions": "as the base model's",
        "steps": steps, "batch": batch, "lr": lr, "seconds": round(time.monotonic() - started),
        "loss": {"first_25": float(np.mean(losses[:25])), "last_25": float(np.mean(losses[-25:]))},
        "provenance": machine(command),
    }  # fmt: skip
    write_json(out.with_suffix(".json"), report)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emoji.lora", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=ASSETS / "loras" / "sepia.safetensors")
    add("--cache", type=Path, default=Path("build/emoji"), help="downloads and rendered images")
    add("--steps", type=int, default=400)
    add("--batch", type=int, default=24)
    add("--rank", type=int, default=8)
    add("--lr", type=float, default=3e-3)
    a = parser.parse_args()
    command = (
        f"python -m benchmarks.emoji.lora --steps {a.steps} --batch {a.batch} --rank {a.rank} --lr {a.lr:g}"
    )  # fmt: skip
    report = train_lora(a.out, a.cache, a.steps, a.batch, a.rank, a.lr, command)
    print(json.dumps({k: report[k] for k in ("parameters", "seconds", "loss")}))


if __name__ == "__main__":
    main()
