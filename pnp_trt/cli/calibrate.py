"""``pnp-trt calibrate``: record the ranges and choose the layers that ``build --precision int8`` needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..io.text import printable


def calibrate(
    base: Annotated[str, typer.Option(help="Base model, as in pnp-trt build.")] = "emoji",
    guide: Annotated[
        str, typer.Option(help="Guide, as in pnp-trt build; 'none' records classifier-free guidance.")
    ] = "auto",
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt per line.")] = Path(
        "calibration/emoji-prompts.txt"
    ),
    out: Annotated[
        Path | None, typer.Option(help="Record to write; default: calibration/BASE-GUIDE.int8.json.")
    ] = None,
    images: Annotated[int, typer.Option(help="Images to generate while recording ranges.")] = 64,
    batch: Annotated[int, typer.Option(help="Batch size.")] = 8,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps; default: the number the guide was distilled for, or 20.")
    ] = None,
    w_min: Annotated[float, typer.Option(help="Smallest guidance scale.")] = 1.0,
    w_max: Annotated[float, typer.Option(help="Largest guidance scale.")] = 9.0,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of layers that may use INT8, such as 'unet.mid_block.*'; repeatable."),
    ] = None,
    probes: Annotated[
        int,
        typer.Option(
            help="Sampling steps of the 4 images on which the sweep measures; 0 skips the sweep and keeps shortcuts "
            "in FP16."
        ),
    ] = 10,
    limit: Annotated[
        float, typer.Option(help="Relative error of the prediction that decides how many layers stay in FP16.")
    ] = 0.02,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace an existing record; repeating a run with another --limit takes seconds."),
    ] = False,
) -> None:
    """Record the range of every layer's input while sampling, and choose the layers that use INT8."""
    from .console import stdout_console
    from .progress import ProgressBar
    from .requirements import require_packages

    require_packages("calibrate")
    from ..precision.int8.calibrate import CalibrationConfig
    from ..precision.int8.calibrate import calibrate as run
    from ..precision.int8.show import render

    config = CalibrationConfig(
        base, guide, prompts, out, images, batch, steps, w_min, w_max, tuple(layer) if layer else None, probes,
        limit, seed,
    )  # fmt: skip
    with ProgressBar("calibrate") as bar:
        path, record = run(config, force=force, progress=bar.stages)
    stdout_console().print(render(record))
    print(printable(f"record: {path}"))
    command = ["pnp-trt build", f"--base {base}", f"--guide {guide}", "--precision int8"]
    command += [f"--calibration {path}"] if out is not None else []
    print(printable(f"next: {' '.join(command)}"))
