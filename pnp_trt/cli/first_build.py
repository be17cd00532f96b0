"""Assemble or build a bundled engine when a command first uses it."""

from __future__ import annotations

import subprocess
import sys

from ..errors import MissingDependency, PnpError
from ..io import process
from ..io.text import printable
from . import state
from .requirements import missing_packages


def build_if_missing(engine: str, quiet: bool) -> None:
    """Assemble or build a bundled model's engine on first use.

    An engine that the package ships without its weights is assembled in seconds, without torch.  Any other is built in
    a separate process, so that this process never loads torch.

    Raises:
        MissingDependency: if the engine is not built and the packages that build it are not installed.
        PnpError: if the build fails.
    """
    from ..bench.engines import default_build
    from ..bundle.packed import assemble, packed_bundles
    from ..bundle.store import engines_home

    arguments = default_build(engine)
    if arguments is None or (engines_home() / engine).is_dir():
        return
    if engine in packed_bundles():
        if not quiet:
            print(f"assembling engine '{printable(engine)}' from the package (once, takes seconds)", file=sys.stderr)
        assemble(engine, engines_home() / engine)
        return
    if missing := missing_packages("build"):
        raise MissingDependency(
            f"engine '{engine}' is not built yet, and building it needs {missing}; "
            f"or copy a built bundle to {engines_home() / engine}"
        )
    if not quiet:
        print(f"engine '{printable(engine)}' is not built yet; building it once (about a minute)", file=sys.stderr)
    command = [sys.executable, "-m", "pnp_trt", *(["--debug"] if state.debug else []), "build", *arguments]
    result = process.run_child(command, stdout=subprocess.DEVNULL)
    if result.returncode:
        raise PnpError(
            f"building engine '{engine}' failed (exit code {result.returncode}); "
            f"run the build by itself: pnp-trt build {' '.join(arguments)}"
        )
