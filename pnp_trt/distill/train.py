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
        accumulate: number of parts in which a process computes its share of a batch, one after the other.
        lr, schedule, warmup: peak rate; ``cosine`` (to a fiftieth) or ``constant``; linear warm-up steps.
        ema: decay of the averaged weights, which are the result.
        mixed_precision: ``no``, ``bf16`` or ``fp16`` for autocast in the student's forward pass; ``auto`` takes the
            type that the device multiplies in hardware.
        gradient_checkpointing: recompute activations in the backward pass, which is slower but takes less memory.
        checkpoint_every, keep: steps between checkpoints; number of newest checkpoints that are kept.
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
    """The training objective.  The batch depends on the step number alone, so that a resumed run is exact."""

    def batch(self, step: int, part: int, parts: int) -> dict[str, Tensor]:
        """Part ``part`` of ``parts`` of the batch of ``step``."""
        ...

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of a batch under ``model``, the student as prepared for the optimiser."""
        ...


def make_accelerator(mixed_precision: str = "no") -> Any:
    """An ``accelerate.Accelerator`` for the processes started by ``accelerate launch``, or for one process without it.

    Raises:
        InputError: if the precision is unknown, or this device does not support it.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if mixed_precision not in PRECISIONS:
        raise InputError(f"mixed precision is '{mixed_precision}'; known: {', '.join(PRECISIONS)}")
    if mixed_precision == "fp16" and not torch.cuda.is_available():
        raise InputError("mixed precision 'fp16' needs a GPU and there is none; use no, bf16 or auto")
    mixed_precision = processor.mixed_precision(mixed_precision, gpu=torch.cuda.is_available())
    # accelerate has one precision per process, and consecutive runs may need different ones
    AcceleratorState._reset_state()
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=mixed_precision)


def begin(config: TrainConfig, progress: Progress | None) -> tuple[Any, TrainConfig, Progress]:
    """The accelerator of a run, its config with the resolved precision, and a progress callback for the main process.

    The config has the resolved precision because a run can be resumed in the same precision only.

    Raises:
        InputError: as for :func:`make_accelerator` and ``TrainConfig.check``.
    """
    accelerator = make_accelerator(config.mixed_precision)
    config = replace(config, mixed_precision=accelerator.mixed_precision)
    config.check(accelerator.num_processes)
    report = progress if progress is not None and accelerator.is_main_process else (lambda *_: None)
    return accelerator, config, report


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint of the run in ``folder``; 0 without a checkpoint."""
    checkpoints = _checkpoints(folder / "checkpoints")
    return checkpoints[-1][0] if checkpoints else 0


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of a run's checkpoints, the oldest first; other files are ignored."""
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
    """Optimise ``guide`` inside ``student``; at the end it has the averaged weights.

    Args:
        folder: the run's folder; checkpoints are in ``folder/checkpoints``, and training resumes from the newest.
        accelerator: from :func:`make_accelerator`; several processes share each batch.
        progress: called with (step, steps, loss, learning rate) on every process.
        watch: called with (step, averaged weights by name) after each checkpoint, on the main process.

    Raises:
        InputError: for settings out of range, or a checkpoint that cannot be read.
        PnpError: if the loss or a gradient is not finite; the message names the step and the file with the batch.
    """
    accelerator = accelerator or make_accelerator(config.mixed_precision)
    processes, rank = accelerator.num_processes, accelerator.process_index
    config.check(processes)
    names = [k for k, p in guide.named_parameters() if p.requires_grad]
    parameters = dict(guide.named_parameters())
    live: list[Tensor] = [parameters[k] for k in names]
    shadow = [p.detach().clone() for p in live]
    optimiser = torch.optim.AdamW(live, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.99))
    state = _State(folder / "checkpoints", names, live, shadow, optimiser, accelerator.scaler)
    start = state.load()
    model = accelerator.prepare_model(student)
    parts = processes * config.accumulate
    for step in range(start, config.steps):
        rate = config.rate(step)
        for group in optimiser.param_groups:
            group["lr"] = rate
        shares = [(part * processes + rank, parts) for part in range(config.accumulate)]
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
        else:  # skips the step, and lowers the scale, if a scaled gradient overflowed
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
    """Add the gradients of this process's shares of a step's batch; return the mean loss and the shares' batches.

    Args:
        shares: (number, total number of shares) of each.
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
    """Context with the attention kernels for training; recomputation in the backward pass must use the same kernels.

    On the CPU, the fused attention's backward pass is several times slower than the plain one at these sizes.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def _maybe(context: Callable[[nn.Module], Any], model: nn.Module, condition: bool) -> Any:
    return context(model) if condition else contextlib.nullcontext()


