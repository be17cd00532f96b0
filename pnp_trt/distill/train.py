"""The training loop of guides: AdamW, warm-up and cosine, EMA, atomic checkpoints, exact resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError, PnpError


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation settings; the defaults suit the tiny guide on the bundled model."""

    steps: int = 1500
    batch: int = 48
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.01
    ema: float = 0.995
    checkpoint_every: int = 250
    keep: int = 2
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate at ``step``: linear warm-up, then cosine to a fiftieth."""
        warm = min(1.0, (step + 1) / max(1, min(self.warmup, self.steps // 10)))
        return self.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


def train(
    guide: nn.Module,
    loss_of: Callable[[int], Tensor],
    config: TrainConfig,
    folder: Path,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, Tensor]:
    """Optimise ``guide`` and return the averaged weights (they are also loaded into it).

    ``loss_of(step)`` draws its batch from the step alone, so that a resumed run repeats an unbroken one.

    Args:
        folder: checkpoints go to ``folder/checkpoints``; the newest is continued from.
        progress: called with (step, steps, loss).

    Raises:
        PnpError: if the loss is not finite; the last checkpoint and the step are named.
    """
    names = [k for k, p in guide.named_parameters() if p.requires_grad]
    parameters = dict(guide.named_parameters())
    live: list[Tensor] = [parameters[k] for k in names]
    shadow = [p.detach().clone() for p in live]
    optimiser = torch.optim.AdamW(live, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.99))
    checkpoints = folder / "checkpoints"
    start = _resume(checkpoints, names, live, shadow, optimiser)
    for step in range(start, config.steps):
        for group in optimiser.param_groups:
            group["lr"] = config.rate(step)
        loss = loss_of(step)
        value = loss.item()
        if not math.isfinite(value):
            raise PnpError(
                f"the loss is {value} at step {step}; the last good checkpoint is kept in {checkpoints}. "
                f"Lower --lr (it is {config.lr:g}) and resume with --resume"
            )
        loss.backward()
        nn.utils.clip_grad_norm_(live, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        decay = min(config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(shadow, live, 1 - decay)
        if progress is not None:
            progress(step + 1, config.steps, value)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            _save(checkpoints, step + 1, names, live, shadow, optimiser, config.keep)
    with torch.no_grad():
        for p, s in zip(live, shadow, strict=True):
            p.copy_(s)
    return dict(zip(names, shadow, strict=True))


def _save(
    folder: Path,
    step: int,
    names: list[str],
    live: list[Tensor],
    shadow: list[Tensor],
    optimiser: torch.optim.Optimizer,
    keep: int,
) -> None:
    # safetensors, not pickles: a checkpoint may come from somebody else
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, p, s in zip(names, live, shadow, strict=True):
        state = optimiser.state[p]
        tensors |= {f"live.{name}": p.detach(), f"ema.{name}": s}
        tensors |= {f"exp_avg.{name}": state["exp_avg"], f"exp_avg_sq.{name}": state["exp_avg_sq"]}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:07d}.safetensors"
    beside = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, beside, metadata={"state": json.dumps({"step": step})})
    beside.replace(path)
    for old in sorted(folder.glob("step-*.safetensors"))[:-keep]:
        old.unlink()


def _resume(
    folder: Path, names: list[str], live: list[Tensor], shadow: list[Tensor], optimiser: torch.optim.Optimizer
) -> int:
    from safetensors import SafetensorError, safe_open

    found = sorted(folder.glob("step-*.safetensors"))
    if not found:
        return 0
    try:
        with safe_open(found[-1], "pt") as f:
            step = int(json.loads(f.metadata()["state"])["step"])
            with torch.no_grad():
                for name, p, s in zip(names, live, shadow, strict=True):
                    p.copy_(f.get_tensor(f"live.{name}"))
                    s.copy_(f.get_tensor(f"ema.{name}"))
                    optimiser.state[p] = {
                        "step": torch.tensor(float(step)),
                        "exp_avg": f.get_tensor(f"exp_avg.{name}").to(p.device),
                        "exp_avg_sq": f.get_tensor(f"exp_avg_sq.{name}").to(p.device),
                    }
    except (SafetensorError, KeyError, RuntimeError) as e:
        raise InputError(
            f"the checkpoint {found[-1]} cannot be continued from ({e}); delete it to continue from an older one"
        ) from e
    return step
