"""``pnp-trt generate``: one image for each row of a table, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..io.text import printable
from .first_build import build_if_missing
from .progress import ProgressBar


def generate(
    table: Annotated[
        Path,
        typer.Argument(metavar="PROMPTS", help="Rows to generate: .txt, .jsonl, .csv or .parquet.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the images.")],
    engine: Annotated[str, typer.Option(help="A bundle's name or folder.")] = "emoji-tiny",
    steps: Annotated[int | None, typer.Option(help="Sampling steps of rows that name none.")] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale w of rows that name none, 1 to 9.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Seed of the first row; each next row adds 1.")] = 0,
    method: Annotated[str | None, typer.Option(help="{methods}.")] = None,
    schedule: Annotated[str | None, typer.Option(help="{schedules} or teacher.")] = None,
    kind: Annotated[str, typer.Option("--format", help="png, webp (lossless) or jpeg.")] = "png",
    slots: Annotated[int, typer.Option(min=1, max=64, help="Images that share an engine call, at most.")] = 8,
    provider: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the sum.")] = False,
) -> None:
    """Generate one image per row; run it again to resume."""
    from ..io.files import check_writable_folder, make_folder
    from ..runtime.pipeline import Pipeline
    from ..serve import offline

    rows = offline.read_rows(table)
    check_writable_folder(out)
    build_if_missing(engine, quiet)
    pipeline = Pipeline.load(engine, provider=provider)
    make_folder(out)
    named = {"steps": steps, "guidance": guidance, "method": method, "schedule": schedule}
    defaults = {name: value for name, value in named.items() if value is not None}
    with ProgressBar(f"{len(rows)} images", None, quiet) as bar:
        tally = offline.generate(
            pipeline, rows, out, defaults=defaults, seed=seed, kind=kind, slots=slots,
            progress=bar.count if bar.watched else None,
        )  # fmt: skip
    kept = f", {tally.kept} were there" if tally.kept else ""
    print(printable(f"{tally.made} images generated in {out}{kept}"))
