"""What results/parsers.json shows in a terminal and in the README."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

Row = dict[str, Any]
#: What the README shows; of the content, also the plot.
CONTENT, CHUNK = "code", 4
HEAD = (
    "argument",
    *("CPU, in-tree", "ours"),
    *("first text after, in-tree", "ours"),
    *("longest step (median of runs), in-tree", "ours"),
    *("result, in-tree", "ours"),
)


def lines(rows: Iterable[Row], budget: float) -> list[tuple[str, ...]]:
    """A line for each length of the argument, from the rows of one content and chunk."""
    found = []
    for both in pairs(rows):
        found.append(
            (
                size(both[0]["characters"]),
                *(cost(row, budget) for row in both),
                *(first(row) for row in both),
                *(seconds(row["longest_increment"]["median"]) for row in both),
                *(row["result"] or "none" for row in both),
            )
        )
    return found


def pairs(rows: Iterable[Row]) -> Iterator[tuple[Row, Row]]:
    """In-tree's row and ours of the same reply."""
    both: dict[Any, dict[str, Row]] = {}
    for row in rows:
        key = (row["content"], row.get("chunk"), row["characters"])
        both.setdefault(key, {})[row["parser"]] = row
    for each in both.values():
        yield each["in-tree"], each["ours"]


def cost(row: Row, budget: float) -> str:
    """The whole reply, or how far the parser came."""
    if row["stopped_at"] is None:
        return seconds(row["cpu_seconds"]["median"])
    return f"> {budget:g} s (stopped at {row['stopped_at'] // 1024} KB)"


def first(row: Row) -> str:
    """How much of the argument must be there before any of it comes out, and the CPU time."""
    if row["first_after"] is None:
        return "none came"
    return f"{size(row['first_after'])}, {seconds(row['first_seconds']['median'])}"


def size(characters: int) -> str:
    """Contents are ASCII: a character is a byte."""
    return f"{characters // 1024} KB" if characters % 1024 == 0 else f"{characters:,} characters"


def seconds(value: float) -> str:
    """Two digits that say something, with the unit that leaves them few zeros."""
    if value >= 9.95:
        return f"{value:.0f} s"
    return f"{value:.2g} s" if value >= 0.995 else _milliseconds(1e3 * value)


def _milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 9.95 else f"{value:.2g} ms"
