"""Steps per second and memory of training at real size: Stable Diffusion 1.5's U-Net with random weights.

``python -m benchmarks.train_speed`` times optimiser steps of stage 1 (the student alone, because the teacher's
predictions are cached) and writes one JSON.  Steps of stage 2 are the same, but collecting each of its states takes two
evaluations of the last student; an evaluation is timed separately.  A GPU is used if there is one.  Random weights
change neither time nor memory.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from pnp_trt.bundle.store import write_json
from pnp_trt.models.guides import GUIDES
from pnp_trt.models.networks import quiet_libraries
from pnp_trt.models.student import Student
from pnp_trt.models.teacher import random_unet_config
from pnp_trt.processor import mixed_precision

from .emoji.provenance import machine


def peak_mib() -> float:
    """Peak memory so far in MiB, of the GPU if there is one, otherwise of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return psutil.Process().memory_info().rss / 2**20


def measure(kind: str, base: str, batch: int, steps: int, precision: str, checkpointing: bool) -> dict[str, Any]:
    """Seconds of each optimiser step and of each evaluation of the collection, and peak memory."""
    from diffusers import UNet2DConditionModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(random_unet_config(base)).to(device).eval().requires_grad_(False)
    guide = GUIDES[kind].from_unet(unet).to(device)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        if kind == "full":
            guide.net.enable_gradient_checkpointing()  # type: ignore[union-attr]
    student = Student(unet, guide)
    optimiser = torch.optim.AdamW(guide.parameters(), lr=1e-5)
    size = unet.config.sample_size
    x = torch.randn(batch, unet.config.in_channels, size, size, device=device)
    text = torch.randn(batch, 77, unet.config.cross_attention_dim, device=device)
    t = torch.randint(0, 1000, (batch,), device=device)
    w = torch.full((batch,), 3.0, device=device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def settle() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            return student(x, t, text, w)

    train, collect = [], []
    for step in range(steps + 1):  # the first is a warm-up
        started = settle()
        (forward().float() - x).pow(2).mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step:
            train.append(settle() - started)
    peak = peak_mib()
    with torch.no_grad():
        for step in range(steps + 1):
            started = settle()
            forward()
            if step:
                collect.append(settle() - started)
    return {
        "guide": kind, "base": base, "batch": batch, "mixed_precision": precision,
        "gradient_checkpointing": checkpointing, "parameters": sum(p.numel() for p in guide.parameters()),
        "step_seconds": [round(s, 3) for s in train], "steps_per_second": round(len(train) / sum(train), 4),
        "student_pass_seconds": [round(s, 3) for s in collect], "peak_mib": round(peak),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_speed", description=__doc__)
    add = parser.add_argument
    add("--base", default="random:sd15")
    add("--guide", default="tiny", choices=sorted(GUIDES), help="one per process, because peak memory is the process's")
    add("--batch", type=int, default=1)
    add("--steps", type=int, default=2)
    add("--mixed-precision", default="auto", choices=("no", "bf16", "fp16", "auto"))
    add("--gradient-checkpointing", action="store_true")
    add("--json", type=Path, default=None)
    args = parser.parse_args()
    quiet_libraries()
    args.mixed_precision = mixed_precision(args.mixed_precision, gpu=torch.cuda.is_available())
    row = measure(
        args.guide, args.base, args.batch, args.steps, args.mixed_precision, args.gradient_checkpointing
    )  # fmt: skip
    command = (
        f"python -m benchmarks.train_speed --base {args.base} --guide {args.guide} --batch {args.batch} "
        f"--steps {args.steps} --mixed-precision {args.mixed_precision}"
        + (" --gradient-checkpointing" if args.gradient_checkpointing else "")
    )
    document = {"schema": "pnp-trt/train-speed/1", "provenance": machine(command), "ram_mib": round(
        psutil.virtual_memory().total / 2**20), "platform": platform.machine(), "result": row}  # fmt: skip
    path = args.json or Path(f"benchmarks/results/train-speed-{args.base.removeprefix('random:')}-{args.guide}.json")
    write_json(path, document)
    print(
        f"{args.guide}: {row['steps_per_second']} steps/s at batch {args.batch}, peak {row['peak_mib']:,} MiB: {path}"
    )


if __name__ == "__main__":
    main()
