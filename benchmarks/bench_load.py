"""What does loading cost a rank: SGLang's in-tree loader against ours, on the same files?

    python -m benchmarks.bench_load

Two synthetic FP8 checkpoints (benchmarks/load_checkpoints.py): all 96,103 names of the published
one with small matrices, and few matrices of the published size. One process is rank 0 of each
topology; it builds the model and loads it by SGLang's own path, with the in-tree class and loader
and with ours, in turn. Files are once out of the page cache ("cold") and once in it ("warm").
Loading only: nothing is post-processed (benchmarks/load_rank.py says what else is not as in a
server). Writes results/load.json and results/load.png.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import common, load_checkpoints, load_plot
from benchmarks.load_meters import filesystem, read_ahead_kib
from benchmarks.load_rank import IN_TREE, OURS, PLACES, REPLACED, Place, Refused, in_child, preload
from benchmarks.load_tasks import examined_load, timed_load

#: Figures of which runs may differ; the JSON has their median and all of them.
VARYING = (
    *("seconds", "cpu_seconds", "system_seconds", "minor_faults", "major_faults", "read_calls"),
    *("rchar", "storage_bytes", "cached_before", "cached_after", "peak_bytes", "anonymous_bytes"),
)
#: CPU seconds of a load that is looked into.
HANDLING = ("names_seconds", "plan_seconds", "headers_seconds")
COLUMNS = (
    *("s cold", "s warm", "CPU s", "names s", "plan s", "opened", "owned"),
    *("MB asked", "MB disk", "MB owned", "MB peak"),
)
STATES = {"cold": True, "warm": False}


def measure(folder: Path, place: Place, loaders: list[str], runs: int) -> list[dict[str, Any]]:
    """The rows of one topology: runs of the loaders in turn, so that a drift meets all."""
    rows: dict[str, dict[str, Any]] = {who: {"loader": who} for who in loaders}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for who, row in rows.items():
        try:
            several = [in_child(examined_load, folder, place, who) for _ in range(runs)]
        except Refused as refusal:
            row["refuses"] = str(refusal)
            continue
        row |= several[0]
        row |= {n: median_and_all([r[n] for r in several]) for n in HANDLING if n in row}
    for _ in range(runs):
        for state, cold in STATES.items():
            for who in (who for who in loaders if "refuses" not in rows[who]):
                run = in_child(timed_load, folder, place, who, cold)
                found.setdefault((who, state), []).append(run)
    for (who, state), several in found.items():
        rows[who][state] = {name: median_and_all([r[name] for r in several]) for name in VARYING}
        rows[who] |= {name: v for name, v in several[0].items() if name not in VARYING}
    return [{"topology": place.name, **row} for row in rows.values()]


def median_and_all(values: list[float]) -> dict[str, Any]:
    """{"median", "least", "most", "all"} of some runs."""
    rounded = [round(value, 4) for value in values]
    return {
        "median": statistics.median(rounded),
        "least": min(rounded),
        "most": max(rounded),
        "all": rounded,
    }


def show(checkpoint: str, rows: list[dict[str, Any]], console: Console) -> None:
    """Print one line for each topology and loader."""
    title = f"checkpoint {checkpoint!r}, median; CPU s of a warm load, MB disk and peak of a cold"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for name in ("rank 0 of", "loader", *COLUMNS):
        table.add_column(name, justify="right" if name in COLUMNS else "left")
    refusals: list[str] = []
    for row in rows:
        start = (row["topology"], row["loader"])
        if "refuses" in row:
            table.add_row(*start, "refuses")
            refusals.append(f"{row['topology']}, {row['loader']}: {row['refuses']}")
            continue
        cold, warm = row["cold"], row["warm"]
        table.add_row(
            *start,
            f"{cold['seconds']['median']:.2f}",
            f"{warm['seconds']['median']:.2f}",
            f"{warm['cpu_seconds']['median']:.2f}",
            f"{row['names_seconds']['median']:.2f}" if "names_seconds" in row else "",
            f"{row['plan_seconds']['median']:.2f}" if "plan_seconds" in row else "",
            str(row["tensors_opened"]),
            str(row["tensors_loaded"]),
            *(
                f"{value / 1e6:.0f}"
                for value in (
                    row["bytes_asked"],
                    cold["storage_bytes"]["median"],
                    row["bytes_owned"],
                    cold["peak_bytes"]["median"],
                )
            ),
        )
    console.print(table, *refusals, sep="\n")


def main(
    folder: Annotated[Path | None, typer.Option(help="Keep the checkpoints there.")] = None,
    runs: Annotated[int, typer.Option(help="Loads of each kind.")] = 3,
    checkpoint: Annotated[list[str] | None, typer.Option(help="names, bytes; repeatable.")] = None,
    topology: Annotated[list[str] | None, typer.Option(help="As in the table; repeatable.")] = None,
    loader: Annotated[list[str] | None, typer.Option(help="in-tree, ours; repeatable.")] = None,
) -> None:
    """Measure, print the tables, write results/load.json and its plot."""
    console = Console(width=max(Console().width, 120))
    preload()
    rows: list[dict[str, Any]] = []
    checkpoints: dict[str, Any] = {}
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as made:
        base = Path(made)
        for name in checkpoint or load_checkpoints.SIZES:
            size = load_checkpoints.SIZES[name]
            with console.status(f"writing {name}"):
                checkpoints[name] = load_checkpoints.write(base / name, size)
            here = []
            for place in (p for p in PLACES if not topology or p.name in topology):
                with console.status(f"{name}, {place.name}"):
                    here += measure(base / name, place, loader or [IN_TREE, OURS], runs)
            show(name, here, console)
            rows += [{"checkpoint": name, **row} for row in here]
        stored_on, ahead = filesystem(base), read_ahead_kib(base)
    if checkpoint or topology or loader:
        return  # a part is not a result
    path = common.write(
        "load",
        rows,
        runs=runs,
        checkpoints=checkpoints,
        kernel=platform.release().partition("-")[0],
        filesystem=stored_on,
        read_ahead_kib=ahead,
        replaced=REPLACED,
        storage_is_measured=any(r["cold"]["storage_bytes"]["median"] for r in rows if "cold" in r),
    )
    console.print(path.name, load_plot.draw(path).name)


if __name__ == "__main__":
    typer.run(main)
