"""Results as a table for people, and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from sglang_minimax.validation.run import ShapeResult
from sglang_minimax.validation.shapes import Catalogue, NotYet, Refused, Shape

COLUMNS = (
    "shape",
    "max log-prob\nerror",
    "allowed",
    "tokens\nequal",
    "collectives\na layer",
    "bytes\na token",
    "seconds",
    "",
)
#: Columns of text that the table needs; a narrower terminal wraps the lines.
WIDTH = 110


def row(result: ShapeResult) -> tuple[str, ...]:
    """The cells of one result, in the order of COLUMNS."""
    if result.max_error is None:
        measured = ("", "", "", "", "")
    else:
        measured = (
            f"{result.max_error:.1e}",
            f"{result.tolerance:.1e}",
            "yes" if result.tokens_equal else "NO",
            f"{result.collectives:g}",
            f"{result.bytes_a_token:,.0f}",
        )
    return (result.topology, *measured, f"{result.seconds:.1f}", verdict(result))


def verdict(result: ShapeResult) -> str:
    """The last cell: what became of the shape, in a few words."""
    if result.status == "refused" and result.expected:
        return "refused, as listed"
    if result.status == "ok" and result.near_ties:
        return f"ok ({result.near_ties} after a near tie)"
    return {"failed": "FAILED", "refused": "REFUSED"}.get(result.status, result.status)


def console() -> Console:
    """Where the table goes: the terminal, or a pipe, at least as wide as the table."""
    found = Console(highlight=False)
    return found if found.width >= WIDTH else Console(width=WIDTH, highlight=False)


def show(results: Sequence[ShapeResult], console: Console) -> None:
    """Print the table, and below it why shapes fell short or were not run."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        words = column in ("shape", "tokens\nequal", "")
        table.add_column(column, justify="left" if words else "right", no_wrap=True)
    for result in results:
        style = "red" if result.falls_short else None
        table.add_row(*row(result), style=style)
    console.print(table)
    for result in results:
        for sentence in remarks(result):
            console.print(
                f"{result.topology}: {sentence}", style="red", soft_wrap=True, markup=False
            )
    console.print(summary(results))


def remarks(result: ShapeResult) -> list[str]:
    """Sentences about what went wrong, or why the shape was not run."""
    said = list(result.shortcomings)
    if result.reason and not (result.status == "refused" and result.expected):
        said.insert(0, result.reason)
    return said


def summary(results: Sequence[ShapeResult]) -> str:
    """One line: how many of each kind, and how long it took."""
    counts = {
        "agree with transformers": sum(r.status == "ok" for r in results),
        "refused as listed": sum(r.status == "refused" and r.expected for r in results),
        "not run": sum(r.status == "not run" for r in results),
        "fall short": sum(r.falls_short for r in results),
    }
    named = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"{named or 'nothing was run'}; {sum(r.seconds for r in results):.0f} s"


def as_dict(result: ShapeResult) -> dict[str, Any]:
    """One JSON object; `topology` names the shape, `ok` says whether it passed."""
    found = asdict(result)
    found["kv_layers"] = list(result.kv_layers)
    found["shortcomings"] = list(result.shortcomings)
    # JSON has no NaN; a shortcoming says what was not a number.
    found = {
        key: None if isinstance(value, float) and value != value else value
        for key, value in found.items()
    }
    return {**found, "ok": not result.falls_short}


def topology_table(everything: Catalogue) -> str:
    """The whole list as a Markdown table, for docs/validation.md."""
    lines = ["| shape | model | |", "|---|---|---|"]
    places: list[Shape | Refused | NotYet]
    places = [*everything.shapes, *everything.refused, *everything.not_yet]
    for place in places:
        match place:
            case Refused():
                note = f"refused at launch: {place.says}"
            case NotYet():
                note = f"not run: {place.reason}"
            case Shape():
                note = f"runs: {place.why}" if place.why else "runs"
        name = place.label if isinstance(place, Refused) else place.name
        lines.append(f"| `{name}` | {place.model} | {note} |")
    return "\n".join(lines)
