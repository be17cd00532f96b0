"""Stage 2: progressive distillation of the sampler, guide only (Salimans & Ho 2022, algorithm 2).

One step of the new student lands where two DDIM steps of the previous one land.  The teacher U-Net stays frozen and
only the guide is trained.  Halving is repeated, 32 → 16 → 8 → 4, and every intermediate guide is saved.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..bundle.runs import claim, read_record
from ..bundle.store import digest, sha256, write_json
from ..errors import InputError, PnpError
from ..io.files import check_writable_folder
from ..io.progress import Progress
from ..models.catalog import guide_folder
from ..models.conditioning import Conditions
from ..models.guides.load import load_guide
from ..models.student import Student
from ..sampling.schedules import ddim, ddim_step
from .monitor import Board, ImageGrid, LossLog, averaged, save_grid
from .run import TeacherModel, guide_weights, origin, report_head, save_guide
from .states import MappedRows, read_shards, shard_path, write_shard
from .train import TrainConfig, begin, newest_step, train

WEIGHTINGS = ("landing", "none")
HELD_OUT = 0.06


@dataclass(frozen=True)
class StepsConfig:
    """Settings of a stage 2 run.

    Attributes:
        guide: folder or name of a stage 1 guide.
        out: folder; each halving's guide goes to ``out/steps-N``.
        to, start: steps of the last student and of the first teacher; ``start`` is ``to`` times a power of two.
        base, prompts: None takes those that the guide was distilled with.
        w_min, w_max: range of the guidance scale.
        trajectories: sampling runs of the previous student in each halving; each gives one state per step of the new
            student.
        weighting: ``landing`` weighs each step's error by its effect on the latent after the step; ``none`` does not.
        batch_runs: trajectories at a time.
        grid: whether an image grid is written after each halving.
    """

    guide: str
    out: Path
    to: int = 8
    start: int = 32
    base: str | None = None
    prompts: Path | None = None
    w_min: float = 1.0
    w_max: float = 9.0
    trajectories: int = 640
    weighting: str = "landing"
    batch_runs: int = 32
    grid: bool = True
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=600, lr=5e-4, batch=32))

    def chain(self) -> list[int]:
        """Number of steps of the student after each halving.

        Raises:
            InputError: if ``start`` is not ``to`` times a power of two.
        """
        steps, chain = self.start, []
        while steps > self.to and steps % 2 == 0:
            steps //= 2
            chain.append(steps)
        if not chain or chain[-1] != self.to or self.to < 1:
            raise InputError(
                f"{self.start} steps cannot be halved to {self.to}; --from must be --to times 2, 4, 8 … "
                f"(for example --from {max(self.to, 1) * 4})"
            )
        return chain

    def check(self) -> None:
        """Raise ``InputError`` for values out of range."""
        self.chain()
        if not 1.0 <= self.w_min < self.w_max < math.inf:
            raise InputError(
                f"the range of w is {self.w_min:g} to {self.w_max:g}; it must start at 1 or above and not be empty"
            )
        if self.weighting not in WEIGHTINGS:
            raise InputError(f"weighting is '{self.weighting}'; known: {', '.join(WEIGHTINGS)}")
        for name in ("trajectories", "batch_runs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass
class Landings:
    """Training data of one halving; all fields have the same number of rows.

    Attributes:
        sample: latents on the new student's step grid, float16 ``[N, C, H, W]``.
        timestep: int64 ``[N]``.
        prompt: rows of ``conditions``, int64 ``[N]``.
        w: float32 ``[N]``.
        target: the prediction whose single step lands where two steps of the previous student do, float16.
        conditions: conditions of the prompts.
    """

    sample: MappedRows
    timestep: Tensor
    prompt: Tensor
    w: Tensor
    target: MappedRows
    conditions: Conditions

    def __len__(self) -> int:
        return len(self.sample)


def distill(config: StepsConfig, *, resume: bool = False, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Halve the steps down to ``config.to``; returns the report of every halving.

    Each halving's guide has a separate folder with ``distill.json``; a complete one is not made again.

    Args:
        resume: continue the run in ``config.out``.
        progress: called with (stage, done, total, note).

    Raises:
        InputError: if the steps cannot be halved to ``to``, for unknown names, or an ``out`` that holds another run.
        PnpError: if a prediction or the loss is not finite.
    """
    config.check()
    accelerator, resolved, notify = begin(config.train, progress)
    config, main = replace(config, train=resolved), accelerator.is_main_process
    check_writable_folder(config.out)
    folder = guide_folder(config.guide)
    weights = guide_weights(folder)
    first = load_guide(str(folder))
    base, prompts, _ = origin(folder, config.base, config.prompts)
    teacher = TeacherModel.load(base, prompts, accelerator.device)
    settings = {k: v for k, v in asdict(config).items() if k not in ("out", "grid")}
    settings |= {
        "base": base, "prompts": digest(prompts), "teacher": teacher.hashes,
        "guide": sha256(weights),
    }  # fmt: skip
    if first.config.get("gain") is not None:  # it is in the config, not in the weights
        settings["gain"] = list(first.config.gain)
    if main:
        claim(config.out, settings, resume)
    accelerator.wait_for_everyone()
    grid = ImageGrid(teacher, config.start) if main and config.grid else None
    reports = []
    previous_steps, previous = config.start, first
    for steps in config.chain():
        target = config.out / f"steps-{steps}"
        if not (target / "distill.json").is_file():
            _halve(config, teacher, previous, previous_steps, steps, target, settings, accelerator, notify, grid)
        accelerator.wait_for_everyone()
        reports.append(read_record(target / "distill.json", f"delete {target}, and it will be made again"))
        previous_steps, previous = steps, load_guide(str(target))
    return reports


