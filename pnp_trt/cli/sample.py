"""``pnp-trt sample``: prompts from arguments or standard input; images, their parameters and a grid."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError, PnpError
from ..io.files import make_folder
from ..io.inputs import BYTE_ORDER_MARK, as_utf8, read_stdin_prompts
from ..io.process import deferred
from ..io.text import printable
from .first_build import build_if_missing
from .progress import ProgressBar

if TYPE_CHECKING:
    from ..runtime.pipeline import GeneratedImage

METADATA = ("embedded", "json")
#: an image's side in a grid, in pixels, at most
_CELL = 512
#: bytes of a prompt that a JPEG file has room for, beside the other parameters
_JPEG_PROMPT = 60_000


def read_prompts(given: Sequence[str]) -> list[str]:
    """The prompts, each ``-`` replaced by the lines of standard input; empty lines are skipped.

    Raises:
        InputError: if standard input has no line or is not text.
    """
    out: list[str] = []
    for prompt in given:
        if prompt != "-":
            out.append(as_utf8(prompt).lstrip(BYTE_ORDER_MARK))  # of a file read by the shell, as in "$(cat FILE)"
            continue
        out += read_stdin_prompts()
    return out


@dataclass(frozen=True)
class Files:
    """Where images go, and what goes with them.

    Attributes:
        out: the folder.
        kind: ``png``, ``webp`` or ``jpeg``.
        metadata: ``embedded``, or ``json`` for a file beside each image too.
        grid: a PNG with all images, or None.
    """

    out: Path
    kind: str
    metadata: str
    grid: Path | None

    def check(self) -> None:
        """Raise ``InputError`` for what would fail once the images are generated."""
        from ..io.files import check_writable_file, check_writable_folder
        from ..runtime.images import FORMATS

        if self.kind not in FORMATS:
            raise InputError(f"--format is '{self.kind}'; known: {', '.join(FORMATS)}")
        if self.metadata not in METADATA:
            raise InputError(f"--metadata is '{self.metadata}'; known: {', '.join(METADATA)}")
        check_writable_folder(self.out)
        if self.grid is not None:
            if os.path.lexists(self.grid) and not self.grid.is_dir():
                raise InputError(f"--grid {self.grid} exists and is not overwritten; name another file")
            check_writable_file(self.grid, "--grid")

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ``InputError`` for prompts that are too long for the format of the files."""
        longest = max((len(json.dumps(prompt)) for prompt in prompts), default=0)
        if self.kind == "jpeg" and longest > _JPEG_PROMPT:
            raise InputError(
                f"a prompt takes {longest:,} bytes and a JPEG file holds {_JPEG_PROMPT:,}; use --format png or webp"
            )

    def write(self, images: Sequence[GeneratedImage], prompts: Sequence[str], count: int) -> list[Path]:
        """Write everything, signals are deferred; returns the paths of the images and, last, of the grid.

        Args:
            images: ``count`` of each prompt, in the prompts' order.

        Raises:
            PnpError: if a file cannot be written; those before it are there, and are named.
        """
        paths: list[Path] = []
        with deferred():
            try:
                self._write(images, prompts, count, paths)
            except PnpError as e:
                raise type(e)(f"{e}; {len(paths)} of {len(images)} images are written to {self.out}") from e
        return paths

    def _write(self, images: Sequence[GeneratedImage], prompts: Sequence[str], count: int, paths: list[Path]) -> None:
        from ..runtime.images import grid, save_image, save_new, slug

        make_folder(self.out)
        beside = ".json" if self.metadata == "json" else None
        for image in images:
            stem = f"{slug(image.parameters['prompt'])}-{image.parameters['seed']}"
            paths.append(save_new(image.pixels, image.parameters, self.out, stem, self.kind, beside=beside))
        if self.grid is not None:
            rows = [
                (prompt, [p.pixels for p in images[i * count : (i + 1) * count]]) for i, prompt in enumerate(prompts)
            ]
            seeds = [f"seed {p.parameters['seed']}" for p in images[:count]]
            make_folder(self.grid.parent)
            cell = min(max(images[0].pixels.shape[:2]), _CELL)
            save_image(grid(rows, seeds, cell=max(cell, 64)), {"images": [p.parameters for p in images]}, self.grid)
            paths.append(self.grid)


