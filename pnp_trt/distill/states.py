"""Training states: noisy latents for the student, and the teacher's two predictions for each.

``trajectory`` states lie on the teacher's own guided sampling runs.  They need prompts alone and are what a sampler
visits (Jensen et al., *Adapter Guidance Distillation*, TMLR 2025, §3.2).  ``forward`` states are images' latents with
noise added, as in the paper.  Both teacher predictions are stored for every state, so that any guidance scale can be
its target and training never evaluates the teacher.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bundle.runs import read_record
from ..bundle.store import digest, write_json
from ..errors import InputError, PnpError
from ..io.files import make_folder, whole_file
from ..models.conditioning import Conditions
from ..models.student import both_predictions
from ..sampling.schedules import alphas_cumprod

KINDS = ("trajectory", "forward")


@dataclass(frozen=True)
class StateConfig:
    """Settings of the collection of states.

    Attributes:
        kind: ``trajectory`` or ``forward``.
        count: number of states, rounded up to full shards.
        steps: steps of a trajectory; each gives one state.
        w_min, w_max: the guidance scale of a trajectory is uniform in this range.
        negative: share of the states whose unconditional prediction is for a negative prompt instead of the empty one.
        batch: trajectories at a time; a shard of the cache holds ``batch * steps`` states.
    """

    kind: str = "trajectory"
    count: int = 19_200
    steps: int = 20
    w_min: float = 1.0
    w_max: float = 9.0
    negative: float = 0.0
    batch: int = 32
    seed: int = 0

    @property
    def per_shard(self) -> int:
        """States of a full shard."""
        return self.batch * self.steps

    @property
    def shards(self) -> int:
        """Number of files of the cache."""
        return -(-self.count // self.per_shard)

    def check(self) -> None:
        """Raise ``InputError`` for a value out of range."""
        if self.kind not in KINDS:
            raise InputError(f"the kind of states is '{self.kind}'; known: {', '.join(KINDS)}")
        for name, least in (("count", 1), ("steps", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} of the states is {getattr(self, name)}; it must be at least {least}")
        if not 0.0 <= self.negative <= 1.0:
            raise InputError(f"the share of negative prompts is {self.negative:g}; it must be between 0 and 1")


class MappedRows:
    """Rows of several memory-mapped tensors, as if they were concatenated; a state is read only when it is indexed.

    Concatenating them would load the whole collection into the memory of every process.
    """

    def __init__(self, parts: list[Tensor]) -> None:
        self._parts = parts
        self._ends = torch.tensor([len(part) for part in parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, rows: int | Sequence[int] | Tensor) -> Tensor:
        """The rows ``[n, ...]`` in the order of the indices; for a single index, the row without its first dimension.

        Raises:
            IndexError: for an index out of range.
        """
        index = torch.as_tensor(rows)
        flat = index.reshape(-1)
        if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < len(self):
            raise IndexError(f"rows {int(flat.min())} to {int(flat.max())} of {len(self)}")
        part = torch.searchsorted(self._ends, flat, right=True)
        out = self._parts[0].new_empty((len(flat), *self._parts[0].shape[1:]))
        for number in part.unique().tolist():
            mask = part == number
            first = int(self._ends[number]) - len(self._parts[number])
            out[mask] = self._parts[number][flat[mask] - first]
        return out.reshape(*index.shape, *out.shape[1:])


@dataclass
class States:
    """Collected states; all have the same number of rows.

    Attributes:
        sample: noisy latents x_t, float16 ``[N, C, H, W]``.
        timestep: int64 ``[N]``.
        prompt, negative: rows of ``conditions``, int64 ``[N]``.
        conditional, unconditional: the teacher's two predictions, float16 ``[N, C, H, W]``.
        conditions: conditions of the prompts.
    """

    sample: MappedRows
    timestep: Tensor
    prompt: Tensor
    negative: Tensor
    conditional: MappedRows
    unconditional: MappedRows
    conditions: Conditions

    def __len__(self) -> int:
        return len(self.sample)


@dataclass(frozen=True)
class Latents:
    """Clean latents of the images for forward states: ``latents [M, C, H, W]`` and the prompt of each, ``[M]``."""

    latents: Tensor
    prompt: Tensor


def size_in_bytes(config: StateConfig, sample: tuple[int, ...]) -> int:
    """Disk space that the cached states will take; ``sample`` is the latent's shape ``(C, H, W)``."""
    per_state = 3 * 2 * int(torch.tensor(sample).prod()) + 24
    return config.shards * config.per_shard * per_state


