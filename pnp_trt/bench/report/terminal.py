"""Render a results document for a terminal: compact tables, followed by the findings in sentences."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .findings import sentences
from .tables import Table, terminal_tables

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

#: Minimum width of a column of names, in characters; if even that does not fit, figures are folded too.
NAME_WIDTH = 10
GAP = 2


class Tables:
    """Tables and sentences below them, as one rich renderable that fits the terminal's width."""

    def __init__(self, tables: Sequence[Table], closing: Iterable[str] = ()) -> None:
        self.tables = tables
        self.closing = list(closing)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        from rich.text import Text

        for table in self.tables:
            yield from (_rich(table, options.max_width), *(Text(note, "dim") for note in table.notes), Text())
        yield from map(Text, self.closing)


def _rich(table: Table, width: int) -> RenderableType:
    """Fit the table into `width` characters: figures stay on one line, and names are wrapped, preferably at hyphens."""
    from rich.table import Table as RichTable
    from rich.text import Text

    widths = [
        max(len(part) for part in [*head.split(), *(row[place] for row in table.rows)])
        for place, head in enumerate(table.head)
    ]
    room = width - sum(widths[table.words :]) - GAP * (len(widths) - 1)
    while sum(widths[: table.words]) > room and max(widths[: table.words]) > NAME_WIDTH:
        widths[widths.index(max(widths[: table.words]))] -= 1
    fits = sum(widths[: table.words]) <= room
    for place, head in enumerate(table.head):  # use the remaining width to keep headings on one line
        if sum(widths) + len(head) - widths[place] + GAP * (len(widths) - 1) <= width:
            widths[place] = max(widths[place], len(head))
    rich_table = RichTable(title=table.title, title_justify="left", title_style="bold", box=None, header_style="dim")
    rich_table.pad_edge, rich_table.padding = False, (0, GAP, 0, 0)
    for place, head in enumerate(table.head):
        fixed = widths[place] if fits else None
        words = place < table.words
        rich_table.add_column(head, justify="left" if words else "right", overflow="fold", width=fixed)
    for row in table.rows:
        names = [
            "\n".join(textwrap.wrap(cell, widths[i])) if fits else cell for i, cell in enumerate(row[: table.words])
        ]
        rich_table.add_row(*(Text(cell) for cell in names + row[table.words :]))
    return rich_table


def render_terminal(doc: Mapping[str, Any]) -> RenderableType:
    """Return the tables of `doc` and the findings in sentences, as one rich renderable."""
    return Tables(terminal_tables(doc), sentences(doc))
