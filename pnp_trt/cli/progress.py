"""Progress display of a command on standard error."""

from __future__ import annotations

import sys

from ..io.text import printable


class ProgressBar:
    """A progress bar on a terminal, plain lines elsewhere; nothing is printed if ``quiet``."""

    def __init__(self, title: str, quiet: bool = False) -> None:
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
        #: whether the bar is displayed
        self.watched = not self._progress.disable
        self._plain = not quiet and not console.is_terminal
        self._task = self._progress.add_task(printable(title, limit=200), total=None)
        self._last = ""

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def count(self, done: int, total: int) -> None:
        """Update the steps done and the total."""
        self._progress.update(self._task, completed=done, total=total)

    def note(self, text: str, done: int, total: int, note: str = "", /) -> None:
        """Update the current stage, the steps done and the total."""
        text = printable(f"{text} {note}" if note else text)
        self._progress.update(self._task, description=text, completed=done, total=total)
        if self._plain and text != self._last:
            print(text, file=sys.stderr)
        self._last = text

    def stages(self, name: str, done: int, total: int, note: str = "", /) -> None:
        """Update a stage with its own count; off a terminal, print a line for each tenth of it."""
        name, note = printable(name), printable(note)
        self._progress.update(self._task, description=f"{name} {note}", completed=done, total=total)
        mark = f"{name} {10 * done // max(total, 1)}"
        if self._plain and mark != self._last:
            print(f"{name}: {done} of {total} {note}", file=sys.stderr)
        self._last = mark
