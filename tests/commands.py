"""Commands of the command line that are made once a process.

Typer makes all commands anew at every call of an app, in a twentieth of a second; a user's process makes one call.
"""

from __future__ import annotations

import functools

import typer.main

#: typer's own
made_anew = typer.main.get_command
#: Of every app once.  Not for help in a process that goes on: help writes into a command which values are registered.
made_once = functools.cache(made_anew)
