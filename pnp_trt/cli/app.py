"""The command line: each command parses its options, calls one library function and prints the result."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any

import typer

from ..errors import PnpError
from ..io import process
from ..io.text import printable
from . import bench, calibrate, compare, distill, doctor, engines, generate, plug, sample, serve, state, visualize
from .registry_help import RegistryCommand, with_former_names

app = typer.Typer(
    help="Serve Stable-Diffusion-family models with one U-Net evaluation per step.\n\n"
    "Start with: pnp-trt sample 'a red apple'",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=RegistryCommand)(sample.sample)
app.command(cls=RegistryCommand)(generate.generate)
app.command(cls=RegistryCommand)(engines.build)
app.command(cls=RegistryCommand)(plug.plug)
app.command(cls=with_former_names({"--pictures": "--images"}))(bench.bench)
app.command(cls=RegistryCommand)(compare.compare)
app.command(cls=RegistryCommand)(visualize.visualize)
app.command()(serve.serve)
app.add_typer(distill.distill_app, name="distill")
app.command(cls=with_former_names({"--pictures": "--images"}))(calibrate.calibrate)
app.command()(engines.inspect)
app.command("list")(engines.list_engines)
app.command()(engines.verify)
app.command()(doctor.doctor)


def main() -> None:
    """Run the command line; an error of the library becomes one sentence and an exit code, any other error is a bug."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    for stream in (sys.stdout, sys.stderr):  # a character that the encoding lacks must not end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        process.run(lambda: app(standalone_mode=True))
    except PnpError as e:
        if state.debug:
            raise
        print(f"pnp-trt: {printable(e)}", file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print("pnp-trt: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        if state.debug:
            raise
        text = f"unexpected {type(e).__name__}: {e}"
        print(f"pnp-trt: {printable(text)}; run again with --debug for the details", file=sys.stderr)
        sys.exit(1)


def _show_warning(message: Any, category: type, *_: Any) -> None:
    if issubclass(category, UserWarning) and not issubclass(category, FutureWarning | DeprecationWarning):
        print(f"pnp-trt: {printable(message)}", file=sys.stderr)


def _version(show: bool) -> None:
    if show:
        from ..version import __version__

        print(f"pnp-trt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    state.debug = debug or bool(os.environ.get("PNP_TRT_DEBUG"))


if __name__ == "__main__":
    main()
