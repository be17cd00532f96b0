"""``pnp-trt visualize``: plot a guide's residuals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..io.text import printable


def visualize(
    prompts: Annotated[
        list[str],
        typer.Argument(metavar="PROMPT...", help="Prompts; the maps show the first, the strengths are means over all."),
    ],
    guide: Annotated[str, typer.Option(help="A guide's folder, or the name of a bundled guide.")] = "emoji-tiny",
    guidance: Annotated[str, typer.Option(help="Guidance scales w, 1 to 9, separated by commas.")] = "2,4,6,8",
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    base: Annotated[str, typer.Option(help="The teacher, or a fine-tune of it.")] = "emoji",
    seed: Annotated[int, typer.Option(help="Seed of the initial noise, which all runs share.")] = 0,
    show: Annotated[int, typer.Option(help="Number of steps to show in the figure of feature maps.")] = 5,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers to show in the figure, separated by commas: skip-0, skip-1 ..., mid, their indices, or all; "
            "default: the shallowest skip, the deepest skip and mid."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for two PNGs and a JSON file.")] = Path("visualize"),
) -> None:
    """Plot the residuals that a guide adds to the U-Net: feature maps over steps and w, and their strength."""
    from .progress import ProgressBar
    from .requirements import require_packages

    require_packages("visualize")
    from ..visualize.run import VisualizeRequest
    from ..visualize.run import visualize as run
    from .sample import read_prompts

    request = VisualizeRequest(
        guide,
        tuple(read_prompts(prompts)),
        _numbers(guidance),
        steps,
        base,
        seed,
        show,
        tuple(_words(layers or "")),
        out,
    )
    with ProgressBar("visualize") as bar:
        figures = run(request, command=sys.argv[1:], progress=bar.note)
    for path in figures.files:
        print(printable(path))
    print(printable(figures.text, keep="\n"))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in _words(text))
    except ValueError:
        raise InputError(f"--guidance takes numbers separated by commas, such as 2,4,6,8; got '{text}'") from None