def _not_finite(
    value: float, step: int, config: TrainConfig, folder: Path, batches: list[dict[str, Tensor]], rank: int
) -> PnpError:
    """The error for a loss or gradient that is not finite; the batch is saved for debugging."""
    from safetensors.torch import save_file

    joined = {k: torch.cat([b[k] for b in batches]).contiguous().cpu() for k in batches[0]}
    batch_file = folder / f"not-finite-step-{step}{f'-rank-{rank}' if rank else ''}.safetensors"
    with whole_file(batch_file) as temporary:
        save_file(joined, temporary)
    return PnpError(
        f"the loss or its gradient is {value} at step {step}; its batch is kept in {batch_file}, and the last good "
        f"checkpoint in {folder / 'checkpoints'}. Lower --lr (it is {config.lr:g}) and start again with another --out"
    )


class _State:
    """The contents of a checkpoint: weights, averaged weights, the optimiser's moments and the loss scale."""

    def __init__(
        self, folder: Path, names: list[str], live: list[Tensor], shadow: list[Tensor],
        optimiser: torch.optim.Optimizer, scaler: Any,
    ) -> None:  # fmt: skip
        self.folder, self.names, self.live, self.shadow = folder, names, live, shadow
        self.optimiser, self.scaler = optimiser, scaler

    def save(self, step: int, keep: int) -> None:
        """Write the checkpoint of ``step`` atomically, and delete all but the newest ``keep``.

        Raises:
            PnpError: if the disk is full; the older checkpoints remain.
        """
        # safetensors, not pickle: a checkpoint may come from an untrusted source
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for name, p, s in zip(self.names, self.live, self.shadow, strict=True):
            moments = self.optimiser.state[p]
            tensors |= {f"live.{name}": p.detach(), f"ema.{name}": s}
            tensors |= {f"exp_avg.{name}": moments["exp_avg"], f"exp_avg_sq.{name}": moments["exp_avg_sq"]}
        state_record = {"step": step, "scaler": self.scaler.state_dict() if self.scaler is not None else None}
        path = self.folder / f"step-{step:07d}.safetensors"
        contiguous, metadata = {k: v.contiguous() for k, v in tensors.items()}, {"state": json.dumps(state_record)}
        try:
            with whole_file(path) as temporary:
                save_file(contiguous, temporary, metadata=metadata)
        except PnpError as e:
            raise PnpError(
                f"the checkpoint {path} could not be written ({e.__cause__}); the previous one is intact. "
                "Make room and continue with --resume"
            ) from e
        for _, old in _checkpoints(self.folder)[:-keep]:
            old.unlink()

    def load(self) -> int:
        """Restore the newest checkpoint and return its step; 0 without a checkpoint."""
        from safetensors import SafetensorError, safe_open

        checkpoints = _checkpoints(self.folder)
        if not checkpoints:
            return 0
        step, path = checkpoints[-1]
        try:
            with safe_open(path, "pt") as f:
                state_record = json.loads(f.metadata()["state"])
                if state_record["step"] != step:
                    raise ValueError(f"it is of step {state_record['step']}")
                with torch.no_grad():
                    for name, p, s in zip(self.names, self.live, self.shadow, strict=True):
                        p.copy_(f.get_tensor(f"live.{name}"))
                        s.copy_(f.get_tensor(f"ema.{name}"))
                        self.optimiser.state[p] = {
                            "step": torch.tensor(float(step)),
                            "exp_avg": f.get_tensor(f"exp_avg.{name}").to(p.device),
                            "exp_avg_sq": f.get_tensor(f"exp_avg_sq.{name}").to(p.device),
                        }
            if self.scaler is not None and state_record["scaler"]:
                self.scaler.load_state_dict(state_record["scaler"])
        except (SafetensorError, OSError, KeyError, RuntimeError, TypeError, ValueError) as e:
            raise InputError(
                f"the checkpoint {path} cannot be continued from ({e}); delete it to continue from an older one"
            ) from e
        return step
