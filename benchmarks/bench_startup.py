"""How long until a server without an accelerator answers: forked children against spawned ones.

    python -m benchmarks.bench_startup --ranks 1 --ranks 4

`spawn` is what SGLang does everywhere: each rank imports SGLang again. The CPU platform forks
after the imports. Same machine, same checkpoint (tiny-m2), runs in turn, until /health is 200.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import common
from sglang_minimax.cli.local_server import LocalServer
from sglang_minimax.platforms.cpu.forking import START_METHOD

METHODS = ("spawn", "fork")


def start_once(method: str, ranks: int) -> tuple[float, float]:
    """Start a server with `ranks` tensor-parallel ranks: (seconds to ready, CPU seconds)."""
    with tempfile.TemporaryFile() as log:
        server = LocalServer(
            arguments=["--tp-size", str(ranks), "--skip-server-warmup", "--log-level", "error"],
            environment={START_METHOD: method},
            log=log,
        )
        began = time.monotonic()
        with server.running(timeout=600):
            seconds = time.monotonic() - began
            times = [process.cpu_times() for process in server.family()]
            return seconds, sum(t.user + t.system for t in times)


def measure(ranks: int, runs: int, console: Console) -> list[dict[str, Any]]:
    """Interleaved runs of both methods, so that a drift of the machine meets both."""
    found: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    for run in range(runs):
        for method in METHODS:
            with console.status(f"{ranks} ranks, {method}, run {run + 1} of {runs}"):
                found[method].append(start_once(method, ranks))
    return [
        {
            "ranks": ranks,
            "method": method,
            "seconds": statistics.median(s for s, _ in found[method]),
            "seconds_all": [round(s, 2) for s, _ in found[method]],
            "cpu_seconds": statistics.median(c for _, c in found[method]),
        }
        for method in METHODS
    ]


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print one line a number of ranks."""
    table = Table(title="a server that answers, from nothing (median)", title_justify="left")
    for name in ("ranks", "spawn s", "fork s", "ratio", "spawn CPU s", "fork CPU s"):
        table.add_column(name, justify="right")
    for spawn, fork in zip(rows[::2], rows[1::2], strict=True):
        table.add_row(
            str(spawn["ranks"]),
            f"{spawn['seconds']:.1f}",
            f"{fork['seconds']:.1f}",
            f"{spawn['seconds'] / fork['seconds']:.1f}x",
            f"{spawn['cpu_seconds']:.0f}",
            f"{fork['cpu_seconds']:.0f}",
        )
    console.print(table)


def plot(path: Path) -> Path:
    """Draw the bars from the JSON file at `path`, beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    data = json.loads(path.read_text())
    labels = sorted({row["ranks"] for row in data["rows"]})
    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for offset, method in zip((-0.2, 0.2), METHODS, strict=True):
        heights = [r["seconds"] for r in data["rows"] if r["method"] == method]
        bars = axes.bar([i + offset for i in range(len(labels))], heights, 0.38, label=method)
        axes.bar_label(bars, fmt="%.0f")
    axes.set_xticks(range(len(labels)), [f"TP{n}" for n in labels])
    axes.set_ylabel("seconds until the server answers")
    axes.set_title(f"{data['provenance']['machine']}, {data['provenance']['date']}", fontsize=9)
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    return path.with_suffix(".png")


def main(
    ranks: Annotated[list[int] | None, typer.Option(help="Tensor-parallel sizes.")] = None,
    runs: Annotated[int, typer.Option(help="Runs of each, interleaved.")] = 3,
) -> None:
    """Measure, print the table, write results/startup.json and its plot."""
    console = Console()
    rows = [row for count in ranks or [1, 2, 4] for row in measure(count, runs, console)]
    show(rows, console)
    path = common.write("startup", rows)
    console.print(path.name, plot(path).name)


if __name__ == "__main__":
    typer.run(main)
