"""``pnp-trt bench``: turn options into a plan, and results into tables, a JSON file, a page and an image."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from ..io.files import remove_temporaries_of
from ..io.text import printable


def bench(
    engine: Annotated[
        list[str] | None,
        typer.Option(help="A bundle to compare; repeatable; default: the base's teacher and guided bundles."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model; default emoji. With --only cost, also random:sd15, random:sd21, random:sdxl."),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Part to run: cost, latency, fidelity or serving; default: the first three.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Reduced settings; finishes in under two minutes.")] = False,
    suite: Annotated[str | None, typer.Option(help="A suite's name or .toml file; other options override it.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch size to time; repeatable; default 1, 4 and 8.")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Sampling steps; repeatable; default 8 and 20.")] = None,
    timed_steps: Annotated[
        list[int] | None, typer.Option(help="Sampling steps for the timed loop only; repeatable; default: --steps.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Interleaved rounds, default 12; more rounds narrow the intervals.")
    ] = None,
    guidance: Annotated[
        list[float] | None, typer.Option(help="Guidance scale w; repeatable; default 3, 2 and 5; the first is timed.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Images per fidelity cell; default 256, or 32 if only similarity is measured.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file with the prompts, one per line.")] = None,
    real: Annotated[Path | None, typer.Option(help="Folder of real images to compare with.")] = None,
    inception: Annotated[
        Path | None, typer.Option(help="Inception weights (.safetensors), to report FID instead of EfficientNet-KID.")
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(help="A transformers CLIP folder, to report the CLIP score as alignment.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels; not with the cost part.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="{schedules} or teacher; default: the engines' common schedule, or ddim.")
    ] = None,
    peers: Annotated[
        bool | None, typer.Option("--peers/--no-peers", help="Also time other toolkits that are installed.")
    ] = None,
    memory: Annotated[
        bool | None,
        typer.Option("--memory/--no-memory", help="Measure peak memory, in a separate process for each row."),
    ] = None,
    cold_starts: Annotated[int | None, typer.Option(help="Cold starts per engine; default 5; 0 for none.")] = None,
    requests: Annotated[int | None, typer.Option(help="Requests per queue of the serving part; default 1000.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a self-contained page here.")] = None,
    grid_file: Annotated[
        Path | None, typer.Option("--grid", help="Write the image grid (teacher above, guided below) here.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Results file of an earlier run; report what changed significantly.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for finished parts of the run; default: JSON.partial.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted run.")] = False,
    provider: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
) -> None:
    """Compare the cost, latency and fidelity of guided sampling with the teacher's classifier-free guidance.

    An interrupted run keeps its finished parts beside the --json file; resume it with the same command and --resume.
    """
    from ..bench import plan as plans
    from ..bench import results, run, suites
    from ..bench.compare import compare as comparison
    from ..bench.report import page as report
    from ..bench.work import Work
    from ..bundle.profiles import parse_size
    from .console import stdout_console
    from .first_build import build_if_missing
    from .progress import ProgressBar
    from .requirements import require_packages

    if html_file is not None:
        require_packages("bench --html")
    options = {
        "engines": tuple(engine or ()), "base": base, "only": only, "batches": tuple(batch or ()),
        "steps": tuple(steps or ()), "timed_steps": tuple(timed_steps or ()), "rounds": rounds,
        "guidance": tuple(guidance or ()), "images": images, "prompts": _text(prompts), "real": _text(real),
        "inception": _text(inception), "clip": _text(clip), "size": None if size is None else parse_size(size),
        "schedule": schedule, "provider": provider, "peers": peers,
        "memory": memory, "cold_starts": cold_starts, "requests": requests,
    }  # fmt: skip
    plan = suites.make_plan(suite, quick, options)
    plans.check(plan)
    if grid_file is not None and "fidelity" not in plan.parts:
        raise InputError("--grid needs the fidelity part and both a teacher's and a guided engine")
    _check_outputs(json_file, html_file, grid_file, work)
    old = None if compare is None else results.read(compare)  # a bad file is refused before the measurement
    for name in plans.engines_of(plan):
        build_if_missing(name, quiet=False)
    if old is not None:
        comparison.check_base(old, {"settings": {"base": run.base_of(plan)}})
    if work is None and json_file is not None and plan.only != "cost":
        work = json_file.with_name(json_file.name + ".partial")
    with Work(work, run.identity(plan), resume) as parts:
        if resume:  # the interrupted run may have been killed while it wrote its results
            for output in filter(None, (json_file, html_file, grid_file)):
                remove_temporaries_of(output)
        try:
            with ProgressBar("bench") as bar:
                document = run.run(
                    plan, command=sys.argv[1:], suite=None if suite is None else Path(suite).stem, progress=bar.note,
                    notify=lambda sentence: print(printable(f"bench: {sentence}"), file=sys.stderr), work=parts,
                )  # fmt: skip
        except KeyboardInterrupt:
            if parts.persistent:
                print(
                    f"pnp-trt: finished parts are kept in {parts.folder}; resume with the same command and --resume",
                    file=sys.stderr,
                )
            raise
        _write(document, json_file, html_file, grid_file)
        parts.done()
    stdout_console().print(report.render_terminal(document))
    if old is not None:
        stdout_console().print(comparison.render_terminal(comparison.compare(old, document)))
    for name, path in (("images: ", grid_file), ("results:", json_file), ("page:   ", html_file)):
        if path is not None:
            print(printable(f"{name} {path}"))


def _write(
    document: dict[str, Any], json_file: Path | None, html_file: Path | None, grid_file: Path | None
) -> None:  # fmt: skip
    from ..bench import results
    from ..bench.report import page
    from ..bench.report.image_grid import headline, write_grid

    if json_file is not None:  # first, before anything else can fail
        results.write(document, json_file)
    images_shown = document.get("images")
    if grid_file is not None:
        if images_shown is None or len({row["method"] for row in images_shown["rows"]}) < 2:
            raise InputError("--grid needs the fidelity part and both a teacher's and a guided engine")
        write_grid(headline(images_shown), grid_file)
    if html_file is not None:
        page.render_html(document, html_file)


def _check_outputs(json_file: Path | None, html_file: Path | None, grid_file: Path | None, work: Path | None) -> None:
    """Refuse outputs that are not writable, or are files of other programs, before the measurement starts."""
    from ..bench.report.image_grid import GRID_MARK
    from ..bench.report.page import PAGE_MARK
    from ..bench.results import SCHEMA
    from ..io.files import check_writable_file, check_writable_folder
    from ..io.replacing import check_removable_file, check_removable_output

    files = {"--json": json_file, "--html": html_file, "--grid": grid_file}
    places: dict[Path, str] = {}
    for option, path in files.items():
        if path is None:
            continue
        check_writable_file(path, option)
        if (first := places.setdefault(path.resolve(), option)) != option and not path.is_char_device():
            raise InputError(f"{first} and {option} are the same file {path}; name two files")
    if json_file is not None:
        check_removable_file(json_file, SCHEMA.rpartition("/")[0] + "/", "--json", "a results file")
    if html_file is not None:
        check_removable_output(html_file, PAGE_MARK, "--html", "a page")
    if grid_file is not None:
        check_removable_output(grid_file, GRID_MARK, "--grid", "a grid")
    if work is not None:
        check_writable_folder(work, "--work")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
