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
#: states on which the error is monitored during training
WATCHED = 256
#: default inner width of a sharpener
SHARPENER_WIDTH = 128


@dataclass(frozen=True)
class GuidanceConfig:
    """Settings of a stage 1 run.

    Attributes:
        base: the teacher's name.
        prompts: text file with one prompt a line; None uses the captions of ``images``.
        images: folder of captioned images; needed for forward states.
        out: the guide's folder.
        guide: class of the guide, a key of ``pnp_trt.models.guides.GUIDES``.
        options: for the guide's ``from_unet`` (the tiny guide's ``rank``, ``trunk_kind`` …).
        w_min, w_max: range of the guidance scale.
        w_distribution: ``uniform``, or ``log-uniform``, which samples small scales more often.
        weighting: of the squared error: ``x0`` (times min(1/SNR, 5), over w); ``guidance`` (over the guidance's mean
            strength at the timestep); ``w`` (over w); or ``none``, as in the paper.
        feature_matching: weight of the error of the last decoder block's features; above 0, the teacher is evaluated in
            every step.
        states_dir: folder of cached states; None puts them into ``out``.
        grid_steps: sampling steps of the image grid; 0 writes none.
        sharpen: folder or name of a guide to start from: it gets a new sharpener, which is all that is trained.
            ``guide`` is then ignored, and ``options`` may hold ``sharpener_width`` only.
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
        """Settings that affect the result."""
        settings = asdict(self)
        for name in ("out", "states_dir", "grid_steps", *(("sharpen",) if self.sharpen is None else ())):
            settings.pop(name)
        if self.sharpen is not None:
            settings["sharpen_sha256"] = sha256(guide_weights(guide_folder(self.sharpen)))
        return settings


def distill(config: GuidanceConfig, *, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Train a guide and write it, with its report ``distill.json``, to ``config.out``.

    Under ``accelerate launch`` the processes share states and batches; the main process writes.

    Args:
        resume: continue the run in ``config.out``.
        progress: called with (stage, done, total, note).

    Returns:
        The report.

    Raises:
        InputError: for unknown names, unreadable prompts or images, or an ``out`` that holds another run.
        PnpError: if the loss or the teacher's prediction is not finite.
    """
    config.check()
    check_writable_folder(config.out)
    if config.states_dir is not None:
        check_writable_folder(config.states_dir, "--states-dir")
    accelerator, resolved, notify = begin(config.train, progress)
    config, main = replace(config, train=resolved), accelerator.is_main_process
    started = time.monotonic()
    teacher, collection = _collection(config, accelerator.device)
    identity = collection.identity
    if main:
        claim(config.out, config.settings() | identity, resume)
    accelerator.wait_for_everyone()

    share = range(accelerator.process_index, config.states.shards, accelerator.num_processes)
    collection.make(share, lambda done, total, note: notify("states", done, total, note))
    accelerator.wait_for_everyone()
    states = collection.read()
    torch.manual_seed(config.train.seed)
    student = make_student(teacher, config)
    guide = student.guide
    rows, held_out = split(config.states)
    objective = GuidanceObjective(states, rows, teacher, config)
    board = Board(config.out / "logs", newest_step(config.out)) if main else None
    grid = ImageGrid(teacher, config.grid_steps) if main and config.grid_steps else None
    loss = LossLog(board, partial(notify, "guide"))

    def watch(step: int, weights: dict[str, Tensor]) -> None:
        assert board is not None
        with averaged(guide, weights):
            error_now = held_out_error(student, states, held_out, limit=WATCHED)
            board.error(step, error_now)
            if grid is not None:
                board.image(step, "grid", grid.draw(student))
        notify("guide", step, config.train.steps, f"held-out residual {error_now['residual']:.1%}")

    train(student, guide, objective, config.train, config.out, accelerator, loss, watch if main else None)
    report: dict[str, Any] = {}
    if main:
        assert board is not None
        guide.eval()
        error = held_out_error(student, states, held_out, lambda done, total: notify("check", done, total, ""))
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
    """Collect states of a stage 1 run in advance, in ``config.states_dir``, for example in parts on many machines.

    A shard depends on its number alone, so parts from several machines are combined by copying their files.  A run of
    ``distill`` with the same settings and ``states_dir`` uses the existing shards and makes the missing ones.

    Args:
        shards: first and last number; None for all.
        progress: called with (stage, done, total, note).

    Returns:
        (shards in the folder, total number of shards).

    Raises:
        InputError: for a range outside the collection, and as for ``distill``.
        PnpError: if the teacher's prediction is not finite.
    """
    config.check()
    if config.states_dir is None:
        raise InputError("states that are collected in advance need a folder; name one with --states-dir")
    end = config.states.shards - 1
    first, last = shards or (0, end)
    if not 0 <= first <= last <= end:
        raise InputError(f"the shards are {first} to {last}; they must be in order, from 0 to {end}")
    check_writable_folder(config.states_dir, "--states-dir")
    accelerator = make_accelerator(config.train.mixed_precision)
    _, collection = _collection(config, accelerator.device)
    notify = progress or (lambda *_: None)
    collection.make(range(first, last + 1), lambda done, total, note: notify("states", done, total, note))
    return collection.shard_count(), config.states.shards


