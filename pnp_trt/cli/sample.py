"""``pnp-trt sample``: read prompts from arguments or standard input, write images, their parameters and a grid."""

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
#: maximum side of an image in a grid, in pixels
_CELL = 512
#: maximum bytes of a prompt in a JPEG file, which also stores the other parameters
_JPEG_PROMPT = 60_000


def read_prompts(arguments: Sequence[str]) -> list[str]:
    """Return the prompts, with each ``-`` replaced by the non-empty lines of standard input.

    Raises:
        InputError: if standard input has no prompt or is not text.
    """
    out: list[str] = []
    for prompt in arguments:
        if prompt != "-":
            out.append(as_utf8(prompt).lstrip(BYTE_ORDER_MARK))  # "$(cat FILE)" keeps the file's byte order mark
            continue
        out += read_stdin_prompts()
    return out


@dataclass(frozen=True)
class Files:
    """The output files of a run.

    Attributes:
        out: folder for the images.
        kind: ``png``, ``webp`` or ``jpeg``.
        metadata: ``embedded``, or ``json`` to also write a JSON file beside each image.
        grid: path of a PNG with all images, or None.
    """

    out: Path
    kind: str
    metadata: str
    grid: Path | None

    def check(self) -> None:
        """Raise ``InputError`` for options that would fail only after the images have been generated."""
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
        """Raise ``InputError`` if a prompt is too long for the file format."""
        longest = max((len(json.dumps(prompt)) for prompt in prompts), default=0)
        if self.kind == "jpeg" and longest > _JPEG_PROMPT:
            raise InputError(
                f"a prompt takes {longest:,} bytes and a JPEG file holds {_JPEG_PROMPT:,}; use --format png or webp"
            )

    def write(self, images: Sequence[GeneratedImage], prompts: Sequence[str], count: int) -> list[Path]:
        """Write all files, with signals deferred; return the paths of the images and then of the grid.

        Args:
            images: ``count`` images per prompt, in the order of the prompts.

        Raises:
            PnpError: if a file cannot be written; the files before it are kept, and the message counts them.
        """
        paths: list[Path] = []
        with deferred():
            try:
                self._write(images, prompts, count, paths)
            except PnpError as e:
                raise type(e)(f"{e}; {len(paths)} of {len(images)} images were written to {self.out}") from e
        return paths

    def _write(self, images: Sequence[GeneratedImage], prompts: Sequence[str], count: int, paths: list[Path]) -> None:
        from ..runtime.images import grid, save_image, save_new, slug

        make_folder(self.out)
        sidecar = ".json" if self.metadata == "json" else None
        for image in images:
            stem = f"{slug(image.parameters['prompt'])}-{image.parameters['seed']}"
            paths.append(save_new(image.pixels, image.parameters, self.out, stem, self.kind, beside=sidecar))
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
            help="Prompts, generated as one batch; - reads one prompt per line from standard input.",
        ),
    ],
    engine: Annotated[str, typer.Option(help="A bundle's name or folder.")] = "emoji-tiny",
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps; default: the number the guide was distilled for, or 20.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale w, 1 to 9.")] = 3.0,
    negative: Annotated[
        str | None,
        typer.Option(
            help="Negative prompt; CFG, with two model evaluations per step, is used if the guide does not support one."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; each further image of a prompt adds 1.")] = 0,
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=1000, help="Images per prompt.")] = 1,
    method: Annotated[str | None, typer.Option(help="{methods}.")] = None,
    size: Annotated[
        str | None,
        typer.Option(help="HEIGHTxWIDTH in pixels, if the engine has several sizes; default: the model's own."),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="{schedules} or teacher, optionally with a spacing as in dpm++:karras, or another program's name such "
            "as 'DPM++ 2M Karras'; default: the teacher's own if it is one of these."
        ),
    ] = None,
    prompt_syntax: Annotated[
        str, typer.Option(help="plain, or a1111 for weights as in (red:1.3) and for long prompts in chunks.")
    ] = "plain",
    init: Annotated[Path | None, typer.Option(help="Starting image, if the engine has a VAE encoder.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="Denoising strength with --init: share of the steps to run; default 0.8.")
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
        str, typer.Option(help="embedded: store the parameters in the images; json: also in a file beside each image.")
    ] = "embedded",
    grid: Annotated[Path | None, typer.Option(help="Also write all images as one PNG, one row per prompt.")] = None,
    provider: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the paths.")] = False,
) -> None:
    """Generate images and store each image's parameters in it. Existing files are never overwritten."""
    from ..bundle.profiles import parse_size
    from ..runtime.pipeline import DEFAULT_STEPS, Pipeline, check_request
    from ..runtime.prompt_syntax import check_syntax
    from ..runtime.text import ImageSizes

    prompts = read_prompts(prompts)
    check_syntax(prompt_syntax)
    files = Files(out, kind, metadata, grid)
    files.check()
    files.check_prompts(prompts)
    repeated_prompts = [p for p in prompts for _ in range(count)]
    seeds = [seed + i for _ in prompts for i in range(count)]
    check_request(
        repeated_prompts, seeds, [guidance] * len(repeated_prompts), DEFAULT_STEPS if steps is None else steps
    )
    image_size = None if size is None else parse_size(size)
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
    with ProgressBar(f"{len(repeated_prompts)} images, {steps} steps, w = {guidance:g}", quiet) as bar:
        images = pipeline(
            repeated_prompts, steps=steps, guidance=guidance, seed=seeds, method=method, negative=negative,
            schedule=schedule, init=init, strength=strength, callback=bar.count if bar.watched else None,
            size=image_size, prompt_syntax=prompt_syntax, image_sizes=sizes,
        )  # fmt: skip
    for path in files.write(images, prompts, count):
        print(printable(path))
