"""Trains every rival for the same number of optimizer steps on the same states, except finished ones."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pnp_trt.bundle.store import sha256, write_json
from pnp_trt.errors import InputError

from ..cells import TEACHER
from ..gpu_train import Trainer, distillation_loss, negative_loss
from . import RIVALS
from .base import Rival
from .world import World, beside_of, choose_device, unet_file

SCHEMA = "pnp-trt/emoji-rivals-train/1"
RECORD = "train.json"
#: share of the steps at the peak rate, as for ``gpu_train``'s guides, and share over which weights are averaged
CONSTANT, AVERAGED = 0.3, 0.1
#: steps in which the rate rises to its peak; a quarter of the steps if that is fewer
WARMUP = 200
#: number of batches on which the rates of a pilot are compared
PILOT_BATCHES = 16


def make(name: str, unet: Any, seed: int) -> Rival:
    """An untrained rival on the U-Net's device; its initial weights depend only on the seed."""
    torch.manual_seed(seed)
    rival = RIVALS[name].from_unet(unet)
    return rival.to(unet.device).to(memory_format=torch.channels_last)


def read_record(out: Path) -> dict[str, Any]:
    """The record of ``train`` in ``out``, or one without rivals if there is none."""
    path = out / RECORD
    record: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"schema": SCHEMA, "rivals": {}}
    return record


def load(name: str, unet: Any, out: Path) -> Rival:
    """Load a trained rival.

    Raises:
        InputError: if it is not in ``out``, or was created for a U-Net of a different shape.
    """
    from safetensors.torch import load_file

    path = out / f"{name}.safetensors"
    if not path.is_file():
        raise InputError(f"{path} does not exist; run: python -m benchmarks.emoji.rivals train --only {name}")
    rival = make(name, unet, 0)
    rival.load_state_dict(load_file(path))
    return rival.requires_grad_(False).eval()


