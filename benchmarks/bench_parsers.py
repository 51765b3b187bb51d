"""What does a long tool argument cost: SGLang's in-tree parser against ours, in the same run?

    python -m benchmarks.bench_parsers
    python -m benchmarks.bench_parsers --chunk 1 --chunk 64     # other pieces than 4 characters

A reply that writes a file of 2 KB to 512 KB by one string argument (benchmarks/parser_runs.py),
through SGLang's FunctionCallParser with either detector. Seconds are CPU time of this process. A
run is stopped when it has taken more than --budget, since in-tree's time grows with the square of
the length. The longest increment is what every other request of the process waits for.
docs/benchmarks-parsers.md says what is in the figures. Writes results/parsers.json and .png.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import common, parser_plot, parser_runs, parser_table, parser_waits
from benchmarks.parser_runs import CONTENTS, IN_TREE, OURS, PARSERS, Reply, Run, spread
from benchmarks.parser_table import CHUNK, Row

CHARACTERS = tuple(2**n for n in (11, 13, 15, 17, 19))
BUDGET = 60.0
RUNS = 5
#: A cell is not repeated once its runs have taken so long together.
ENOUGH = 5.0
#: The aim: so many characters in chunks of CHUNK, within so many CPU seconds.
AIM_CHARACTERS, AIM_SECONDS = 2**17, 0.5


def several(run: Callable[[str], Run], runs: int) -> dict[str, list[Run]]:
    """Runs of both parsers in turn, so that a drift meets both; slow ones fewer times."""
    found: dict[str, list[Run]] = {name: [] for name in PARSERS}
    for _ in range(runs):
        for name, done in found.items():
            if sum(each.seconds for each in done) < ENOUGH:
                gc.collect()
                done.append(run(name))
    return found


def streamed(which: str, characters: int, chunk: int, budget: float, runs: int) -> list[Row]:
    """A row for each parser."""
    reply = Reply(parser_runs.content(which, characters))
    found = several(lambda name: parser_runs.stream(name, reply, chunk, budget), runs)
    return [
        {
            "content": which,
            "chunk": chunk,
            "characters": characters,
            "parser": name,
            "cpu_seconds": spread([run.seconds for run in all_runs]),
            "longest_increment": spread([run.longest for run in all_runs]),
            "first_after": all_runs[0].first_after,
            "first_seconds": first_seconds(all_runs),
            "stopped_at": all_runs[-1].stopped_at,
            "result": all_runs[-1].verdict,
        }
        for name, all_runs in found.items()
    ]


def first_seconds(runs: list[Run]) -> dict[str, Any] | None:
    """CPU seconds until the first text of the value, None where none came."""
    values = [run.first_seconds for run in runs if run.first_seconds is not None]
    return spread(values) if values else None


def at_once(which: str, characters: int, runs: int) -> list[Row]:
    """A row for each parser, not streaming."""
    reply = Reply(parser_runs.content(which, characters))
    found = several(lambda name: parser_runs.whole(name, reply), runs)
    return [
        {
            "content": which,
            "characters": characters,
            "parser": name,
            "cpu_seconds": spread([run.seconds for run in all_runs]),
            "result": all_runs[-1].verdict,
        }
        for name, all_runs in found.items()
    ]


def aim(rows: list[Row]) -> str:
    """The aim, and what was found of it."""
    size = parser_table.size(AIM_CHARACTERS)
    asked = f"{size} in {CHUNK}-character chunks in under {AIM_SECONDS} s of CPU"
    found = [
        row["cpu_seconds"]["median"]
        for row in rows
        if (row["parser"], row["characters"], row["chunk"]) == (OURS, AIM_CHARACTERS, CHUNK)
    ]
    if not found:
        return f"not measured: {asked}"
    return f"{'met' if max(found) < AIM_SECONDS else 'NOT MET'}: {asked}; {max(found):.2f} s"


def waits(which: str, characters: int, budget: float) -> list[Row]:
    """A row for each parser: its steps inside the chat handler."""
    reply = Reply(parser_runs.content(which, characters))
    found = []
    for name in PARSERS:
        gc.collect()
        done = parser_waits.steps(name, reply, CHUNK, budget)
        found.append(parser_waits.summary(name, characters, CHUNK, done))
    return found


def waits_aim(rows: list[Row]) -> str:
    """The aim for other requests, and what was found of it."""
    size = parser_table.size(parser_waits.AIM_CHARACTERS)
    asked = f"a step of {size} in {CHUNK}-character chunks adds at most 20 ms to another request"
    found = [
        row["longest"]
        for row in rows
        if (row["parser"], row["characters"]) == (OURS, parser_waits.AIM_CHARACTERS)
    ]
    if not found:
        return f"not measured: {asked}"
    longest = max(found)
    met = longest <= parser_waits.AIM_SECONDS
    return f"{'met' if met else 'NOT MET'}: {asked}; {1e3 * longest:.1f} ms"


def waits_table(rows: list[Row]) -> Table:
    """One line for each parser."""
    found = _table(
        "one step of the chat handler, wall time",
        *("argument", "steps", "half of them within", "99.9 %", "longest", "all together"),
    )
    for row in rows:
        times = (row[name] for name in ("median", "nearly_all", "longest", "together"))
        label = f"{parser_table.size(row['characters'])}, {row['parser']}"
        found.add_row(label, str(row["steps"]), *map(parser_table.seconds, times))
    return found


def streaming_table(rows: list[Row], which: str, chunk: int, budget: float) -> Table:
    """One line for each length of the argument."""
    title = f"one string argument ({which}) in {chunk}-character chunks, CPU time, median"
    found = _table(title, *parser_table.HEAD)
    mine = [row for row in rows if (row["content"], row["chunk"]) == (which, chunk)]
    for line in parser_table.lines(mine, budget):
        found.add_row(*line)
    return found


def linear_table(rows: list[Row]) -> Table:
    """Ours: the cost of a character at each length. Where it is linear, a line is level."""
    mine = [row for row in rows if row["parser"] == OURS]
    sizes = sorted({row["characters"] for row in mine})
    found = _table("ours, microseconds a character", "", *map(parser_table.size, sizes))
    for which, chunk in dict.fromkeys((row["content"], row["chunk"]) for row in mine):
        costs = {
            row["characters"]: row["cpu_seconds"]["median"] / row["characters"]
            for row in mine
            if (row["content"], row["chunk"]) == (which, chunk)
        }
        cells = (f"{1e6 * costs[n]:.3f}" if n in costs else "" for n in sizes)
        found.add_row(f"{which}, chunks of {chunk}", *cells)
    return found


def whole_table(rows: list[Row]) -> Table:
    """Not streaming: one line for each content and length."""
    found = _table(
        "the same replies parsed at once, CPU time, median",
        *("argument", IN_TREE, OURS, "result, in-tree", OURS),
    )
    for in_tree, ours in parser_table.pairs(rows):
        found.add_row(
            f"{in_tree['content']}, {parser_table.size(in_tree['characters'])}",
            *(parser_table.seconds(row["cpu_seconds"]["median"]) for row in (in_tree, ours)),
            in_tree["result"],
            ours["result"],
        )
    return found


def _table(title: str, *columns: str) -> Table:
    found = Table(title=title, title_justify="left", box=box.SIMPLE)
    for number, name in enumerate(columns):
        found.add_column(name, justify="right" if number else "left", no_wrap=True)
    return found


def main(
    characters: Annotated[list[int] | None, typer.Option(help="Repeatable.")] = None,
    chunk: Annotated[list[int] | None, typer.Option(help="Characters; repeatable.")] = None,
    content: Annotated[list[str] | None, typer.Option(help="code, prose; repeatable.")] = None,
    budget: Annotated[float, typer.Option(help="CPU seconds of a cell.")] = BUDGET,
    runs: Annotated[int, typer.Option(help="Of each cell, at most.")] = RUNS,
    results: Annotated[Path, typer.Option(help="Folder of what is written.")] = common.RESULTS,
) -> None:
    """Measure, print the tables, write the JSON and its plot."""
    console = Console(width=max(Console().width, 190))
    unknown = sorted(set(content or ()) - CONTENTS.keys())
    if unknown:
        raise typer.BadParameter(f"no content {unknown[0]!r}; there are {', '.join(CONTENTS)}")
    sizes, chunks, contents = characters or CHARACTERS, chunk or [CHUNK], content or [*CONTENTS]
    # What was imported is not searched for garbage; what a parser makes is, as in a server.
    gc.collect()
    gc.freeze()
    rows: list[Row] = []
    for which in contents:
        for length in chunks:
            for size in sizes:
                with console.status(f"{which}, {parser_table.size(size)}, chunks of {length}"):
                    rows += streamed(which, size, length, budget, runs)
            console.print(streaming_table(rows, which, length, budget))
    not_streaming = [row for which in contents for n in sizes for row in at_once(which, n, runs)]
    console.print(linear_table(rows), whole_table(not_streaming), sep="\n")
    at = min(max(sizes), parser_waits.AIM_CHARACTERS)
    waiting = waits(contents[0], at, budget)
    console.print(waits_table(waiting), aim(rows), waits_aim(waiting), sep="\n")
    part = characters or chunk or content or budget != BUDGET
    if results == common.RESULTS and part:
        console.print("nothing written: a part is not a result, unless --results names a folder")
        return
    written = common.write(
        "parsers",
        rows,
        folder=results,
        budget=budget,
        aims=[aim(rows), waits_aim(waiting)],
        waits=waiting,
        not_streaming=not_streaming,
    )
    console.print(written.name, parser_plot.draw(written).name)


if __name__ == "__main__":
    typer.run(main)