@dataclass(frozen=True)
class Collection:
    """States in a folder, one safetensors shard per batch: a killed run resumes, and any machine can make any shard.

    Attributes:
        unet: the frozen teacher.
        scheduler: its scheduler config.
        conditions: conditions of the prompts.
        config: settings of the collection.
        folder: cache of the shards; runs with equal settings may share it.
        identity: what the shards depend on besides ``config`` (hashes of teacher and prompts).
        images: latents for forward states.
    """

    unet: Any
    scheduler: dict[str, Any]
    conditions: Conditions
    config: StateConfig
    folder: Path
    identity: dict[str, Any]
    images: Latents | None = None

    def make(self, shards: range, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Make those of ``shards`` that the folder lacks.  A shard depends on its number alone, not on the process.

        Args:
            progress: called with (shards done, total number of shards, a note on the size).

        Raises:
            InputError: if the folder holds the states of another run, or the disk is too small.
            PnpError: if the teacher's prediction is not finite.
        """
        self.config.check()
        if self.config.kind == "forward" and self.images is None:
            raise InputError("forward states are noised images; pass a folder of captioned images with --images")
        size = self.unet.config.sample_size
        needed = size_in_bytes(self.config, (self.unet.config.in_channels, size, size))
        note = f"{self.config.shards * self.config.per_shard:,} states, {needed / 2**20:,.0f} MiB"
        _claim_cache(self.folder, self.config, self.identity, needed)
        collect = _trajectories if self.config.kind == "trajectory" else _noised
        if progress is not None:
            progress(0, len(shards), note)
        for done, shard in enumerate(shards, 1):
            if not (path := shard_path(self.folder, shard)).exists():
                write_shard(collect(self.unet, self.scheduler, self.conditions, self.config, shard, self.images), path)
            if progress is not None:
                progress(done, len(shards), note)

    def shard_count(self) -> int:
        """Number of shards in the folder."""
        return sum(shard_path(self.folder, number).is_file() for number in range(self.config.shards))

    def read(self) -> States:
        """All states.

        Raises:
            InputError: if a shard is missing or damaged.
        """
        return States(**read_shards(self.folder, self.config.shards), conditions=self.conditions)


def split(config: StateConfig, share: float = 0.05) -> tuple[list[int], list[int]]:
    """Rows to train on and rows held out, in whole shards, because states of one trajectory resemble each other."""
    count = config.shards * config.per_shard
    shards = held_out_shards(config, share)
    end = count - shards * config.per_shard
    # a single shard cannot be split: the run is checked on its training states
    return list(range(end)), list(range(end, count)) if shards else list(range(count))


def held_out_shards(config: StateConfig, share: float = 0.05) -> int:
    """Number of shards, at the end of the collection, that are held out."""
    return max(1, round(config.shards * share)) if config.shards > 1 else 0


def _claim_cache(folder: Path, config: StateConfig, identity: dict[str, Any], needed: int) -> None:
    settings = asdict(config)
    if config.kind == "trajectory":
        # shards are the same in a larger collection, so a collection can be extended
        settings.pop("count")
    key = digest([settings, identity])
    record = folder / "states.json"
    if record.exists():
        advice = "choose another --out or --states-dir, or delete that folder"
        if read_record(record, advice).get("key") != key:
            raise InputError(
                f"{folder} holds the states of another run; choose another --out or --states-dir, or delete that folder"
            )
    elif any(folder.glob("shard-*.safetensors")):
        raise InputError(f"{folder} holds states without their states.json; choose another --states-dir")
    make_folder(folder)
    present = sum(p.stat().st_size for p in folder.glob("shard-*.safetensors"))
    free = shutil.disk_usage(folder).free
    if needed - present > free:
        raise InputError(
            f"the states need {(needed - present) / 2**20:,.0f} MiB more in {folder} and {free / 2**20:,.0f} MiB are "
            "free; collect fewer with --num-states, or choose another --states-dir"
        )
    write_json(record, {"key": key, "config": asdict(config), **identity})


def shard_path(folder: Path, number: int) -> Path:
    """Path of a shard."""
    return folder / f"shard-{number:04d}.safetensors"


def write_shard(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file atomically, with the digest of its tensors in its metadata.

    Raises:
        PnpError: if the disk is full; no partial file is left.
    """
    from safetensors.torch import save_file

    contiguous = {k: v.contiguous() for k, v in tensors.items()}
    with whole_file(path) as temporary:
        save_file(contiguous, temporary, metadata={"sha256": _digest(contiguous)})


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha256.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _read_shard(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        recorded = (f.metadata() or {}).get("sha256")
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    if recorded is None:
        raise ValueError("it has no digest of its values, because an earlier version wrote it")
    if (actual := _digest(tensors)) != recorded:
        raise ValueError(f"sha256 of its values {actual[:12]}…, recorded {recorded[:12]}…")
    return tensors


def read_shards(folder: Path, count: int) -> dict[str, Any]:
    """The tensors of shards 0 … ``count`` - 1 by name: concatenated where a row is one number, else as ``MappedRows``.

    Raises:
        InputError: if a shard is missing or has changed; the message names it.
    """
    from safetensors import SafetensorError

    parts = []
    for number in range(count):
        path = shard_path(folder, number)
        try:
            parts.append(_read_shard(path))
        except (SafetensorError, OSError, ValueError) as e:
            raise InputError(f"the shard {path} is damaged ({e}); delete it, and it will be made again") from e
    return {
        name: torch.cat([p[name] for p in parts]) if first.ndim == 1 else MappedRows([p[name] for p in parts])
        for name, first in parts[0].items()
    }


class _Draws:
    """Random choices of one shard, which depend on its number alone."""

    def __init__(self, config: StateConfig, shard: int, conditions: Conditions, rows: Tensor | None) -> None:
        rng = self.rng = random.Random(f"{config.seed}/{shard}")
        self.generator = torch.Generator().manual_seed(rng.getrandbits(62))
        prompts = conditions.empty
        n = config.batch
        self.rows = torch.tensor([rng.randrange(prompts) for _ in range(n)]) if rows is None else rows
        negative_rng = random.Random(f"{config.seed}/{shard}/negative")
        self.negative = torch.tensor(
            [
                negative_rng.randrange(prompts) if negative_rng.random() < config.negative else prompts
                for _ in range(len(self.rows))
            ]
        )


@torch.no_grad()
def _trajectories(
    unet: Any, scheduler: dict[str, Any], conditions: Conditions, config: StateConfig, shard: int, _: Latents | None
) -> dict[str, Tensor]:
    device = next(unet.parameters()).device
    abar = torch.from_numpy(alphas_cumprod(scheduler)).float().to(device)
    is_v = _is_v_prediction(scheduler)
    stride = len(abar) // config.steps
    draws = _Draws(config, shard, conditions, None)
    n = config.batch
    w = torch.rand(n, generator=draws.generator) * (config.w_max - config.w_min) + config.w_min
    w = w.to(device)[:, None, None, None]
    size = unet.config.sample_size
    x = torch.randn(n, unet.config.in_channels, size, size, generator=draws.generator).to(device)
    # random timesteps, one per interval: the guide must work at every timestep, not only at those of one schedule
    times = [stride * i + draws.rng.randrange(stride) for i in reversed(range(config.steps))]
    collected: dict[str, list[Tensor]] = {k: [] for k in ("sample", "timestep", "conditional", "unconditional")}
    predict_both = _teacher(unet, conditions, draws.rows, draws.negative)
    for i, t in enumerate(times):
        e_u, e_c = predict_both(x, torch.full((n,), t, device=device))
        collected["sample"].append(x.half().cpu())
        collected["timestep"].append(torch.full((n,), t))
        collected["conditional"].append(e_c.half().cpu())
        collected["unconditional"].append(e_u.half().cpu())
        output = e_u + w * (e_c - e_u)
        a = abar[t]
        next_abar = abar[times[i + 1]] if i + 1 < len(times) else torch.ones((), device=device)
        x0 = a.sqrt() * x - (1 - a).sqrt() * output if is_v else (x - (1 - a).sqrt() * output) / a.sqrt()
        eps = a.sqrt() * output + (1 - a).sqrt() * x if is_v else output
        x = next_abar.sqrt() * x0 + (1 - next_abar).sqrt() * eps
    tensors = {k: torch.cat(v) for k, v in collected.items()}
    return tensors | {"prompt": draws.rows.repeat(config.steps), "negative": draws.negative.repeat(config.steps)}


@torch.no_grad()
def _noised(
    unet: Any,
    scheduler: dict[str, Any],
    conditions: Conditions,
    config: StateConfig,
    shard: int,
    images: Latents | None,
) -> dict[str, Tensor]:
    assert images is not None
    device = next(unet.parameters()).device
    abar = torch.from_numpy(alphas_cumprod(scheduler)).float().to(device)
    _is_v_prediction(scheduler)
    # held-out shards take the last images, which no other shard uses
    held_out, count = held_out_shards(config), len(images.latents)
    edge = count - max(1, round(count * 0.05)) if held_out and count > 1 else count
    low, high = (edge, count) if shard >= config.shards - held_out and edge < count else (0, edge)
    rng = random.Random(f"{config.seed}/{shard}/pictures")
    which = torch.tensor([rng.randrange(low, high) for _ in range(config.per_shard)])
    draws = _Draws(config, shard, conditions, images.prompt[which])
    collected: dict[str, list[Tensor]] = {k: [] for k in ("sample", "timestep", "conditional", "unconditional")}
    for start in range(0, len(which), config.batch):
        part = slice(start, start + config.batch)
        x0 = images.latents[which[part]].float()
        t = torch.randint(0, len(abar), (len(x0),), generator=draws.generator)
        noise = torch.randn(x0.shape, generator=draws.generator)
        a = abar.cpu()[t][:, None, None, None]
        x = (a.sqrt() * x0 + (1 - a).sqrt() * noise).to(device)
        e_u, e_c = _teacher(unet, conditions, draws.rows[part], draws.negative[part])(x, t.to(device))
        for name, value in (("sample", x), ("conditional", e_c), ("unconditional", e_u)):
            collected[name].append(value.half().cpu())
        collected["timestep"].append(t)
    return {k: torch.cat(v) for k, v in collected.items()} | {"prompt": draws.rows, "negative": draws.negative}


def _teacher(unet: Any, conditions: Conditions, rows: Tensor, negative: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    device = next(unet.parameters()).device
    text, empty = conditions.text(rows, device), conditions.text(negative, device)
    added = conditions.added(torch.cat([negative, rows]), device)

    def predict_both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        e_u, e_c = both_predictions(unet, x, t, text, empty, added)
        if not (e_u.isfinite().all() and e_c.isfinite().all()):
            raise PnpError(
                f"the teacher's prediction is not finite at timestep {int(t[0])}; check the base model's weights"
            )
        return e_u, e_c

    return predict_both


def _is_v_prediction(scheduler: dict[str, Any]) -> bool:
    kind = scheduler.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise InputError(f"prediction_type is '{kind}'; known: epsilon, v_prediction")
    return kind == "v_prediction"
