"""Printing to a terminal: lines, tables, and counts with a unit."""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

WIDE = 160
"""Columns of the output where no terminal says how many it has."""

_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """A count with a unit: 1.82G, 23.5M, 412."""
    for size, unit in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def open_console(stderr: bool = False) -> Console:
    """The console of a command; without a terminal its lines have :data:`WIDE` columns."""
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = WIDE
    return console


def print_line(console: Console, line: str) -> None:
    """Print a line as it is: never wrapped, and nothing in it is taken for markup."""
    console.print(Text(line), soft_wrap=True)


def print_tables(console: Console, tables: RenderableType) -> None:
    """Print tables; what a terminal has no room for goes on in its next line."""
    console.print(tables, crop=False)


def uncut(table: Table) -> Table:
    """The table, with the columns that do not wrap kept whole in however narrow a terminal."""
    for column in table.columns:
        cells = [str(cell) for cell in (column.header, *column.cells)]
        if column.no_wrap:
            column.min_width = max(map(cell_len, cells))
        else:
            column.overflow = "fold"
            column.min_width = min(8, max(map(cell_len, cells)))
    return table
