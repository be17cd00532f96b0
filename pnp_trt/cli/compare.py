"""``pnp-trt compare``: compare two results files of ``pnp-trt bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..io.text import printable


def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="Results file of an earlier pnp-trt bench --json.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Results file to compare with it.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the comparison here.")] = None,
    fail_on_regression: Annotated[
        bool, typer.Option("--fail-on-regression", help="Exit with 1 if anything got significantly worse.")
    ] = False,
) -> None:
    """Report what changed significantly between two bench runs. `pnp-trt bench --compare OLD` runs and compares."""
    from ..bench import results
    from ..bench.compare import compare as module
    from ..io.files import check_writable_file
    from ..io.replacing import check_removable_file
    from .console import stdout_console

    if json_file is not None:
        check_writable_file(json_file, "--json")
        check_removable_file(json_file, "pnp-trt/bench-compare/", "--json", "a comparison")
    comparison = module.compare(results.read(old), results.read(new))
    stdout_console().print(module.render_terminal(comparison))
    if json_file is not None:
        results.write(comparison.as_dict(), json_file)
        print(printable(f"comparison: {json_file}"))
    if fail_on_regression and comparison.regressed:
        raise typer.Exit(1)