@dataclass
class Course:
    """Training of a rival: states are seeded by ``seed + 1``, initial weights by ``seed``.

    With ``negative``, each state has a negative prompt, which takes the place of the empty one.
    """

    world: World
    batch: int
    seed: int
    negative: bool = False

    def _loss(self, rival: Rival, own: float = 0.5) -> Callable[[], Tensor]:
        """The loss on fresh states, of which the share ``own`` of the trajectories follows the rival."""
        unet, empty = self.world.unet(TEACHER), self.world.empty
        if self.negative:

            def predict(x: Tensor, t: Tensor, text: Tensor, w: Tensor, negative: Tensor) -> Tensor:
                return rival(unet, x, t, text, negative, w)

            return negative_loss(unet, predict, self.world.negative_states(TEACHER, self.batch, own))
        return distillation_loss(
            unet, beside_of(rival, unet, empty), self.world.states(TEACHER, self.batch, own), empty
        )

    def run(self, name: str, lr: float, steps: int, warmup: int) -> tuple[Rival, dict[str, Any]]:
        """Train a rival; return it, frozen, and the trainer's report."""
        rival = make(name, self.world.unet(TEACHER), self.seed).train()
        # after the weights, so that states do not depend on how many random numbers those used
        torch.manual_seed(self.seed + 1)
        loss = self._loss(rival)
        ema = max(0.0, 1 - 1 / (AVERAGED * steps))
        trainer = Trainer(
            name, rival, loss, lr, math.inf, constant=CONSTANT, ema=ema, muon=False, max_steps=steps, warmup=warmup
        )
        report = trainer.run()
        return rival.requires_grad_(False).eval(), report

    @torch.no_grad()
    def loss(self, rival: Rival) -> float:
        """Mean loss on fresh states, which are the same for every rival."""
        torch.manual_seed(self.seed + 2)
        loss = self._loss(rival, own=0.0)
        return float(torch.stack([loss() for _ in range(PILOT_BATCHES)]).mean())

    def pilot(self, name: str, steps: int) -> dict[float, float]:
        """Loss after ``steps`` steps at each peak rate: the rival's own, a third of it, and three times it."""
        own = RIVALS[name].lr
        return {lr: self.loss(self.run(name, lr, steps, max(1, steps // 10))[0]) for lr in (own / 3, own, own * 3)}


def train(
    assets: Path, data: Path, out: Path, steps: int, batch: int = 256, seed: int = 0,
    only: Sequence[str] | None = None, rates: dict[str, float] | None = None, pilot: int = 0,
    negative: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train the rivals into ``out``: ``NAME.safetensors`` each, and the record ``train.json`` after each.

    An existing rival, trained with the same settings on the same base, is not trained again.  Several processes can
    train different rivals into one folder.  Random numbers are seeded again for each rival: all see the same noised
    images, prompts, scales and trajectories of CFG in the same order.  Only the quarter of the states that follow the
    student differs.

    Args:
        steps: optimizer steps of each rival.
        rates: peak learning rates that replace the rivals' own, by name.
        pilot: optimizer steps of a pilot at each of three rates, which chooses the rates not given; 0 for none.
        negative: train with a negative prompt for each state, which takes the place of the empty one; by default only
            the rivals that read it are trained.

    Raises:
        InputError: for unknown names, for fewer than one step, or with ``negative`` for rivals that do not read it.
    """
    from safetensors.torch import save_file

    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    readers = [name for name in RIVALS.names() if RIVALS[name].reads_negative]
    names = list(only or (readers if negative else RIVALS.names()))
    for name in (*names, *(rates or {})):
        RIVALS[name]
    if negative and (others := [name for name in names if name not in readers]):
        raise InputError(
            f"--negative trains only rivals that read a negative prompt ({', '.join(readers)}), not {', '.join(others)}"
        )
    device = choose_device()
    course = Course(World(assets, data, device), batch, seed, negative)
    out.mkdir(parents=True, exist_ok=True)
    common = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "states": "half noised images, a quarter trajectories of CFG, a quarter of the student itself",
        "loss": "squared error to eps_w, x0 weighting over w, w uniform in 1 to 9",
        "parameters_of_unet": sum(p.numel() for p in course.world.unet(TEACHER).parameters()),
    }  # fmt: skip
    base = sha256(unet_file(assets, TEACHER))
    for name in names:
        settings = {
            "steps": steps, "batch": batch, "seed": seed, "negative": negative, "base_sha256": base,
            "pilot_steps": pilot,
        }  # fmt: skip
        # None: chosen by the pilot
        lr = (rates or {}).get(name, None if pilot else RIVALS[name].lr)
        path = out / f"{name}.safetensors"
        # records of before --negative existed do not have the field
        before = {"negative": False} | read_record(out)["rivals"].get(name, {})
        same = all(before.get(k) == v for k, v in settings.items()) and lr in (None, before.get("lr"))
        if path.is_file() and same:
            print(f"{name}: trained already", flush=True)
            continue
        tried = course.pilot(name, pilot) if lr is None else {}
        lr = lr or min(tried, key=lambda rate: tried[rate])
        rival, report = course.run(name, lr, steps, max(1, min(WARMUP, steps // 4)))
        state = {k: v.detach().float().cpu().contiguous() for k, v in rival.state_dict().items()}
        save_file(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        entry = {
            **report, **settings, "lr": lr, "pilot_loss": {f"{k:.2g}": v for k, v in tried.items()},
            "parameters": sum(v.numel() for v in state.values()), "sha256": sha256(path),
            "milliseconds_per_step": round(1000 * report["seconds"] / steps, 2),
        }  # fmt: skip
        # read again, because another process may have trained other rivals into the same folder meanwhile
        record = read_record(out) | common
        record["rivals"][name] = entry
        write_json(out / RECORD, record)
        print(f"{name}: {entry['parameters']:,} parameters, {report['seconds']} s", flush=True)
    return read_record(out)