def sample(
    prompts: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPT...",
            help="Prompts; several are generated as one batch; - reads one per line from standard input.",
        ),
    ],
    engine: Annotated[str, typer.Option(help="A bundle's name or folder.")] = "emoji-tiny",
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps; default: the number that the guide was distilled for, or 20.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale w, 1 to 9.")] = 3.0,
    negative: Annotated[
        str | None,
        typer.Option(help="Negative prompt; if the guide takes none, CFG is used: two model evaluations per step."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; each next image adds 1.")] = 0,
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=1000, help="Images per prompt.")] = 1,
    method: Annotated[str | None, typer.Option(help="{methods}.")] = None,
    size: Annotated[
        str | None,
        typer.Option(help="HEIGHTxWIDTH in pixels, if the engine has several sizes; default: the model's own."),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="{schedules} or teacher, also with a spacing as in dpm++:karras, or a name of other programs such as "
            "'DPM++ 2M Karras'; default: the teacher's own if it is one of these."
        ),
    ] = None,
    prompt_syntax: Annotated[
        str, typer.Option(help="plain, or a1111 for weights as in (red:1.3), and chunks of long prompts.")
    ] = "plain",
    init: Annotated[Path | None, typer.Option(help="Starting image, if the engine has a VAE encoder.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="Denoising strength with --init: the share of the steps to run; default 0.8.")
    ] = None,
    original_size: Annotated[
        str | None,
        typer.Option(help="SDXL: HEIGHTxWIDTH of the image before cropping, in pixels; default: the image's size."),
    ] = None,
    crop: Annotated[str | None, typer.Option(help="SDXL: TOPxLEFT of the crop in pixels; default: 0x0.")] = None,
    target_size: Annotated[
        str | None, typer.Option(help="SDXL: HEIGHTxWIDTH after cropping, in pixels; default: the image's size.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("samples"),
    kind: Annotated[str, typer.Option("--format", help="png, webp (lossless) or jpeg.")] = "png",
    metadata: Annotated[
        str, typer.Option(help="embedded: parameters inside the images; json: also in a file beside each.")
    ] = "embedded",
    grid: Annotated[Path | None, typer.Option(help="Also write all images as one PNG, one row per prompt.")] = None,
    provider: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the paths.")] = False,
) -> None:
    """Generate images; each stores its parameters. No file is overwritten."""
    from ..bundle.profiles import parse_size
    from ..runtime.pipeline import DEFAULT_STEPS, Pipeline, check_request
    from ..runtime.prompt_syntax import check_syntax
    from ..runtime.text import ImageSizes

    prompts = read_prompts(prompts)
    check_syntax(prompt_syntax)
    files = Files(out, kind, metadata, grid)
    files.check()
    files.check_prompts(prompts)
    asked = [p for p in prompts for _ in range(count)]
    seeds = [seed + i for _ in prompts for i in range(count)]
    check_request(asked, seeds, [guidance] * len(asked), DEFAULT_STEPS if steps is None else steps)
    wanted = None if size is None else parse_size(size)
    sizes = ImageSizes.parse(original_size, crop, target_size)
    build_if_missing(engine, quiet)
    pipeline = Pipeline.load(engine, provider=provider)
    if method is None:
        method = pipeline.default_method(negative)
        if not quiet and method not in pipeline.methods:
            print(
                f"the guide of engine '{printable(engine)}' takes no negative prompt; using CFG, two model evaluations "
                "per step",
                file=sys.stderr,
            )
    steps = pipeline.default_steps(method) if steps is None else steps
    with ProgressBar(f"{len(asked)} images, {steps} steps, w = {guidance:g}", quiet) as bar:
        images = pipeline(
            asked, steps=steps, guidance=guidance, seed=seeds, method=method, negative=negative, schedule=schedule,
            init=init, strength=strength, callback=bar.count if bar.watched else None, size=wanted,
            prompt_syntax=prompt_syntax, image_sizes=sizes,
        )  # fmt: skip
    for path in files.write(images, prompts, count):
        print(printable(path))
