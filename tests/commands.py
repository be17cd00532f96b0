"""Create typer's commands once per process, and run the command line without ending the process.

Typer creates all commands again at every call of an app, which takes 50 ms; a user's process makes one call.
"""

from __future__ import annotations

import functools
import sys

import typer.main

#: typer's own function
made_anew = typer.main.get_command
#: Creates the command of each app once.  Not for ``--help`` in a process that runs more commands: help stores the
#: values registered at that time in the command.
made_once = functools.cache(made_anew)


def exit_code(words: list[str]) -> int:
    """Run ``pnp-trt WORDS`` in this process and return its exit code; streams are not flushed."""
    from pnp_trt.cli.app import main

    sys.argv = ["pnp-trt", *words]
    try:
        main()
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    return 0
