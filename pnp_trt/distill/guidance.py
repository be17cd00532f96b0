"""Stage 1: train a guide to predict in one evaluation what classifier-free guidance predicts in two."""

from __future__ import annotations

import math
import random
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bundle.runs import claim
from ..bundle.store import digest, sha256, write_json
from ..errors import InputError
from ..io.files import check_writable_folder
from ..io.inputs import shortened
from ..io.progress import Progress
from ..models.catalog import guide_folder
from ..models.guides import GUIDES, Guide
from ..models.guides.load import load_guide
from ..models.guides.sharpener import with_new_sharpener
from ..models.prompts import CaptionedImages, find_images, image_latents, read_prompts
from ..models.student import Student
from .features import feature_error
from .monitor import Board, ImageGrid, LossLog, averaged, held_out_error, predict_states, save_grid, target_of
from .run import TeacherModel, guide_weights, report_head, save_guide
from .states import Collection, Latents, StateConfig, States, split
from .train import TrainConfig, begin, make_accelerator, newest_step, train

WEIGHTINGS = ("x0", "guidance", "w", "none")
W_DISTRIBUTIONS = ("uniform", "log-uniform")
#: states that the error is watched on while training continues
WATCHED = 256
#: inner width of a sharpener where none is given
SHARPENER_WIDTH = 128


