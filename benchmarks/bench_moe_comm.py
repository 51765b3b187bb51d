"""What do the experts' rows cost to move: SGLang's ways against ours, at the same arguments?

    python -m benchmarks.bench_moe_comm
    python -m benchmarks.bench_moe_comm --no-engines --no-gloo     # the arithmetic alone, seconds

Three parts, of which none needs a GPU: bytes and collectives a token a layer for the published
shape, by arithmetic, with a model of NVLink and InfiniBand that turns them into expected
microseconds (benchmarks/links.py; a model, nothing of it is measured); the same counted inside real
engines on the CPU platform with a small model, in-tree and ours; and the collectives timed over
gloo on this machine, to see that more bytes take longer. docs/benchmarks-communication.md says what
is in the figures. Writes results/moe_comm.json and .png.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import common, links, moe_comm_cases, moe_comm_plot, moe_comm_table
from benchmarks.moe_comm_cases import DECODE, LOADS, PREFILL, Row

RUNS = 15
#: Of the collectives that are timed over gloo.
GLOO = (DECODE, PREFILL)


def main(
    engines: Annotated[bool, typer.Option(help="Count inside engines; some minutes.")] = True,
    gloo: Annotated[bool, typer.Option(help="Time collectives here.")] = True,
    runs: Annotated[int, typer.Option(help="Of each timed cell.")] = RUNS,
    results: Annotated[Path, typer.Option(help="Folder of what is written.")] = common.RESULTS,
) -> None:
    """Compute, count, time; print the tables, write the JSON and its plot."""
    console = Console(width=max(Console().width, 170))
    rows = moe_comm_cases.rows()
    for load in LOADS:
        console.print(_bytes_table(rows, load.name))
    aims = [moe_comm_table.no_more_bytes(rows), moe_comm_table.gather_share(rows)]
    console.print(*aims, sep="\n")
    timed = _timed(console, runs) if gloo else []
    counted = _counted(console) if engines else []
    aims.append(moe_comm_table.counted_as_computed(counted))
    console.print(aims[-1])
    if results == common.RESULTS and not (engines and gloo and runs == RUNS):
        console.print("nothing written: a part is not a result, unless --results names a folder")
        return
    written = common.write(
        "moe_comm",
        rows,
        folder=results,
        aims=aims,
        layers=moe_comm_cases.LAYERS,
        model={"what": "a model, not a measurement", "constants": links.constants()},
        excesses=moe_comm_table.excesses(rows),
        engines=counted,
        gloo=timed,
    )
    console.print(written.name, moe_comm_plot.draw(written).name)


def _bytes_table(rows: list[Row], load: str) -> Table:
    title = f"{load}: bytes that reach a rank, for each token of the batch, in one layer"
    return _table(title, moe_comm_table.HEAD, moe_comm_table.lines(rows, load), left=3)


def _timed(console: Console, runs: int) -> list[Row]:
    from benchmarks import moe_comm_gloo

    with console.status("gloo"):
        found = moe_comm_gloo.rows([each for each in LOADS if each.name in GLOO], "FP8", runs)
    title = f"one layer over gloo on this machine, {moe_comm_gloo.TOPOLOGY}, FP8: no GPU's times"
    head, lines = moe_comm_table.GLOO_HEAD, moe_comm_table.gloo_lines(found)
    console.print(_table(title, head, lines, left=2))
    return found


def _counted(console: Console) -> list[Row]:
    from benchmarks import moe_comm_engines

    found = moe_comm_engines.rows(moe_comm_engines.CASES, console.status)
    title = "counted inside engines on the CPU platform, small model, fp32"
    head, lines = moe_comm_table.ENGINE_HEAD, moe_comm_table.engine_lines(found)
    console.print(_table(title, head, lines, left=7))
    return found


def _table(title: str, head: tuple[str, ...], lines: list[tuple[str, ...]], *, left: int) -> Table:
    found = Table(title=title, title_justify="left", box=box.SIMPLE)
    for number, name in enumerate(head):
        found.add_column(name, justify="left" if number < left else "right")
    for line in lines:
        found.add_row(*line)
    return found


if __name__ == "__main__":
    typer.run(main)