def _halve(
    config: StepsConfig, teacher: TeacherModel, previous: Any, previous_steps: int, steps: int, folder: Path,
    settings: dict[str, Any], accelerator: Any, notify: Progress, grid: ImageGrid | None,
) -> None:  # fmt: skip
    started = time.monotonic()
    stage = f"{previous_steps} to {steps} steps"
    main = accelerator.is_main_process
    previous_student = Student(teacher.unet, previous.to(teacher.device).eval().requires_grad_(False))
    landings = _landings(
        previous_student, config, teacher, steps, folder / "states", accelerator, partial(notify, f"{stage}, states")
    )

    torch.manual_seed(config.train.seed)
    guide = copy.deepcopy(previous).requires_grad_(True)
    if guide.sharpener is not None:  # the trajectories have no negative prompts
        guide.sharpener.requires_grad_(False)
    guide.register_to_config(sampling_steps=steps)
    if config.train.gradient_checkpointing:
        teacher.unet.enable_gradient_checkpointing()
    student = Student(teacher.unet, guide)
    held_out_shards = max(1, round(_shards(config) * HELD_OUT)) if _shards(config) > 1 else 0
    edge = len(landings) - held_out_shards * config.batch_runs * steps
    held_out = list(range(edge, len(landings))) if held_out_shards else list(range(len(landings)))
    objective = StepsObjective(landings, list(range(edge)), teacher, config, steps)
    board = Board(folder / "logs", newest_step(folder)) if main else None
    loss = LossLog(board, partial(notify, stage))

    def watch(step: int, weights: dict[str, Tensor]) -> None:
        assert board is not None
        with averaged(guide, weights):
            error = landing_error(student, objective, landings, held_out[:: max(1, len(held_out) // 256)])
        board.numbers(step, held_out_landing_error=error)

    train(student, guide, objective, config.train, folder, accelerator, loss, watch if main else None)
    if not main:
        return
    assert board is not None
    guide.eval()
    checked = held_out[:: max(1, len(held_out) // 512)]
    errors = {
        name: landing_error(model, objective, landings, checked)
        for name, model in (("before", previous_student), ("after", student))
    }
    if grid is not None:
        pixels = grid.draw(student, ddim(teacher.scheduler, steps))
        board.image(config.train.steps, "grid", pixels)
        save_grid(pixels, folder / "grid.png")
    board.close()
    save_guide(guide, folder)
    report = {
        "schema": "pnp-trt/distill/2",
        "stage": "steps",
        "from": previous_steps,
        "to": steps,
        **report_head(teacher, guide, settings, time.monotonic() - started),
        "states": len(landings),
        "final_loss": loss.smooth,
        # error of the single step's result; a residual of 1 means no improvement
        "held_out": {"states": len(checked), **errors, "residual": errors["after"] / errors["before"]},
    }
    write_json(folder / "distill.json", report)


def _landings(
    previous_student: Student, config: StepsConfig, teacher: TeacherModel, steps: int, folder: Path, accelerator: Any,
    notify: Callable[[int, int, str], object],
) -> Landings:  # fmt: skip
    """The states of a halving; all processes share in collecting those that ``folder`` lacks."""
    rank, world = accelerator.process_index, accelerator.num_processes
    for shard in range(_shards(config)):
        path = shard_path(folder, shard)
        if shard % world == rank and not path.exists():
            _collect(previous_student, teacher, config, steps, shard, path)
        notify(shard + 1, _shards(config), "")
    accelerator.wait_for_everyone()
    return Landings(**read_shards(folder, _shards(config)), conditions=teacher.conditions)


def _shards(config: StepsConfig) -> int:
    return -(-config.trajectories // config.batch_runs)


@torch.no_grad()
def _collect(
    previous_student: Student, teacher: TeacherModel, config: StepsConfig, steps: int, shard: int, path: Path
) -> None:  # fmt: skip
    """Run the previous student, two steps for each step of the new one, and write the states and their targets."""
    device = teacher.device
    rng = random.Random(f"{config.train.seed}/{steps}/{shard}")
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    n = config.batch_runs
    rows = torch.tensor([rng.randrange(teacher.conditions.empty) for _ in range(n)])
    w = torch.tensor([rng.uniform(config.w_min, config.w_max) for _ in range(n)])
    x = torch.randn(n, *teacher.sample_shape, generator=generator).to(device)
    predict = _predictor(previous_student, teacher.conditions, rows, w, device)
    collected: dict[str, list[Tensor]] = {k: [] for k in ("sample", "timestep", "target")}
    schedule = ddim(teacher.scheduler, steps)
    for k, t in enumerate(schedule.timesteps.tolist()):
        after = t - teacher.scheduler.get("num_train_timesteps", 1000) // steps
        middle = max(0, round((t + after) / 2))
        landed = x
        for current, next_t in ((t, middle), (middle, after)):
            scale, out = ddim_step(teacher.scheduler, current, next_t)
            landed = scale * landed + out * predict(landed, torch.full((n,), current, device=device))
        target = (landed - float(schedule.x_scale[k]) * x) / float(schedule.output_scale[k])
        if not target.isfinite().all():
            raise PnpError(
                f"the previous student's prediction is not finite at timestep {t}; check the guide's weights"
            )
        collected["sample"].append(x.half().cpu())
        collected["timestep"].append(torch.full((n,), t))
        collected["target"].append(target.half().cpu())
        x = landed
    tensors = {k: torch.cat(v) for k, v in collected.items()} | {"prompt": rows.repeat(steps), "w": w.repeat(steps)}
    write_shard(tensors, path)


def _predictor(
    student: nn.Module, conditions: Conditions, rows: Tensor, w: Tensor, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    text = conditions.text(rows, device)
    negative = conditions.text(torch.full((len(rows),), conditions.empty), device)
    added = conditions.added(rows, device)
    scale = w.to(device)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return student(x, t, text, scale, negative=negative, added_cond_kwargs=added).float()

    return predict


class StepsObjective:
    """The new student's error against the prediction whose single step lands where two of the previous student do."""

    def __init__(
        self, landings: Landings, rows: list[int], teacher: TeacherModel, config: StepsConfig, steps: int
    ) -> None:
        self._landings, self._rows, self._teacher, self._config = landings, rows, teacher, config
        schedule = ddim(teacher.scheduler, steps)
        weight = np.zeros(teacher.scheduler.get("num_train_timesteps", 1000), np.float32)
        weight[schedule.timesteps] = np.square(schedule.output_scale) if config.weighting == "landing" else 1.0
        self._by_time = torch.from_numpy(weight / weight[schedule.timesteps].mean())

    def batch(self, step: int, part: int, parts: int) -> dict[str, Tensor]:
        """Rows of a step, with the states themselves, so that a saved batch is complete for debugging."""
        rng = random.Random(f"{self._config.train.seed}/{step}")
        chosen = [self._rows[rng.randrange(len(self._rows))] for _ in range(self._config.train.batch)][part::parts]
        rows = torch.tensor(chosen)
        s = self._landings
        return {
            "row": rows, "w": s.w[rows], "sample": s.sample[rows], "timestep": s.timestep[rows],
            "target": s.target[rows],
        }  # fmt: skip

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The weighted mean squared error."""
        return self.errors(model, batch).mean()

    def errors(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Weighted squared error of each state, ``[N]``."""
        device = self._teacher.device
        c = self._landings.conditions
        predict = _predictor(model, c, self._landings.prompt[batch["row"]], batch["w"], device)
        prediction = predict(batch["sample"].float().to(device), batch["timestep"].to(device))
        weight = self._by_time[batch["timestep"]].to(device)
        return (prediction - batch["target"].float().to(device)).pow(2).flatten(1).mean(1) * weight


@torch.no_grad()
def landing_error(student: nn.Module, objective: StepsObjective, landings: Landings, rows: list[int]) -> float:
    """Mean weighted squared error over some states."""
    total = 0.0
    for part in _parts(rows, 64):
        pick = torch.tensor(part)
        batch = {
            "row": pick, "w": landings.w[pick], "sample": landings.sample[pick],
            "timestep": landings.timestep[pick], "target": landings.target[pick],
        }  # fmt: skip
        total += float(objective.errors(student, batch).sum())
    return total / len(rows)


def _parts(rows: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
