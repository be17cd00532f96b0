"""``pnp-trt distill``: the commands that train guides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ..io.text import printable
from .registry_help import with_former_names

if TYPE_CHECKING:
    from ..distill.states import StateConfig

distill_app = typer.Typer(help="Train guides.", no_args_is_help=True)

Steps = Annotated[int, typer.Option(min=1, help="Optimiser steps.")]
Batch = Annotated[int, typer.Option(min=1, help="States per optimiser step, over all processes.")]
Accumulate = Annotated[int, typer.Option(min=1, help="Micro-batches per batch; more of them need less memory.")]
Lr = Annotated[float, typer.Option(help="Peak learning rate.")]
Schedule = Annotated[str, typer.Option(help="Learning-rate schedule: cosine or constant.")]
Warmup = Annotated[int, typer.Option(min=0, help="Steps of linear warm-up.")]
Ema = Annotated[float, typer.Option(min=0, max=1, help="Decay of the EMA weights, which become the guide.")]
Precision = Annotated[str, typer.Option(help="no, bf16, fp16, or auto to choose by the device.")]
Checkpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Recompute activations: uses less memory, but is slower.")
]
Every = Annotated[int, typer.Option(min=1, help="Optimiser steps between checkpoints.")]
Keep = Annotated[int, typer.Option(min=1, help="Number of newest checkpoints to keep.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume the run in --out.")]
GridSteps = Annotated[int, typer.Option(help="Sampling steps of the image grid; 0 writes none.")]


def _state_config(
    kind: str | None, images: Path | None, count: int, w_min: float, w_max: float, negative: float, seed: int
) -> StateConfig:
    from ..distill.states import StateConfig

    # noised images are the paper's states (Hsiao et al., CVPR 2024); docs/ablation.md compares both kinds
    kind = kind or ("trajectory" if images is None else "forward")
    steps = min(StateConfig.steps, count) if kind == "forward" else StateConfig.steps  # noised images are independent
    # a small number of states must not require a full shard of 32 trajectories
    batch = min(32, -(-count // steps))
    return StateConfig(kind, count, steps, w_min=w_min, w_max=w_max, negative=negative, batch=batch, seed=seed)


@distill_app.command("states")
def states_command(
    states_dir: Annotated[Path, typer.Option(help="Folder for the shards.")],
    shards: Annotated[
        str | None, typer.Option(help="First and last shard to make, such as 0-9; default: all missing shards.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts, as in distill guidance.")] = None,
    images: Annotated[Path | None, typer.Option(help="Images, as in distill guidance.")] = None,
    base: Annotated[str, typer.Option(help="The teacher.")] = "emoji",
    states: Annotated[str | None, typer.Option(help="forward or trajectory, as in distill guidance.")] = None,
    num_states: Annotated[int, typer.Option(min=1, help="States to collect, over all shards.")] = 19_200,
    negative: Annotated[
        float, typer.Option(help="Share of states with a negative prompt, as in distill guidance.")
    ] = 0.0,
    w_min: Annotated[float, typer.Option(help="Smallest guidance scale, as in distill guidance.")] = 1.0,
    w_max: Annotated[float, typer.Option(help="Largest guidance scale, as in distill guidance.")] = 9.0,
    seed: Seed = 0,
) -> None:
    """Make the states for stage 1 before training, for example a range of shards on each of several machines.

    Existing shards are skipped. Copy all shards into one folder and pass it to distill guidance as --states-dir, with
    the same options.
    """
    from .progress import ProgressBar
    from .requirements import require_packages

    require_packages("distill")
    from ..distill.guidance import GuidanceConfig, collect_states

    config = GuidanceConfig(
        base, prompts, states_dir, images, w_min=w_min, w_max=w_max, states_dir=states_dir,
        states=_state_config(states, images, num_states, w_min, w_max, negative, seed),
    )  # fmt: skip
    part = None if shards is None else _range(shards)
    with ProgressBar("states") as bar:
        finished, total = collect_states(config, part, progress=bar.stages)
    print(printable(f"{finished} of {total} shards are in {states_dir}"))
    if finished == total:
        print(printable(f"next: pnp-trt distill guidance --states-dir {states_dir} --out GUIDE, with the same options"))


def _range(text: str) -> tuple[int, int]:
    """Parse a range of shards, ``A-B`` or ``A``.

    Raises:
        InputError: for anything else.
    """
    match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", text)
    if match is None:
        raise InputError(f"--shards is '{text}'; give the first and the last number, such as 0-9")
    return int(match[1]), int(match[2] or match[1])


@distill_app.command("guidance", cls=with_former_names({"--pictures": "--grid-steps"}))
def guidance(
    out: Annotated[Path, typer.Option(help="Folder for the guide.")],
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt per line.")] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of images, with captions in metadata.jsonl or in a NAME.txt beside each image."),
    ] = None,
    base: Annotated[str, typer.Option(help="The teacher.")] = "emoji",
    guide: Annotated[str, typer.Option(help="Guide design: {guides}.")] = "tiny",
    states: Annotated[
        str | None,
        typer.Option(
            help="Kind of states: forward, noised images of --images, the default with --images; or trajectory, from "
            "the teacher's own guided runs, the default without."
        ),
    ] = None,
    num_states: Annotated[int, typer.Option(min=1, help="States to collect.")] = 19_200,
    states_dir: Annotated[
        Path | None, typer.Option(help="Folder where states are cached; default: OUT/states.")
    ] = None,
    negative: Annotated[
        float,
        typer.Option(help="Share of states with a negative prompt; above 0, the guide supports negative prompts."),
    ] = 0.0,
    sharpen: Annotated[
        str | None,
        typer.Option(
            help="A guide to give a sharpener for negative prompts; only the sharpener is trained. "
            "Requires --negative, preferably 1."
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Tiny guide: inner channels; default 48.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Option of the guide's design as NAME=VALUE, such as trunk_kind=attention; repeatable."),
    ] = None,
    steps: Steps = 1500,
    batch: Batch = 48,
    accumulate: Accumulate = 1,
    lr: Lr = 2e-3,
    schedule: Schedule = "cosine",
    warmup: Warmup = 100,
    ema: Ema = 0.995,
    mixed_precision: Precision = "no",
    gradient_checkpointing: Checkpointing = False,
    w_min: Annotated[float, typer.Option(help="Smallest guidance scale to learn.")] = 1.0,
    w_max: Annotated[float, typer.Option(help="Largest guidance scale to learn.")] = 9.0,
    w_distribution: Annotated[str, typer.Option(help="Distribution of w: uniform or log-uniform.")] = "uniform",
    weighting: Annotated[str, typer.Option(help="Weighting of the error: x0, guidance, w or none.")] = "x0",
    feature_matching: Annotated[
        float, typer.Option(help="Weight of the feature error; above 0, the teacher runs too.")
    ] = 0.0,
    checkpoint_every: Every = 250,
    keep: Keep = 2,
    grid_steps: GridSteps = 20,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Stage 1: train a guide to replace the two U-Net evaluations of classifier-free guidance by one.

    On several processes or machines: accelerate launch -m pnp_trt distill guidance ...
    """
    from .progress import ProgressBar
    from .requirements import require_packages

    require_packages("distill")
    from ..distill.guidance import GuidanceConfig, distill
    from ..distill.train import TrainConfig

    config = GuidanceConfig(
        base, prompts, out, images, guide, _options(option, rank), w_min, w_max, w_distribution, weighting,
        feature_matching, states_dir, grid_steps,
        _state_config(states, images, num_states, w_min, w_max, negative, seed),
        TrainConfig(
            steps, batch, accumulate, lr, schedule, warmup, ema=ema, mixed_precision=mixed_precision,
            gradient_checkpointing=gradient_checkpointing, checkpoint_every=checkpoint_every, keep=keep, seed=seed,
        ),
        sharpen,
    )  # fmt: skip
    with ProgressBar("distill") as bar:
        report = distill(config, resume=resume, progress=bar.stages)
    if not report:  # of several processes, only the first reports
        return
    _print_size(out, report)
    print(f"relative error on held-out states: {report['held_out']['residual']:.1%}")
    if grid_steps:
        print(printable(f"images of student and teacher: {out / 'grid.png'}"))
    print(printable(f"next: pnp-trt build --base {base} --guide {out}"))


