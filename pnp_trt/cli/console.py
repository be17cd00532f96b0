"""A rich console that escapes control characters, so that text in tables and panels cannot control the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from ..io.text import printable


class PlainTextConsole(Console):
    """A console that escapes control characters in all rendered text; rich's own styles are added afterwards."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as ``Console.render`` does, with text made printable; rich's own control codes are unchanged."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text, keep="\n")
            yield segment if text == segment.text else Segment(text, segment.style, segment.control)


def stdout_console() -> PlainTextConsole:
    """Return a console on standard output; off a terminal it is 130 columns wide, so that tables are not squeezed."""
    console = PlainTextConsole(markup=False)
    return console if console.is_terminal else PlainTextConsole(width=130, markup=False)
