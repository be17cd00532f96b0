"""``pnp-trt generate``: generate one image per row of a table; resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..io.text import printable
from .first_build import build_if_missing
from .progress import ProgressBar
from .requirements import require_packages


def generate(
    table: Annotated[
        Path,
        typer.Argument(metavar="PROMPTS", help="Rows to generate: .txt, .jsonl, .csv or .parquet.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the images.")],
    engine: Annotated[str, typer.Option(help="A bundle's name or folder.")] = "emoji-tiny",
    steps: Annotated[int | None, typer.Option(help="Sampling steps for rows that set none.")] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale w for rows that set none, 1 to 9.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Seed of the first row; each further row adds 1.")] = 0,
    method: Annotated[str | None, typer.Option(help="{methods}.")] = None,
    schedule: Annotated[str | None, typer.Option(help="{schedules} or teacher.")] = None,
    prompt_syntax: Annotated[
        str,
        typer.Option(help="Syntax for rows that set none: plain, or a1111 for weights and for long prompts in chunks."),
    ] = "plain",
    kind: Annotated[str, typer.Option("--format", help="png, webp (lossless) or jpeg.")] = "png",
    slots: Annotated[int, typer.Option(min=1, max=64, help="Maximum images per engine call.")] = 8,
    provider: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    ray: Annotated[
        bool, typer.Option("--ray", help="Use workers of Ray Data, which are replaced if they die.")
    ] = False,
    replicas: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Number of workers, only with --ray; default: one per GPU.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the summary.")] = False,
) -> None:
    """Generate one image per row of a table. Run the same command again to resume."""
    from ..io.files import check_writable_folder, make_folder
    from ..serve import offline

    if ray:
        require_packages("generate --ray")
    elif replicas:
        raise InputError("--replicas is given without --ray; add --ray")
    rows = offline.read_rows(table)
    check_writable_folder(out)
    build_if_missing(engine, quiet)
    options = {
        "steps": steps, "guidance": guidance, "method": method, "schedule": schedule, "prompt_syntax": prompt_syntax,
    }  # fmt: skip
    defaults = {name: value for name, value in options.items() if value is not None}
    with ProgressBar(f"{len(rows)} images", quiet) as bar:
        progress = bar.count if bar.watched else None
        if ray:
            from ..bundle.store import open_bundle
            from ..serve.ray.offline import WorkerTask
            from ..serve.ray.offline import generate as generate_by_ray

            folder = open_bundle(engine).folder.resolve()
            make_folder(out)
            task = WorkerTask(folder, out.resolve(), defaults, seed, kind, slots, provider)
            tally = generate_by_ray(task, rows, replicas, progress)
        else:
            from ..runtime.pipeline import Pipeline

            pipeline = Pipeline.load(engine, provider=provider)
            make_folder(out)
            plan = offline.OfflinePlan.of(pipeline, rows, out, defaults=defaults, seed=seed, kind=kind)
            tally = offline.generate(pipeline, plan, slots, progress)
    existing = f", {tally.existing} existed already" if tally.existing else ""
    print(printable(f"{tally.generated} images generated in {out}{existing}"))