@distill_app.command("steps", cls=with_former_names({"--pictures": "--grid", "--no-pictures": "--no-grid"}))
def steps_command(
    guide: Annotated[str, typer.Option(help="A stage 1 guide: a folder, or the name of a bundled guide.")],
    out: Annotated[Path, typer.Option(help="Folder; the guide of each halving is written to OUT/steps-N.")],
    to: Annotated[int, typer.Option(help="Sampling steps of the last guide, such as 16, 8 or 4.")] = 8,
    start: Annotated[int, typer.Option("--from", help="Sampling steps of the first teacher.")] = 32,
    base: Annotated[str | None, typer.Option(help="The teacher; default: the guide's own.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt per line; default: the guide's own.")
    ] = None,
    trajectories: Annotated[int, typer.Option(min=1, help="Sampling runs to train on, per halving.")] = 640,
    weighting: Annotated[str, typer.Option(help="Weighting of the error: landing or none.")] = "landing",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps per halving.")] = 600,
    batch: Batch = 32,
    accumulate: Accumulate = 1,
    lr: Lr = 5e-4,
    schedule: Schedule = "cosine",
    warmup: Warmup = 50,
    ema: Ema = 0.99,
    mixed_precision: Precision = "no",
    gradient_checkpointing: Checkpointing = False,
    w_min: Annotated[float, typer.Option(help="Smallest guidance scale to learn.")] = 1.0,
    w_max: Annotated[float, typer.Option(help="Largest guidance scale to learn.")] = 9.0,
    checkpoint_every: Every = 200,
    keep: Keep = 2,
    grid: Annotated[bool, typer.Option(help="Write an image grid after each halving.")] = True,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Stage 2: repeatedly halve a guide's sampling steps, training it to match its own results with twice as many."""
    from .progress import ProgressBar
    from .requirements import require_packages

    require_packages("distill")
    from ..distill.steps import StepsConfig, distill
    from ..distill.train import TrainConfig

    config = StepsConfig(
        guide, out, to, start, base, prompts, w_min, w_max, trajectories, weighting, grid=grid,
        train=TrainConfig(
            steps, batch, accumulate, lr, schedule, warmup, ema=ema, mixed_precision=mixed_precision,
            gradient_checkpointing=gradient_checkpointing, checkpoint_every=checkpoint_every, keep=keep, seed=seed,
        ),
    )  # fmt: skip
    with ProgressBar("distill") as bar:
        reports = distill(config, resume=resume, progress=bar.stages)
    for report in reports:
        errors = report["held_out"]
        print(
            f"{out / ('steps-' + str(report['to']))}: {report['from']} to {report['to']} steps in "
            f"{report['seconds']:.0f} s; {errors['residual']:.1%} of the initial error remains"
        )
    print(printable(f"next: pnp-trt build --base {reports[-1]['settings']['base']} --guide {out / f'steps-{to}'}"))


@distill_app.command("gain")
def gain_command(
    guide: Annotated[str, typer.Option(help="A stage 1 guide: a folder, or the name of a bundled guide.")],
    out: Annotated[Path, typer.Option(help="Folder for the new guide; the original guide is not changed.")],
    values: Annotated[
        int, typer.Option(min=1, help="Number of values in the table over the timesteps; 1 fits a constant factor.")
    ] = 9,
    factor: Annotated[float | None, typer.Option(help="Constant factor to use instead of fitting one.")] = None,
    base: Annotated[str | None, typer.Option(help="The teacher; default: the guide's own.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt per line; default: the guide's own.")
    ] = None,
    num_states: Annotated[int, typer.Option(min=1, help="Number of states on which lengths are compared.")] = 640,
    seed: Annotated[
        int, typer.Option(help="Random seed of the states; use another than the guide's, so that they are held out.")
    ] = 1,
    resume: Resume = False,
) -> None:
    """Scale a guide's residuals over the timesteps to make its guidance as strong as the teacher's; no training."""
    from .progress import ProgressBar
    from .requirements import require_packages

    require_packages("distill")
    from ..distill.gain import GainConfig, fit

    config = GainConfig(guide, out, values, factor, base, prompts, num_states, seed)
    with ProgressBar("distill") as bar:
        report = fit(config, resume=resume, progress=bar.stages)
    length = report["length"]
    print("timestep   length before   after (relative to the teacher's)")
    for t, before, after in zip(length["timestep"], length["before"], length["after"], strict=True):
        print(f"{t:8.0f}   {before:13.2f}   {after:5.2f}")
    print(f"gain: {', '.join(f'{g:.3g}' for g in report['gain'])}")
    print(printable(f"next: pnp-trt build --base {report['settings']['base']} --guide {out}"))


def _options(words: list[str] | None, rank: int | None) -> dict[str, Any]:
    """Parse the guide's options from NAME=VALUE words; a value that is not JSON is taken as text."""
    import json

    options: dict[str, Any] = {} if rank is None else {"rank": rank}
    for word in words or []:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise InputError(f"--option takes NAME=VALUE, got '{word}'")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    return options


def _print_size(out: Path, report: dict[str, Any]) -> None:
    parameters = report["parameters"]
    share = parameters["guide"] / parameters["unet"]
    print(f"{out}: {parameters['guide']:,} parameters, {share:.1%} of the U-Net's, in {report['seconds']:.0f} s")
