"""The command line: parse, call one library function, print."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from . import calibrate as cli_calibrate, engines as cli_engines
from ..io import process
from ..errors import InputError, PnpError
from ..io.text import printable

app = typer.Typer(
    help="Serve Stable-Diffusion-family models with one U-Net pass a step.\n\nStart with: pnp-trt sample 'a red apple'",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cli_engines.register(app)
cli_calibrate.register(app)

_debug = False


def main() -> None:
    """Entry point: library errors become one sentence and an exit code; the rest is a bug and says so."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    for stream in (sys.stdout, sys.stderr):  # a terminal or PYTHONIOENCODING that lacks a character must not end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        process.run(lambda: app(standalone_mode=True))
    except PnpError as e:
        if _debug:
            raise
        print(f"pnp-trt: {printable(e)}", file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print("pnp-trt: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        if _debug:
            raise
        text = f"unexpected {type(e).__name__}: {e}"
        print(f"pnp-trt: {printable(text)}; run again with --debug for the details", file=sys.stderr)
        sys.exit(1)


def _show_warning(message: Any, category: type, *_: Any) -> None:
    if issubclass(category, UserWarning) and not issubclass(category, FutureWarning | DeprecationWarning):
        print(f"pnp-trt: {printable(message)}", file=sys.stderr)


def _version(show: bool) -> None:
    if show:
        from .. import __version__

        print(f"pnp-trt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    global _debug
    _debug = debug or bool(os.environ.get("PNP_TRT_DEBUG"))


@app.command()
def sample(
    prompts: Annotated[
        list[str],
        typer.Argument(metavar="PROMPT...", help="What to draw; several are drawn as one batch; - reads a line each."),
    ],
    engine: Annotated[str, typer.Option(help="A bundle's name or folder.")] = "emoji-tiny",
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps; default: what the guide was distilled for, or 20.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale w, 1 to 9.")] = 3.0,
    negative: Annotated[str | None, typer.Option(help="Negative prompt, where the engine takes one.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the next ones count up.")] = 0,
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=1000, help="Pictures per prompt.")] = 1,
    method: Annotated[str | None, typer.Option(help="guided, or on a bundle without guide: cfg, unguided.")] = None,
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH in pixels, where the engine has several; default its own.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="ddim, dpm++, euler or teacher; default: the teacher's own where it is one of these."),
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="Picture to begin with, where the engine has a VAE encoder.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="With --init: the share of the steps that are made; default 0.8.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
    kind: Annotated[str, typer.Option("--format", help="png, webp (lossless) or jpeg.")] = "png",
    metadata: Annotated[
        str, typer.Option(help="embedded: parameters inside the pictures; json: in a file beside each, too.")
    ] = "embedded",
    grid: Annotated[Path | None, typer.Option(help="Write all pictures as one, a row a prompt, to this PNG.")] = None,
    provider: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the paths.")] = False,
) -> None:
    """Draw pictures; the parameters are stored in each. No file is ever overwritten."""
    from . import sample as cli_sample
    from ..bundle.profiles import parse_size
    from ..runtime.pipeline import DEFAULT_STEPS, Pipeline, check_request

    prompts = cli_sample.read_prompts(prompts)
    files = cli_sample.Files(out, kind, metadata, grid)
    files.check()
    files.check_prompts(prompts)
    asked = [p for p in prompts for _ in range(count)]
    seeds = [seed + i for _ in prompts for i in range(count)]
    check_request(asked, seeds, [guidance] * len(asked), DEFAULT_STEPS if steps is None else steps)
    wanted = None if size is None else parse_size(size)
    _build_if_missing(engine, quiet)
    pipeline = Pipeline.load(engine, provider=provider)
    steps = steps if steps is not None else pipeline.sampling_steps or DEFAULT_STEPS
    with _Bar(f"{len(asked)} pictures, {steps} steps, w = {guidance:g}", None, quiet) as bar:
        pictures = pipeline(
            asked, steps=steps, guidance=guidance, seed=seeds, method=method, negative=negative, schedule=schedule,
            init=init, strength=strength, callback=bar.count if bar.watched else None, size=wanted,
        )  # fmt: skip
    for path in files.write(pictures, prompts, count):
        print(printable(path))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What is installed, what is missing for which command, and the command that mends it."""
    from . import doctor as module
    from ..bundle.store import engines_home

    checks = module.diagnose(engines_home())
    if as_json:
        import json

        print(json.dumps(module.as_dict(checks), indent=2))
    else:
        _console().print(module.render(checks))
    if not module.ok(checks):
        raise typer.Exit(1)


def _console() -> Any:
    """Standard output; tables that go to a file or a log are not squeezed into eighty columns."""
    from .console import PlainTextConsole

    console = PlainTextConsole(markup=False)
    return console if console.is_terminal else PlainTextConsole(width=130, markup=False)


def _need_torch(command: str) -> None:
    import importlib.util

    wanted = ["torch", "diffusers", "transformers", "onnx", "onnxscript"]
    wanted += ["modelopt"] if command == "calibrate" else []
    if missing := [m for m in wanted if importlib.util.find_spec(m) is None]:
        extra = {"distill": "train", "calibrate": "int8"}.get(command, "build")
        raise InputError(f"pnp-trt {command} needs {', '.join(missing)}; install with: pip install 'pnp-trt[{extra}]'")


def _build_if_missing(engine: str, quiet: bool) -> None:
    """Build a bundled model's engine on first use, in a process of its own: this one never loads torch."""
    import subprocess

    from ..bundle.store import engines_home
    from ..bench.engines import default_build

    arguments = default_build(engine)
    if arguments is None or (engines_home() / engine).is_dir():
        return
    if not quiet:
        print(f"engine '{printable(engine)}' is not built yet; building it once (about a minute)", file=sys.stderr)
    command = [sys.executable, "-m", "pnp_trt", *(["--debug"] if _debug else []), "build", *arguments]
    done = process.run_child(command, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise PnpError(
            f"building engine '{engine}' failed (exit code {done.returncode}); "
            f"run it alone: pnp-trt build {' '.join(arguments)}"
        )


class _Bar:
    """One progress line on standard error; silent when ``quiet`` or when nobody watches."""

    def __init__(self, title: str, total: int | None, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True)
        #: whether somebody sees it
        self.watched = not self._progress.disable
        self._plain = not quiet and not console.is_terminal
        self._title = title = printable(title, limit=200)
        self._task = self._progress.add_task(title, total=total)
        self._last = ""

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, name: str) -> None:
        """A named stage begins; stages count one each."""
        if self._last:
            self._progress.advance(self._task)
        self._last = name
        self._progress.update(self._task, description=f"{self._title}: {printable(name)}")
        if self._plain:
            print(f"{self._title}: {printable(name)}", file=sys.stderr)

    def count(self, done: int, total: int) -> None:
        """Steps done and steps in all."""
        self._progress.update(self._task, completed=done, total=total)

    def note(self, text: str, done: int, total: int) -> None:
        """Steps done, steps in all, and the current stage."""
        text = printable(text)
        self._progress.update(self._task, description=text, completed=done, total=total)
        if self._plain and text != self._last:
            print(text, file=sys.stderr)
        self._last = text

    def stages(self, name: str, done: int, total: int, note: str) -> None:
        """Counted stages after each other; prints a line at each tenth where standard error is no terminal."""
        name, note = printable(name), printable(note)
        self._progress.update(self._task, description=f"{name} {note}", completed=done, total=total)
        mark = f"{name} {10 * done // max(total, 1)}"
        if self._plain and mark != self._last:
            print(f"{name}: {done} of {total} {note}", file=sys.stderr)
        self._last = mark


from .bench import bench  # noqa: E402  (they use what is above)
from .compare import compare  # noqa: E402
from .distill import distill_app  # noqa: E402
from .plug import plug  # noqa: E402
from .visualize import visualize  # noqa: E402

app.command()(bench)
app.command()(compare)
app.add_typer(distill_app, name="distill")
app.command()(plug)
app.command()(visualize)

if __name__ == "__main__":
    main()
