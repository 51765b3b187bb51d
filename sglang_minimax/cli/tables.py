"""Tables of the commands, which look alike and lose no column."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

MOST_COLUMNS = 1000


def table(*titles: str, rows: Iterable[tuple[str, ...]], right: Collection[str] = ()) -> Table:
    """Rows under titles; columns named in `right` hold numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in titles:
        made.add_column(name, no_wrap=True, justify="right" if name in right else "left")
    for row in rows:
        made.add_row(*map(escape, row))
    return made


def pairs(rows: Iterable[tuple[str, str]]) -> Table:
    """(what, how much), one a line."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(no_wrap=True)
    for row in rows:
        made.add_row(*map(escape, row))
    return made


def show(made: Table) -> None:
    """Print in full: a terminal that is too narrow, or a pipe, must not lose a column."""
    console = Console(highlight=False)
    unlimited = console.options.update(max_width=MOST_COLUMNS)
    console.width = max(console.width, Measurement.get(console, unlimited, made).maximum)
    console.print(made)
