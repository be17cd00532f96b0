"""Commands of the command line that are made once a process, and its exit code without ending the process.

Typer makes all commands anew at every call of an app, in a twentieth of a second; a user's process makes one call.
"""

from __future__ import annotations

import functools
import sys

import typer.main

#: typer's own
made_anew = typer.main.get_command
#: Of every app once.  Not for help in a process that goes on: help writes into a command which values are registered.
made_once = functools.cache(made_anew)


def exit_code(words: list[str]) -> int:
    """Run ``pnp-trt WORDS`` in this process: the exit code that an interpreter would end with, streams not flushed."""
    from pnp_trt.cli.app import main

    sys.argv = ["pnp-trt", *words]
    try:
        main()
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    return 0