@dataclass(frozen=True)
class GuidanceConfig:
    """A stage 1 run.

    Attributes:
        base: the teacher's name.
        prompts: text file, one prompt a line; or None, and ``images`` is given.
        images: folder of captioned images; needed for forward states.
        out: the guide's folder.
        guide: which guide to make, a key of ``pnp_trt.models.guides.GUIDES``.
        options: of the guide's ``from_unet`` (the tiny guide's ``rank``, ``trunk_kind`` …).
        w_min, w_max: range of the guidance scale.
        w_distribution: ``uniform``, or ``log-uniform``, which draws small scales more often.
        weighting: of the squared error: as one of ``x0`` (times min(1/SNR, 5), over w); over the mean strength of
            ``guidance`` at the timestep; over ``w``; ``none``, the paper's.
        feature_matching: weight of the error of the last decoder block's features; above 0 it runs the teacher in
            every step.
        states_dir: where states are cached; None puts them into ``out``.
        grid_steps: sampling steps of the image grid; 0 writes none.
        sharpen: a guide to start from, a folder or a name: it gets a new sharpener, and nothing else of it is trained.
            ``guide`` is not read then, and ``options`` has ``sharpener_width`` alone.
    """

    base: str
    prompts: Path | None
    out: Path
    images: Path | None = None
    guide: str = "tiny"
    options: dict[str, Any] = field(default_factory=dict)
    w_min: float = 1.0
    w_max: float = 9.0
    w_distribution: str = "uniform"
    weighting: str = "x0"
    feature_matching: float = 0.0
    states_dir: Path | None = None
    grid_steps: int = 20
    states: StateConfig = field(default_factory=StateConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sharpen: str | None = None

    def check(self) -> None:
        """Raise ``InputError`` for unknown names and values out of range."""
        for name, value, known in (
            ("guide", self.guide, tuple(GUIDES)),
            ("weighting", self.weighting, WEIGHTINGS),
            ("w distribution", self.w_distribution, W_DISTRIBUTIONS),
        ):
            if value not in known:
                raise InputError(f"{name} is '{value}'; known: {', '.join(known)}")
        if not 1.0 <= self.w_min < self.w_max < math.inf:
            raise InputError(
                f"the range of w is {self.w_min:g} to {self.w_max:g}; it must start at 1 or above and not be empty"
            )
        if self.prompts is None and self.images is None:
            raise InputError("nothing to distil from; pass --prompts FILE, or --images DIR with captioned images")
        if self.states.kind == "forward" and self.images is None:
            raise InputError("forward states are noised images; pass a folder of captioned images with --images")
        if not (math.isfinite(self.feature_matching) and self.feature_matching >= 0):
            raise InputError(f"feature matching is {self.feature_matching:g}; it must be 0 or above")
        if not 0 <= self.grid_steps <= 1000:
            raise InputError(f"grid-steps is {self.grid_steps}; it must be 0 (none) to 1000 sampling steps")
        sharpens = self.sharpen is not None or self.options.get("sharpener_width") is not None
        if sharpens and self.states.negative == 0:
            raise InputError("a sharpener learns from states with a negative prompt; pass --negative 1")
        if self.sharpen is not None and self.options.keys() - {"sharpener_width"}:
            raise InputError(
                f"the guide {self.sharpen} keeps its design; with --sharpen the only option is sharpener_width"
            )
        self.states.check()

    def settings(self) -> dict[str, Any]:
        """What the result depends on."""
        found = asdict(self)
        for name in ("out", "states_dir", "grid_steps", *(("sharpen",) if self.sharpen is None else ())):
            found.pop(name)
        if self.sharpen is not None:
            found["sharpen_sha256"] = sha256(guide_weights(guide_folder(self.sharpen)))
        return found


def distill(config: GuidanceConfig, *, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Make a guide and write it, with its report ``distill.json``, to ``config.out``.

    Under ``accelerate launch`` the processes share states and batches; the first one writes.

    Args:
        resume: continue the run that ``config.out`` holds.
        progress: called with (stage, done, in all, note).

    Returns:
        The report.

    Raises:
        InputError: for unknown names, unreadable prompts or images, or an ``out`` that holds another run.
        PnpError: if the loss or the teacher is not finite.
    """
    config.check()
    check_writable_folder(config.out)
    if config.states_dir is not None:
        check_writable_folder(config.states_dir, "--states-dir")
    accelerator, resolved, say = begin(config.train, progress)
    config, main = replace(config, train=resolved), accelerator.is_main_process
    started = time.monotonic()
    teacher, collection = _collection(config, accelerator.device)
    identity = collection.identity
    if main:
        claim(config.out, config.settings() | identity, resume)
    accelerator.wait_for_everyone()

    share = range(accelerator.process_index, config.states.shards, accelerator.num_processes)
    collection.make(share, lambda done, total, note: say("states", done, total, note))
    accelerator.wait_for_everyone()
    states = collection.read()
    torch.manual_seed(config.train.seed)
    student = make_student(teacher, config)
    guide = student.guide
    rows, held_out = split(config.states)
    objective = GuidanceObjective(states, rows, teacher, config)
    board = Board(config.out / "logs", newest_step(config.out)) if main else None
    grid = ImageGrid(teacher, config.grid_steps) if main and config.grid_steps else None
    loss = LossLog(board, partial(say, "guide"))

    def watch(step: int, weights: dict[str, Tensor]) -> None:
        assert board is not None
        with averaged(guide, weights):
            found = held_out_error(student, states, held_out, limit=WATCHED)
            board.error(step, found)
            if grid is not None:
                board.image(step, "grid", grid.draw(student))
        say("guide", step, config.train.steps, f"held-out residual {found['residual']:.1%}")

    train(student, guide, objective, config.train, config.out, accelerator, loss, watch if main else None)
    report: dict[str, Any] = {}
    if main:
        assert board is not None
        guide.eval()
        error = held_out_error(student, states, held_out, lambda done, total: say("check", done, total, ""))
        board.close()
        if grid is not None:
            save_grid(grid.draw(student), config.out / "grid.png")
        save_guide(guide, config.out)
        report = {
            "schema": "pnp-trt/distill/2",
            "stage": "guidance",
            **report_head(teacher, guide, config.settings(), time.monotonic() - started),
            "identity": identity,
            "processes": accelerator.num_processes,
            "states": len(states),
            "final_loss": loss.smooth,
            "held_out": error,
        }
        write_json(config.out / "distill.json", report)
    accelerator.wait_for_everyone()
    return report


def collect_states(
    config: GuidanceConfig, shards: tuple[int, int] | None = None, *, progress: Progress | None = None
) -> tuple[int, int]:
    """Make states of a stage 1 run ahead of it, in ``config.states_dir``: a part on each of many machines.

    A shard depends on its number alone, so parts that were made anywhere are put together by copying their files.  A
    run of ``distill`` with the same settings and ``states_dir`` finds the shards and makes those that are missing.

    Args:
        shards: first and last number; None for all.
        progress: called with (stage, done, in all, note).

    Returns:
        (shards in the folder, shards in all).

    Raises:
        InputError: for a range outside the collection, and as of ``distill``.
        PnpError: if the teacher is not finite.
    """
    config.check()
    if config.states_dir is None:
        raise InputError("states that are made ahead need a folder; name one with --states-dir")
    end = config.states.shards - 1
    first, last = shards or (0, end)
    if not 0 <= first <= last <= end:
        raise InputError(f"the shards are {first} to {last}; they must be in order, from 0 to {end}")
    check_writable_folder(config.states_dir, "--states-dir")
    accelerator = make_accelerator(config.train.mixed_precision)
    _, collection = _collection(config, accelerator.device)
    say = progress or (lambda *_: None)
    collection.make(range(first, last + 1), lambda done, total, note: say("states", done, total, note))
    return collection.shard_count(), config.states.shards


def _collection(config: GuidanceConfig, device: Any) -> tuple[TeacherModel, Collection]:
    """The teacher, and the states of a run."""
    shots = find_images(config.images) if config.images is not None else None
    prompts = read_prompts(config.prompts) if config.prompts is not None else _captions(shots)
    teacher = TeacherModel.load(config.base, prompts, device)
    identity = {"teacher": teacher.hashes, "prompts": digest(prompts)}
    if shots is not None and config.states.kind == "forward":
        identity["pictures"] = digest([[sha256(f), c] for f, c in zip(shots.files, shots.captions, strict=True)])
    images = _latents(teacher, shots) if config.states.kind == "forward" else None
    folder = config.states_dir or config.out / "states"
    return teacher, Collection(
        teacher.unet, teacher.scheduler, teacher.conditions, config.states, folder, identity, images
    )


def make_student(teacher: TeacherModel, config: GuidanceConfig) -> Student:
    """A new guide of the run's kind in a student."""
    if config.sharpen is not None:
        width = config.options.get("sharpener_width", SHARPENER_WIDTH)
        return Student(teacher.unet, with_new_sharpener(load_guide(config.sharpen), width).to(teacher.device))
    options = dict(config.options)
    if config.states.negative > 0 and options.get("sharpener_width") is None:
        options.setdefault("negative_prompts", True)
    try:
        guide: Guide = GUIDES[config.guide].from_unet(teacher.unet, **options)
    except Exception as e:  # torch raises many types for sizes that are negative, huge or not numbers
        reason = shortened((str(e).splitlines() or [type(e).__name__])[0], 200)
        raise InputError(f"the {config.guide} guide does not take these options: {reason}") from e
    if config.train.gradient_checkpointing:
        teacher.unet.enable_gradient_checkpointing()
        guide.checkpoint_gradients()
    return Student(teacher.unet, guide.to(teacher.device))


class GuidanceObjective:
    """‖student(x_t, t, c, w) − eps_w‖², weighted, with t and w per sample (the paper's formula I)."""

    def __init__(self, states: States, rows: list[int], teacher: TeacherModel, config: GuidanceConfig) -> None:
        self._states, self._rows, self._teacher, self._config = states, rows, teacher, config
        self._by_time = _time_weights(states, rows, teacher.scheduler, config.weighting)

    def batch(self, step: int, part: int, parts: int) -> dict[str, Tensor]:
        """Rows and scales of a step, and the states themselves, so that a batch kept for looking at is whole."""
        c = self._config
        rng = random.Random(f"{c.train.seed}/{step}")
        pick = [self._rows[rng.randrange(len(self._rows))] for _ in range(c.train.batch)][part::parts]
        if c.w_distribution == "uniform":
            w = [rng.uniform(c.w_min, c.w_max) for _ in range(c.train.batch)]
        else:
            w = [math.exp(rng.uniform(math.log(c.w_min), math.log(c.w_max))) for _ in range(c.train.batch)]
        rows = torch.tensor(pick)
        s = self._states
        return {
            "row": rows, "w": torch.tensor(w[part::parts]), "sample": s.sample[rows], "timestep": s.timestep[rows],
            "conditional": s.conditional[rows], "unconditional": s.unconditional[rows],
        }  # fmt: skip

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The weighted mean squared error."""
        device = self._teacher.device
        w = batch["w"].to(device)
        prediction = predict_states(model, self._states, batch["row"], w)
        target, _ = target_of(self._states, batch["row"], w)
        weight = self._by_time[batch["timestep"]].to(device)
        if self._config.weighting in ("w", "x0"):
            weight = weight / w
        loss = ((prediction - target) ** 2 * weight[:, None, None, None]).mean()
        if self._config.feature_matching:
            loss = loss + self._config.feature_matching * feature_error(
                model, self._teacher, self._states, batch["row"], w
            )
        return loss


def _time_weights(states: States, rows: list[int], scheduler: dict[str, Any], weighting: str) -> Tensor:
    """Weight of each timestep, ``[T]``, with mean one."""
    from ..sampling.schedules import alphas_cumprod

    abar = torch.from_numpy(alphas_cumprod(scheduler)).float()
    if weighting == "x0":
        weight = ((1 - abar) / abar).clamp(max=5.0)
        return weight / weight.mean()
    if weighting != "guidance":
        return torch.ones_like(abar)
    some = torch.tensor(rows[:: max(1, len(rows) // 4096)])
    strength = (states.conditional[some].float() - states.unconditional[some].float()).pow(2).flatten(1).mean(1)
    bins = torch.div(states.timestep[some] * 20, len(abar), rounding_mode="floor")
    mean = torch.stack([strength[bins == b].mean() if (bins == b).any() else strength.mean() for b in range(20)])
    weight = (1 / mean.clamp(min=1e-8)).repeat_interleave(-(-len(abar) // 20))[: len(abar)]
    return weight / weight.mean()


def _captions(shots: CaptionedImages | None) -> list[str]:
    assert shots is not None
    return list(dict.fromkeys(shots.captions))


def _latents(teacher: TeacherModel, shots: CaptionedImages | None) -> Latents:
    """Latents of the images; their captions are looked up among, or added to, the run's prompts."""
    assert shots is not None
    vae = teacher.base.vae().float()
    side = teacher.sample_shape[1] * 2 ** (len(vae.config.block_out_channels) - 1)
    latents = image_latents(vae, shots.files, side, teacher.device)
    index = {p: i for i, p in enumerate(teacher.prompts)}
    missing = [c for c in shots.captions if c not in index]
    if missing:
        raise InputError(
            f"{len(missing)} captions of the images are not in the prompts file (the first: '{missing[0][:60]}'); "
            "leave --prompts out to use the captions alone"
        )
    return Latents(latents, torch.tensor([index[c] for c in shots.captions]))
