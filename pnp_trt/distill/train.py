"""The training loop of guides: AdamW, warm-up, EMA, several processes, atomic checkpoints, exact resume."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import processor
from ..errors import InputError, PnpError
from ..io.files import whole_file
from ..io.inputs import check_seed
from ..io.progress import Progress

PRECISIONS = ("no", "bf16", "fp16", "auto")
SCHEDULES = ("cosine", "constant")
_CHECKPOINT = re.compile(r"step-(\d{7,})\.safetensors")


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation settings; the defaults suit the tiny guide on the bundled model.

    Attributes:
        steps: optimiser steps.
        batch: states per optimiser step, over all processes and accumulated parts.
        accumulate: parts that a process's share of a batch is computed in, one after the other.
        lr, schedule, warmup: peak rate; ``cosine`` (to a fiftieth) or ``constant``; linear warm-up steps.
        ema: decay of the averaged weights, which are the result.
        mixed_precision: ``no``, ``bf16`` or ``fp16`` for autocast in the student's forward; ``auto`` takes the type
            that the device multiplies in hardware.
        gradient_checkpointing: recompute activations in the backward pass: slower, in less memory.
        checkpoint_every, keep: steps between checkpoints; how many of the newest stay.
    """

    steps: int = 1500
    batch: int = 48
    accumulate: int = 1
    lr: float = 2e-3
    schedule: str = "cosine"
    warmup: int = 100
    weight_decay: float = 0.01
    ema: float = 0.995
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 250
    keep: int = 2
    seed: int = 0

    def check(self, processes: int = 1) -> None:
        """Raise ``InputError`` for a value out of range."""
        for name in ("steps", "batch", "accumulate", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.lr <= 1:
            raise InputError(f"the learning rate is {self.lr:g}; it must be above 0 and at most 1")
        if not 0 <= self.ema <= 1:  # also refuses NaN
            raise InputError(f"ema is {self.ema:g}; it must be between 0 and 1")
        check_seed(self.seed)
        if self.schedule not in SCHEDULES:
            raise InputError(f"the schedule is '{self.schedule}'; known: {', '.join(SCHEDULES)}")
        if self.mixed_precision not in PRECISIONS:
            raise InputError(f"mixed precision is '{self.mixed_precision}'; known: {', '.join(PRECISIONS)}")
        if self.batch % (self.accumulate * processes):
            raise InputError(
                f"a batch of {self.batch} does not divide into {processes} processes times {self.accumulate} parts; "
                f"choose a multiple of {self.accumulate * processes}"
            )

    def rate(self, step: int) -> float:
        """The learning rate at ``step``."""
        warm = min(1.0, (step + 1) / max(1, min(self.warmup, self.steps // 10)))
        if self.schedule == "constant":
            return self.lr * warm
        return self.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


class Objective(Protocol):
    """What is minimised.  A step's batch follows from the step alone, so that a resumed run repeats an unbroken one."""

    def batch(self, step: int, part: int, parts: int) -> dict[str, Tensor]:
        """Part ``part`` of ``parts`` of the batch of ``step``."""
        ...

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of a batch under ``model``, the student as the optimiser sees it."""
        ...


def make_accelerator(mixed_precision: str = "no") -> Any:
    """A ``accelerate.Accelerator``: the processes are whatever ``accelerate launch`` started, one without it.

    Raises:
        InputError: if the precision is unknown, or this device does not have it.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if mixed_precision not in PRECISIONS:
        raise InputError(f"mixed precision is '{mixed_precision}'; known: {', '.join(PRECISIONS)}")
    if mixed_precision == "fp16" and not torch.cuda.is_available():
        raise InputError("mixed precision 'fp16' needs a GPU and there is none; use no, bf16 or auto")
    mixed_precision = processor.mixed_precision(mixed_precision, gpu=torch.cuda.is_available())
    # the library keeps one precision a process; runs after each other may want different ones
    AcceleratorState._reset_state()
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=mixed_precision)


def begin(config: TrainConfig, progress: Progress | None) -> tuple[Any, TrainConfig, Progress]:
    """The accelerator of a run, its config with the resolved precision, and progress, which the main process reports.

    A run resumes in no other precision than the resolved one.

    Raises:
        InputError: as of :func:`make_accelerator` and ``TrainConfig.check``.
    """
    accelerator = make_accelerator(config.mixed_precision)
    config = replace(config, mixed_precision=accelerator.mixed_precision)
    config.check(accelerator.num_processes)
    report = progress if progress is not None and accelerator.is_main_process else (lambda *_: None)
    return accelerator, config, report


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint of the run in ``folder``; 0 where there is none."""
    found = _checkpoints(folder / "checkpoints")
    return found[-1][0] if found else 0


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of a run's checkpoints, the oldest first; other files are not looked at."""
    if not folder.is_dir():
        return []
    matches = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def train(
    student: nn.Module,
    guide: nn.Module,
    objective: Objective,
    config: TrainConfig,
    folder: Path,
    accelerator: Any = None,
    progress: Callable[[int, int, float, float], None] | None = None,
    watch: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> None:
    """Optimise ``guide`` inside ``student``; at the end it holds the averaged weights.

    Args:
        folder: checkpoints go to ``folder/checkpoints``; the newest is continued from.
        accelerator: of :func:`make_accelerator`; several processes share each batch.
        progress: called with (step, steps, loss, learning rate) on every process.
        watch: called with (step, averaged weights by name) after each checkpoint, on the main process.

    Raises:
        InputError: for settings out of range, or a checkpoint that cannot be read.
        PnpError: if the loss or a gradient is not finite; the step and the file that keeps the batch are named.
    """
    accelerator = accelerator or make_accelerator(config.mixed_precision)
    world, rank = accelerator.num_processes, accelerator.process_index
    config.check(world)
    names = [k for k, p in guide.named_parameters() if p.requires_grad]
    parameters = dict(guide.named_parameters())
    live: list[Tensor] = [parameters[k] for k in names]
    shadow = [p.detach().clone() for p in live]
    optimiser = torch.optim.AdamW(live, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.99))
    state = _State(folder / "checkpoints", names, live, shadow, optimiser, accelerator.scaler)
    start = state.load()
    model = accelerator.prepare_model(student)
    parts = world * config.accumulate
    for step in range(start, config.steps):
        rate = config.rate(step)
        for group in optimiser.param_groups:
            group["lr"] = rate
        shares = [(part * world + rank, parts) for part in range(config.accumulate)]
        loss, batches = _gradients(objective, model, accelerator, step, shares)
        value = float(accelerator.reduce(loss, "mean"))
        if not math.isfinite(value):
            raise _not_finite(value, step, config, folder, batches, rank)
        if accelerator.scaler is not None:
            accelerator.scaler.unscale_(optimiser)
        norm = float(nn.utils.clip_grad_norm_(live, 1.0))
        if not math.isfinite(norm) and accelerator.scaler is None:
            raise _not_finite(norm, step, config, folder, batches, rank)
        if accelerator.scaler is None:
            optimiser.step()
        else:  # skips the step, and lowers the scale, where a scaled gradient overflowed
            accelerator.scaler.step(optimiser)
            accelerator.scaler.update()
        optimiser.zero_grad(set_to_none=True)
        decay = min(config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(shadow, live, 1 - decay)
        if progress is not None:
            progress(step + 1, config.steps, value, rate)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            if accelerator.is_main_process:
                state.save(step + 1, config.keep)
                if watch is not None:
                    watch(step + 1, dict(zip(names, shadow, strict=True)))
            accelerator.wait_for_everyone()
    with torch.no_grad():
        for p, s in zip(live, shadow, strict=True):
            p.copy_(s)


def _gradients(
    objective: Objective, model: nn.Module, accelerator: Any, step: int, shares: Sequence[tuple[int, int]]
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """The mean loss of this process's shares of a step's batch, and these; gradients are added to the parameters'.

    Args:
        shares: (number, of how many) of each.
    """
    total = torch.zeros((), device=accelerator.device)
    batches: list[dict[str, Tensor]] = []
    for share in shares:
        batches.append(objective.batch(step, *share))
        last = len(batches) == len(shares)
        with _maybe(accelerator.no_sync, model, not last), training_attention(accelerator.device):
            with accelerator.autocast():
                loss = objective.loss(model, batches[-1]) / len(shares)
            accelerator.backward(loss)
        total += loss.detach()
    return total, batches


def training_attention(device: torch.device) -> Any:
    """The attention kernels to train with, for forward and backward: what is recomputed must take the same one.

    The fused CPU attention's backward pass is several times slower than the plain one at these sizes.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def _maybe(context: Callable[[nn.Module], Any], model: nn.Module, wanted: bool) -> Any:
    return context(model) if wanted else contextlib.nullcontext()


def _not_finite(
    value: float, step: int, config: TrainConfig, folder: Path, batches: list[dict[str, Tensor]], rank: int
) -> PnpError:
    """The error for a step that went wrong; its batch is kept, so that it can be looked at."""
    from safetensors.torch import save_file

    joined = {k: torch.cat([b[k] for b in batches]).contiguous().cpu() for k in batches[0]}
    kept = folder / f"not-finite-step-{step}{f'-rank-{rank}' if rank else ''}.safetensors"
    with whole_file(kept) as beside:
        save_file(joined, beside)
    return PnpError(
        f"the loss or its gradient is {value} at step {step}; its batch is kept in {kept}, the last good checkpoint "
        f"in {folder / 'checkpoints'}. Lower --lr (it is {config.lr:g}) and start again with another --out"
    )


class _State:
    """What a checkpoint holds: weights, averaged weights, the optimiser's moments, and the loss scale."""

    def __init__(
        self, folder: Path, names: list[str], live: list[Tensor], shadow: list[Tensor],
        optimiser: torch.optim.Optimizer, scaler: Any,
    ) -> None:  # fmt: skip
        self.folder, self.names, self.live, self.shadow = folder, names, live, shadow
        self.optimiser, self.scaler = optimiser, scaler

    def save(self, step: int, keep: int) -> None:
        """Write the checkpoint of ``step``, whole or not at all, and drop all but the newest ``keep``.

        Raises:
            PnpError: if the disk is full; the older checkpoints stay.
        """
        # safetensors, not pickles: a checkpoint may come from somebody else
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for name, p, s in zip(self.names, self.live, self.shadow, strict=True):
            state = self.optimiser.state[p]
            tensors |= {f"live.{name}": p.detach(), f"ema.{name}": s}
            tensors |= {f"exp_avg.{name}": state["exp_avg"], f"exp_avg_sq.{name}": state["exp_avg_sq"]}
        about = {"step": step, "scaler": self.scaler.state_dict() if self.scaler is not None else None}
        path = self.folder / f"step-{step:07d}.safetensors"
        held, metadata = {k: v.contiguous() for k, v in tensors.items()}, {"state": json.dumps(about)}
        try:
            with whole_file(path) as beside:
                save_file(held, beside, metadata=metadata)
        except PnpError as e:
            raise PnpError(
                f"the checkpoint {path} could not be written ({e.__cause__}); the one before it is whole. "
                "Make room and continue with --resume"
            ) from e
        for _, old in _checkpoints(self.folder)[:-keep]:
            old.unlink()

    def load(self) -> int:
        """Continue from the newest checkpoint; returns its step, 0 where there is none."""
        from safetensors import SafetensorError, safe_open

        found = _checkpoints(self.folder)
        if not found:
            return 0
        step, path = found[-1]
        try:
            with safe_open(path, "pt") as f:
                about = json.loads(f.metadata()["state"])
                if about["step"] != step:
                    raise ValueError(f"it is of step {about['step']}")
                with torch.no_grad():
                    for name, p, s in zip(self.names, self.live, self.shadow, strict=True):
                        p.copy_(f.get_tensor(f"live.{name}"))
                        s.copy_(f.get_tensor(f"ema.{name}"))
                        self.optimiser.state[p] = {
                            "step": torch.tensor(float(step)),
                            "exp_avg": f.get_tensor(f"exp_avg.{name}").to(p.device),
                            "exp_avg_sq": f.get_tensor(f"exp_avg_sq.{name}").to(p.device),
                        }
            if self.scaler is not None and about["scaler"]:
                self.scaler.load_state_dict(about["scaler"])
        except (SafetensorError, OSError, KeyError, RuntimeError, TypeError, ValueError) as e:
            raise InputError(
                f"the checkpoint {path} cannot be continued from ({e}); delete it to continue from an older one"
            ) from e
        return step
