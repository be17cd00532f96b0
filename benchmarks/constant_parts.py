"""Measure the parts of a step that are the same in every step of an image, and what is saved by feeding their results.

Two parts of a student do not depend on the noisy latent or the timestep: what the guide computes from w alone (the full
guide's ``condition``), and the keys and values that cross-attention computes from the text states.  Each is taken out
of the step in turn, with its result kept from a first evaluation.  Multiply-accumulates are counted on meta tensors.
Times are measured with PyTorch on the CPU in rounds that run every variant once, as ratios to the round's whole step.

    python -m benchmarks.constant_parts                      # the bundled model's size
    python -m benchmarks.constant_parts --base random:sd15   # SD 1.5: about 6 GiB of memory, minutes
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pnp_trt.bench.measure.cost import count
from pnp_trt.bench.measure.networks import guide_size
from pnp_trt.bundle.provenance import provenance
from pnp_trt.bundle.store import write_json
from pnp_trt.models.bases import resolve
from pnp_trt.models.guides import GUIDES
from pnp_trt.models.networks import quiet_libraries
from pnp_trt.models.student import Student
from pnp_trt.models.teacher import random_unet_config

SCHEMA = "pnp-trt/constant-parts/1"
RESULTS = Path(__file__).parent / "results"


class Once(nn.Module):
    """A layer that runs once and then returns that result again; all layers of a student share one switch."""

    def __init__(self, layer: nn.Module, switch: dict[str, bool]) -> None:
        super().__init__()
        self.layer, self.switch = layer, switch
        self.register_buffer("kept", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.switch["on"]:
            return self.layer(x)
        if self.kept is None or self.kept.device != x.device or len(self.kept) != len(x):
            self.kept = self.layer(x)
        return self.kept


def student_of(base: str, kind: str) -> Student:
    """A student of the base's size with random float32 weights, which affect neither cost nor time."""
    from diffusers import UNet2DConditionModel

    config = random_unet_config(base) if base.startswith("random:") else resolve(base).config("unet")
    unet = UNet2DConditionModel.from_config(config)
    guide = GUIDES[kind].from_unet(unet, **guide_size(base, kind))
    return Student(unet, guide).eval().requires_grad_(False)


def hold_text(student: Student) -> dict[str, bool]:
    """Wrap every projection of the text states in ``Once``; return the switch."""
    switch = {"on": False}
    for name, part in list(student.named_modules()):
        if name.endswith("attn2"):
            part.to_k, part.to_v = Once(part.to_k, switch), Once(part.to_v, switch)
    return switch


def measure(base: str, kind: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    """One row per variant: MACs and time of a step without the parts whose results are fed."""
    torch.manual_seed(0)
    student = student_of(base, kind)
    config = student.unet.config
    size = config.sample_size
    inputs: dict[str, Tensor] = {
        "sample": torch.randn(batch, config.in_channels, size, size),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 77, config.cross_attention_dim),
        "guidance": torch.full((batch,), 3.0),
    }
    switch = hold_text(student)
    with torch.inference_mode():
        condition = student.guide.condition(inputs["guidance"], (size, size))
        fed = {} if condition is None else {"condition": condition}
        variants: list[tuple[str, dict[str, Tensor], bool]] = [("whole", {}, False), ("text fed", {}, True)]
        variants += [("condition fed", fed, False), ("both fed", fed, True)] if fed else []
        times: dict[str, list[float]] = {name: [] for name, _, _ in variants}
        macs: dict[str, tuple[int, int]] = {}
        for name, extra, on in variants:
            switch["on"] = on
            student(**inputs, **extra)  # warm-up, and fills the layers' caches
            one = {k: v[:1] for k, v in (inputs | extra).items()}
            if on:
                student(**one)  # at batch 1, for the count
            cost = count(student, one)
            macs[name] = (cost.macs, cost.macs_without_attention)
            student(**inputs, **extra)
        for number in range(rounds):
            for place in range(len(variants)):
                name, extra, on = variants[(number + place) % len(variants)]
                switch["on"] = on
                started = time.perf_counter()
                student(**inputs, **extra)
                times[name].append(time.perf_counter() - started)
    return [
        {
            "guide": kind, "variant": name, "macs": macs[name][0], "macs_without_attention": macs[name][1],
            "macs_ratio": round(macs[name][0] / macs["whole"][0], 4),
            "seconds": [round(s, 5) for s in times[name]],
            **ratio(np.array(times[name]), np.array(times["whole"])),
        }
        for name, _, _ in variants
    ]  # fmt: skip


def ratio(times: np.ndarray, whole: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Median over rounds of (time / whole of the same round), with its 95 % bootstrap interval."""
    ratios = times / whole
    resamples = np.random.default_rng(seed).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(resamples, axis=1), [2.5, 97.5])
    return {"time_ratio": round(float(np.median(ratios)), 4), "interval": [round(float(v), 4) for v in (low, high)]}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write one JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.constant_parts", description=__doc__)
    parser.add_argument("--base", default="emoji", help="base model whose size is used, with random weights")
    parser.add_argument("--guide", action="append", choices=sorted(GUIDES), help="default: both")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=None, help="default 40; 5 for random:…")
    parser.add_argument("--json", type=Path, default=None, help="default benchmarks/results/constant-parts-BASE.json")
    a = parser.parse_args(arguments)
    quiet_libraries()
    rounds = a.rounds or (5 if a.base.startswith("random:") else 40)
    rows = [row for kind in a.guide or sorted(GUIDES) for row in measure(a.base, kind, a.batch, rounds)]
    words = ["python", "-m", "benchmarks.constant_parts", "--base", a.base, "--batch", str(a.batch)]
    words += [w for kind in a.guide or [] for w in ("--guide", kind)] + ["--rounds", str(rounds)]
    document = {
        "schema": SCHEMA, "provenance": provenance(words), "base": a.base, "batch": a.batch,
        "threads": torch.get_num_threads(), "runtime": f"torch {torch.__version__}, eager, float32, CPU", "rows": rows,
    }  # fmt: skip
    out = a.json or RESULTS / f"constant-parts-{a.base.removeprefix('random:')}.json"
    write_json(out, document)
    for row in rows:
        low, high = row["interval"]
        print(
            f"{row['guide']:>5} {row['variant']:<14} {row['macs'] / 1e6:>12,.1f} MMACs ({row['macs_ratio']:.3f})  "
            f"time {row['time_ratio']:.3f} [{low:.3f}, {high:.3f}]"
        )
    print(out)


if __name__ == "__main__":
    main()
