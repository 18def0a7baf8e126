"""Printing to a terminal: lines, tables, and counts with a unit."""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

WIDE = 160
"""Columns of the output that goes to no terminal."""

_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """A count to three digits, with a unit.

    Example:
        >>> short(1814073344), short(2.5e6), short(76320), short(412)
        ('1.81G', '2.5M', '76.3k', '412')
    """
    for size, unit in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def open_console(stderr: bool = False) -> Console:
    """The console of a command; output to a file or pipe has :data:`WIDE` columns."""
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = WIDE
    return console


def print_line(console: Console, line: str, style: str = "") -> None:
    """Print a line literally: it is not wrapped, and brackets are no markup."""
    console.print(Text(line, style), soft_wrap=True)


def print_tables(console: Console, tables: RenderableType) -> None:
    """Print tables uncut; a terminal that is too narrow continues a line in its next one."""
    console.print(tables, crop=False)


def uncut(table: Table) -> Table:
    """The same table, its ``no_wrap`` columns never cut, in however narrow a terminal."""
    for column in table.columns:
        cells = [str(cell) for cell in (column.header, *column.cells)]
        if column.no_wrap:
            column.min_width = max(map(cell_len, cells))
        else:
            column.overflow = "fold"
            column.min_width = min(8, max(map(cell_len, cells)))
    return table
