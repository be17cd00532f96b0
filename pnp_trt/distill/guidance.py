"""Stage 1: teach a guide to predict in one pass what classifier-free guidance predicts in two."""

from __future__ import annotations

import contextlib
import datetime
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import __version__
from ..artifacts import digest, write_json
from ..errors import InputError
from ..models.base import resolve
from ..models.guide import GUIDES
from ..models.student import Student
from .states import StateConfig, States, collect, encode_prompts, read_prompts
from .train import TrainConfig, train

HELD_OUT = 0.05
W_BINS = (1.5, 2.0, 3.0, 5.0, 8.0)
T_BINS = (0, 200, 400, 600, 800, 1000)


@dataclass(frozen=True)
class GuidanceConfig:
    """A stage 1 run.

    Attributes:
        base: the teacher's name.
        guide: which guide to make, a key of ``pnp_trt.models.guide.GUIDES``.
        prompts: text file, one prompt a line.
        out: the guide's folder.
        rank, embed_dim: size of the tiny guide.
        w_min, w_max: range of the guidance scale.
        mixed_precision: ``no``, or ``bf16`` for autocast in the student's forward.
    """

    base: str
    prompts: Path
    out: Path
    guide: str = "tiny"
    rank: int = 48
    embed_dim: int = 64
    w_min: float = 1.0
    w_max: float = 9.0
    mixed_precision: str = "no"
    states: StateConfig = field(default_factory=StateConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def distill(
    config: GuidanceConfig,
    *,
    resume: bool = False,
    progress: Callable[[str, int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Make a guide and write it, with its report ``distill.json``, to ``config.out``.

    Args:
        resume: continue the run that ``config.out`` holds.
        progress: called with (stage, done, in all, note).

    Returns:
        The report.

    Raises:
        InputError: for unknown names, unreadable prompts, or an ``out`` that holds another run.
        PnpError: if the loss or the teacher is not finite.
    """
    say = progress or (lambda stage, done, total, note: None)
    if config.guide not in GUIDES:
        raise InputError(f"guide is '{config.guide}'; known: {', '.join(GUIDES)}")
    if config.mixed_precision not in ("no", "bf16"):
        raise InputError(f"mixed precision is '{config.mixed_precision}'; known: no, bf16")
    if not 1.0 <= config.w_min < config.w_max:
        raise InputError(
            f"the range of w is {config.w_min:g} to {config.w_max:g}; it must start at 1 or above and not be empty"
        )
    base = resolve(config.base)
    prompts = read_prompts(config.prompts)
    settings = json.loads(json.dumps(asdict(config), default=str))
    settings.pop("out")
    teacher = {part: base.fingerprint()[part] for part in ("unet", "text_encoder")}
    identity = {"teacher": teacher, "prompts": digest(prompts)}
    _claim(config.out, settings | identity, resume)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.monotonic()
    unet = base.unet().to(device)
    text_encoder = base.text_encoder().to(device)
    context = encode_prompts(base, text_encoder, prompts, device)
    empty = encode_prompts(base, text_encoder, [""], device)
    states = collect(
        unet, base.scheduler_config(), context, empty, config.states, config.out / "states", identity,
        lambda done, total: say("states", done, total, ""),
    )  # fmt: skip
    torch.manual_seed(config.train.seed)
    guide = GUIDES[config.guide].from_unet(unet, rank=config.rank, embed_dim=config.embed_dim).to(device)
    student = Student(unet, guide)
    split = _split(len(states), config.states)
    loss = guidance_loss(student, states, split[0], config)
    smooth: list[float] = []

    def report_step(step: int, steps: int, value: float) -> None:
        smooth.append(value if not smooth else 0.98 * smooth[-1] + 0.02 * value)
        say("guide", step, steps, f"loss {smooth[-1]:.4f}")

    train(guide, loss, config.train, config.out, report_step)
    error = held_out_error(student, states, split[1], lambda done, total: say("check", done, total, ""))
    guide.to("cpu").save_pretrained(config.out, safe_serialization=True)
    report = {
        "schema": "pnp-trt/distill/1",
        "stage": "guidance",
        "settings": settings,
        "identity": identity,
        "parameters": {
            "guide": sum(p.numel() for p in guide.parameters()),
            "unet": sum(p.numel() for p in unet.parameters()),
        },
        "states": len(states),
        "held_out": error,
        "seconds": round(time.monotonic() - started, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": {p: version(p) for p in ("torch", "diffusers")} | {"pnp-trt": __version__},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_json(config.out / "distill.json", report)
    return report


def guidance_loss(student: Student, states: States, rows: list[int], config: GuidanceConfig) -> Callable[[int], Tensor]:
    """Loss of a step: ‖student(x_t, t, c, w) − eps_w‖² / w, with t and w per sample.

    Dividing by w keeps large scales, whose targets are farther from the plain prediction, from drowning
    the small ones that people use.
    """
    device = next(student.guide.parameters()).device

    def loss_of(step: int) -> Tensor:
        rng = random.Random(f"{config.train.seed}/{step}")
        pick = torch.tensor([rows[rng.randrange(len(rows))] for _ in range(config.train.batch)])
        w = torch.tensor([rng.uniform(config.w_min, config.w_max) for _ in range(len(pick))], device=device)
        # the fused CPU attention's backward pass is several times slower than the plain one at these sizes
        attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
        with attention, torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            prediction, target, _ = _predict(student, states, pick, w)
        return ((prediction.float() - target) ** 2 / w[:, None, None, None]).mean()

    return loss_of


def _predict(student: Student, states: States, pick: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    device = w.device
    conditional = states.conditional[pick].float().to(device)
    unconditional = states.unconditional[pick].float().to(device)
    target = unconditional + w[:, None, None, None] * (conditional - unconditional)
    context = states.context[states.prompt[pick]].to(device)
    prediction = student(states.sample[pick].float().to(device), states.timestep[pick].to(device), context, w)
    return prediction, target, conditional


@torch.no_grad()
def held_out_error(
    student: Student,
    states: States,
    rows: list[int],
    progress: Callable[[int, int], None] | None = None,
    limit: int = 1024,
) -> dict[str, Any]:
    """How much of the guidance is left unexplained on held-out trajectories, by (t, w).

    ``residual`` is ‖student − eps_w‖² / ‖eps_c − eps_w‖²: 1 for no guide at all, 0 for a perfect one.
    """
    device = next(student.guide.parameters()).device
    sums: dict[tuple[int, float], list[float]] = {}
    rows = rows[:: max(1, len(rows) // limit)]
    for start in range(0, len(rows), 64):
        pick = torch.tensor(rows[start : start + 64])
        for w_value in W_BINS:
            w = torch.full((len(pick),), w_value, device=device)
            prediction, target, conditional = _predict(student, states, pick, w)
            wrong = (prediction - target).pow(2).flatten(1).sum(1).tolist()
            plain = (conditional - target).pow(2).flatten(1).sum(1).tolist()
            for t, a, b in zip(states.timestep[pick].tolist(), wrong, plain, strict=True):
                low = max(x for x in T_BINS if x <= t)
                cell = sums.setdefault((low, w_value), [0.0, 0.0])
                cell[0] += a
                cell[1] += b
        if progress is not None:
            progress(min(start + 64, len(rows)), len(rows))
    bins = [{"t_from": t, "w": w, "residual": a / b if b else None} for (t, w), (a, b) in sorted(sums.items())]
    total = [sum(c[i] for c in sums.values()) for i in (0, 1)]
    return {"states": len(rows), "residual": total[0] / total[1] if total[1] else None, "bins": bins}


def _split(count: int, config: StateConfig) -> tuple[list[int], list[int]]:
    # whole shards are held out: states of one trajectory resemble each other
    per_shard = config.batch * config.steps
    shards = -(-count // per_shard)
    held = max(1, round(shards * HELD_OUT)) if shards > 1 else 0
    edge = count - held * per_shard if held else count
    return list(range(edge)), list(range(edge, count)) if held else list(range(count))


def _claim(out: Path, settings: dict[str, Any], resume: bool) -> None:
    """Refuse a folder that holds something else; remember what this run is."""
    record = out / "run.json"
    key = digest(settings)
    if out.exists() and any(out.iterdir()):
        if not record.is_file():
            raise InputError(f"{out} is not empty and holds no run of this kind; choose another --out")
        if json.loads(record.read_text()).get("key") != key:
            raise InputError(f"{out} holds a run with other settings; choose another --out")
        if not resume:
            raise InputError(f"{out} holds this run already; continue it with --resume, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(record, {"key": key, "settings": settings})
