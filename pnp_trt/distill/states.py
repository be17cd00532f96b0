"""Training states from the teacher's own guided trajectories.

Forward-noised pictures are not what a sampler visits; states on CFG trajectories are, and they need
prompts alone (Jensen et al., *Adapter Guidance Distillation*, TMLR 2025, §3.2).  Both teacher passes are
kept for every state, so that any guidance scale can be its target and training never runs the teacher.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifacts import digest, write_json
from ..errors import InputError, PnpError
from ..runtime.schedule import alphas_cumprod


@dataclass(frozen=True)
class StateConfig:
    """How states are collected.

    Attributes:
        trajectories: guided sampling runs.
        steps: steps of each; every one gives a state.
        w_min, w_max: the scale of a run is uniform in this range.
        batch: runs at a time.
    """

    trajectories: int = 960
    steps: int = 20
    w_min: float = 1.0
    w_max: float = 9.0
    batch: int = 32
    seed: int = 0


@dataclass
class States:
    """Collected states; all tensors share their first dimension.

    Attributes:
        sample: noisy latents x_t, float16 ``[N, C, H, W]``.
        timestep: int64 ``[N]``.
        prompt: index into ``context``, int64 ``[N]``.
        conditional, unconditional: the teacher's two predictions, float16 ``[N, C, H, W]``.
        context: text states of the prompts, float32 ``[P, tokens, D]``.
    """

    sample: Tensor
    timestep: Tensor
    prompt: Tensor
    conditional: Tensor
    unconditional: Tensor
    context: Tensor

    def __len__(self) -> int:
        return len(self.sample)


def read_prompts(path: Path, limit: int = 1000) -> list[str]:
    """Prompts from a text file, one a line; blank lines are left out.

    Raises:
        InputError: if the file is missing, empty, not UTF-8, or a line has more than ``limit`` characters.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"the prompts file {path} does not exist; pass a text file with one prompt a line") from None
    except UnicodeDecodeError as e:
        raise InputError(f"the prompts file {path} is not UTF-8 text ({e.reason} at byte {e.start})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    for number, line in enumerate(lines, 1):
        if len(line) > limit:
            raise InputError(f"{path}, line {number} has {len(line)} characters; a prompt has at most {limit}")
    if not prompts:
        raise InputError(f"the prompts file {path} holds no prompt; write one a line")
    return prompts


@torch.no_grad()
def encode_prompts(base: Any, text_encoder: Any, prompts: list[str], device: torch.device) -> Tensor:
    """Text states ``[P, tokens, D]`` float32."""
    tokenizer = base.tokenizer()
    out = []
    for i in range(0, len(prompts), 64):
        ids = tokenizer(prompts[i : i + 64], padding="max_length", truncation=True, return_tensors="pt").input_ids
        out.append(text_encoder(ids.to(device)).last_hidden_state.float())
    return torch.cat(out)


def size_in_bytes(config: StateConfig, sample: tuple[int, ...]) -> int:
    """Disk that the cached states will take."""
    per_state = 3 * 2 * int(torch.tensor(sample).prod()) + 16
    return config.trajectories * config.steps * per_state


@torch.no_grad()
def collect(
    unet: Any,
    scheduler: dict[str, Any],
    context: Tensor,
    empty: Tensor,
    config: StateConfig,
    folder: Path,
    identity: dict[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> States:
    """Run guided DDIM and keep every state; one safetensors shard a batch, so that a killed run resumes.

    Args:
        unet: the frozen teacher.
        scheduler: its scheduler config.
        context: text states ``[P, tokens, D]``; ``empty``: those of the empty prompt, ``[1, tokens, D]``.
        folder: where shards are cached.
        identity: what the shards depend on besides ``config`` (hashes of teacher and prompts).
        progress: called with (shards done, shards in all).

    Raises:
        InputError: if ``folder`` holds the states of something else.
        PnpError: if the teacher's prediction is not finite.
    """
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    key = digest([asdict(config), identity])
    record = folder / "states.json"
    if record.exists():
        found = json.loads(record.read_text()).get("key")
        if found != key:
            raise InputError(f"{folder} holds the states of another run; choose another --out, or delete that folder")
    write_json(record, {"key": key, "config": asdict(config), **identity})

    device = next(unet.parameters()).device
    abar = torch.from_numpy(alphas_cumprod(scheduler)).float().to(device)
    if scheduler.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise InputError(f"prediction_type is '{scheduler['prediction_type']}'; known: epsilon, v_prediction")
    is_v = scheduler.get("prediction_type") == "v_prediction"
    stride = len(abar) // config.steps
    shards = -(-config.trajectories // config.batch)
    parts = []
    for shard in range(shards):
        path = folder / f"shard-{shard:04d}.safetensors"
        if not path.exists():
            rng = random.Random(f"{config.seed}/{shard}")
            generator = torch.Generator().manual_seed(rng.getrandbits(62))
            n = min(config.batch, config.trajectories - shard * config.batch)
            rows = torch.tensor([rng.randrange(len(context)) for _ in range(n)])
            text = torch.cat([empty.expand(n, -1, -1), context[rows.to(context.device)]])
            w = torch.rand(n, generator=generator) * (config.w_max - config.w_min) + config.w_min
            w = w.to(device)[:, None, None, None]
            size = unet.config.sample_size
            x = torch.randn(n, unet.config.in_channels, size, size, generator=generator).to(device)
            # a random offset of the step grid: the guide must serve every timestep, not the twenty of one schedule
            times = [stride * i + rng.randrange(stride) for i in reversed(range(config.steps))]
            kept: dict[str, list[Tensor]] = {k: [] for k in ("sample", "timestep", "conditional", "unconditional")}
            for i, t in enumerate(times):
                both = unet(torch.cat([x, x]), torch.tensor(t, device=device), text).sample
                e_u, e_c = both.chunk(2)
                if not both.isfinite().all():
                    raise PnpError(
                        f"the teacher's prediction is not finite at timestep {t}; check the base model's weights"
                    )
                kept["sample"].append(x.half().cpu())
                kept["timestep"].append(torch.full((n,), t))
                kept["conditional"].append(e_c.half().cpu())
                kept["unconditional"].append(e_u.half().cpu())
                output = e_u + w * (e_c - e_u)
                a = abar[t]
                before = abar[times[i + 1]] if i + 1 < len(times) else torch.ones((), device=device)
                x0 = a.sqrt() * x - (1 - a).sqrt() * output if is_v else (x - (1 - a).sqrt() * output) / a.sqrt()
                eps = a.sqrt() * output + (1 - a).sqrt() * x if is_v else output
                x = before.sqrt() * x0 + (1 - before).sqrt() * eps
            tensors = {k: torch.cat(v) for k, v in kept.items()}
            tensors["prompt"] = rows.repeat(config.steps)
            beside = path.with_suffix(".part")
            save_file(tensors, beside)
            beside.replace(path)
        parts.append(load_file(path))
        if progress is not None:
            progress(shard + 1, shards)
    joined = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    return States(**joined, context=context.cpu())
