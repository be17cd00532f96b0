"""A rich console that prints text as text: what comes out of tables and panels steers no terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from ..io.text import printable


class PlainTextConsole(Console):
    """Escapes control characters in everything that is rendered; rich's own styles are added after that."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As ``Console.render``, each piece of text printable; control codes are rich's own and stay."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text, keep="\n")
            yield segment if text == segment.text else Segment(text, segment.style, segment.control)


def stdout_console() -> PlainTextConsole:
    """Standard output; tables that go to a file or a log are not squeezed into eighty columns."""
    console = PlainTextConsole(markup=False)
    return console if console.is_terminal else PlainTextConsole(width=130, markup=False)