def _collection(config: GuidanceConfig, device: Any) -> tuple[TeacherModel, Collection]:
    """The teacher and the state collection of a run."""
    captioned = find_images(config.images) if config.images is not None else None
    prompts = read_prompts(config.prompts) if config.prompts is not None else _captions(captioned)
    teacher = TeacherModel.load(config.base, prompts, device)
    identity = {"teacher": teacher.hashes, "prompts": digest(prompts)}
    if captioned is not None and config.states.kind == "forward":
        identity["pictures"] = digest(
            [[sha256(f), c] for f, c in zip(captioned.files, captioned.captions, strict=True)]
        )
    images = _latents(teacher, captioned) if config.states.kind == "forward" else None
    folder = config.states_dir or config.out / "states"
    return teacher, Collection(
        teacher.unet, teacher.scheduler, teacher.conditions, config.states, folder, identity, images
    )


def make_student(teacher: TeacherModel, config: GuidanceConfig) -> Student:
    """A student with a new guide of the configured class."""
    if config.sharpen is not None:
        width = config.options.get("sharpener_width", SHARPENER_WIDTH)
        return Student(teacher.unet, with_new_sharpener(load_guide(config.sharpen), width).to(teacher.device))
    options = dict(config.options)
    if config.states.negative > 0 and options.get("sharpener_width") is None:
        options.setdefault("negative_prompts", True)
    try:
        guide: Guide = GUIDES[config.guide].from_unet(teacher.unet, **options)
    except Exception as e:  # torch raises many types for negative, huge or non-numeric sizes
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
        """Rows and scales of a step, with the states themselves, so that a saved batch is complete for debugging."""
        config = self._config
        rng = random.Random(f"{config.train.seed}/{step}")
        chosen = [self._rows[rng.randrange(len(self._rows))] for _ in range(config.train.batch)][part::parts]
        if config.w_distribution == "uniform":
            w = [rng.uniform(config.w_min, config.w_max) for _ in range(config.train.batch)]
        else:
            w = [
                math.exp(rng.uniform(math.log(config.w_min), math.log(config.w_max))) for _ in range(config.train.batch)
            ]
        rows = torch.tensor(chosen)
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
    sampled = torch.tensor(rows[:: max(1, len(rows) // 4096)])
    strength = (states.conditional[sampled].float() - states.unconditional[sampled].float()).pow(2).flatten(1).mean(1)
    bins = torch.div(states.timestep[sampled] * 20, len(abar), rounding_mode="floor")
    mean = torch.stack([strength[bins == b].mean() if (bins == b).any() else strength.mean() for b in range(20)])
    weight = (1 / mean.clamp(min=1e-8)).repeat_interleave(-(-len(abar) // 20))[: len(abar)]
    return weight / weight.mean()


def _captions(images: CaptionedImages | None) -> list[str]:
    assert images is not None
    return list(dict.fromkeys(images.captions))


def _latents(teacher: TeacherModel, images: CaptionedImages | None) -> Latents:
    """Latents of the images and the prompt row of each caption; every caption must be one of the run's prompts."""
    assert images is not None
    vae = teacher.base.vae().float()
    side = teacher.sample_shape[1] * 2 ** (len(vae.config.block_out_channels) - 1)
    latents = image_latents(vae, images.files, side, teacher.device)
    index = {p: i for i, p in enumerate(teacher.prompts)}
    missing = [c for c in images.captions if c not in index]
    if missing:
        raise InputError(
            f"{len(missing)} captions of the images are not in the prompts file (the first: '{missing[0][:60]}'); "
            "leave --prompts out to use the captions alone"
        )
    return Latents(latents, torch.tensor([index[c] for c in images.captions]))
