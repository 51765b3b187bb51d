"""How long does the attention prologue take: ours, and as SGLang launches it?

    python -m benchmarks.bench_tp_qknorm           # on a GPU
    python -m benchmarks.bench_tp_qknorm --cpu     # what runs without one

The published shape (48 query and 8 KV heads of 128, 64 of them turned, bf16), on one device:
TP1 is the whole model; at TP > 1 one rank's share of it. Paths and baselines are in
benchmarks/prologue_paths.py, how a call is timed in benchmarks/kernel_timing.py, the bytes of a
call in benchmarks/prologue_settings.py. Each path is compared with the reference before it is
timed, and is not timed where it is wrong.

Ranks of a group are only ever virtual here, all in one launch on one device: the difference to
the same grid without the exchange is what the protocol costs on a chip. No figure of this script
is one of several GPUs.

--cpu compares the reference with in-tree's steps written in PyTorch, on one thread, since neither
our kernels nor in-tree's run there. It says nothing of a GPU.

Writes results/tp_qknorm_<device>.json and .png. docs/benchmarks-kernels.md says what the columns
mean and how to carry the baselines to a machine without SGLang.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import common, kernel_timing, prologue_aims, prologue_plot
from benchmarks.kernel_timing import COLD, EAGER, HOT, PROCESS, WALL
from benchmarks.prologue_aims import Row
from benchmarks.prologue_paths import (
    BASELINES,
    WHAT,
    NotTimed,
    Ready,
    compile_ahead,
    paths,
    ready,
)
from benchmarks.prologue_settings import CASES, PROLOGUE, Setting

TOKENS = (1, 2, 8, 32, 64, 128, 512, 2048, 8192, 16384)
CPU_TOKENS = (1, 16, 128)
TPS = (1, 2, 4, 8, 16)
#: |ours - reference| / |reference|: half of bf16's 2**-8 unit is 2e-3 at most, in-tree rounds three
#: times on its way; of FP8 (e4m3) half a unit is 6e-2 at most. A wrong sum or head is off by 1e-1.
MOST_ERROR = {"prologue": 1e-2, "prologue-fp8": 6e-2, "norm": 1e-2}


def settings(
    device: torch.device, cases: list[str], tps: list[int], tokens: list[int]
) -> list[Setting]:
    """What is measured. At TP > 1, unless asked for by name, the whole prologue alone.

    Each case of each size is a kernel of its own to compile, and they differ little there.
    """
    return [
        Setting(CASES[case], count, tp, device)
        for case in cases or CASES
        for tp in tps
        if tp == 1 or case == PROLOGUE.name or case in cases
        for count in tokens
    ]


def measure(setting: Setting, names: Iterable[str], bandwidth: float, replays: int) -> list[Row]:
    """The rows of the named paths on one setting; "refuses" says why where one has no times."""
    found = [prepared(name, setting) for name in names]
    able = [(row, call) for row, call in found if call is not None]
    if setting.device.type == "cuda":
        for row, call in able:
            try:
                row["microseconds"] = kernel_timing.rounded(on_gpu(call, setting.device, replays))
            except kernel_timing.Uncapturable as refusal:
                row["refuses"] = f"no CUDA graph holds it: {refusal}"
    else:
        several = kernel_timing.in_turn([call.work for _, call in able])
        for (row, _), times in zip(able, several, strict=True):
            row["microseconds"] = kernel_timing.rounded(times)
    for row, _ in able:
        if "microseconds" in row:
            prologue_aims.add_rates(row, bandwidth)
    return [row for row, _ in found]


def on_gpu(call: Ready, device: torch.device, replays: int) -> kernel_timing.Times:
    """Hot and cold, or, for what no graph can hold, call by call."""
    if not call.graph:
        return kernel_timing.eager(call.work)
    return kernel_timing.time_call(call.work, device, replays=replays)


def prepared(path: str, setting: Setting) -> tuple[Row, Ready | None]:
    """A path's row, not yet timed, and the call to time, if it can be run and is right."""
    row: Row = {
        "case": setting.case.name,
        "tp": setting.tp,
        "tokens": setting.tokens,
        "path": path,
    }
    try:
        call = ready(path, setting)
    except NotTimed as refusal:
        return row | {"refuses": str(refusal)}, None
    row |= {"bytes": call.moved, "error": call.error}
    if call.error is not None and not call.error <= MOST_ERROR[setting.case.name]:
        return row | {"refuses": f"wrong: {call.error:.1e} off the reference"}, None
    return row, call


def table(rows: list[Row], case: str, tp: int) -> Table:
    """One line for each path and number of tokens of a case and group size."""
    kinds = [
        kind
        for kind in (HOT, COLD, EAGER, WALL, PROCESS)
        if any(kind in row.get("microseconds", {}) for row in rows)
    ]
    rated = next((kind for kind in (COLD, PROCESS) if kind in kinds), HOT)
    found = Table(
        title=f"{CASES[case].what}, TP{tp}; microseconds, median; rates and ratios {rated}",
        title_justify="left",
        box=box.SIMPLE,
    )
    mine = [row for row in rows if (row["case"], row["tp"]) == (case, tp)]
    baselines = [b for b in BASELINES if any(row["path"] == b for row in mine)]
    figures = [*kinds, "GB/s", "of copy", *(f"x {name}" for name in baselines)]
    found.add_column("tokens", justify="right")
    found.add_column("path")
    for name in figures:
        found.add_column(name, justify="right")
    for row in sorted(mine, key=lambda row: row["tokens"]):
        start = (str(row["tokens"]), row["path"])
        if "refuses" in row:
            found.add_row(*start, "refuses")
            continue
        ratios = row.get("ratio", {})
        found.add_row(
            *start,
            *(_figure(row["microseconds"].get(kind, {}).get("median"), ".2f") for kind in kinds),
            _figure(row["gbps"].get(rated), ",.3g" if row["gbps"].get(rated, 0) < 100 else ",.0f"),
            _figure(row["copy_share"].get(rated), ".0%"),
            *(_figure(ratios.get(name, {}).get(rated), ".2f") for name in baselines),
        )
    return found


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def show(rows: list[Row], aims: list[prologue_aims.Aim], console: Console) -> None:
    """Print the tables, why paths have no times, and the aims."""
    for case, tp in dict.fromkeys((row["case"], row["tp"]) for row in rows):
        console.print(table(rows, case, tp))
    refusals = {f"{row['path']}: {row['refuses']}": None for row in rows if "refuses" in row}
    for line in refusals:
        console.print(line, soft_wrap=True, markup=False)
    for aim in aims:
        verdict = {True: "met", False: "NOT MET", None: "not measured"}[aim.met]
        console.print(f"{verdict}: {aim.name}: {aim.asked}; {aim.found}", soft_wrap=True)


def main(
    cpu: Annotated[bool, typer.Option("--cpu", help="Compare what runs without a GPU.")] = False,
    tokens: Annotated[list[int] | None, typer.Option(help="Repeatable.")] = None,
    tp: Annotated[list[int] | None, typer.Option(help="1, 2, 4, 8, 16; repeatable.")] = None,
    case: Annotated[list[str] | None, typer.Option(help=f"{', '.join(CASES)}.")] = None,
    path: Annotated[list[str] | None, typer.Option(help="As in the table; repeatable.")] = None,
    replays: Annotated[int, typer.Option(help="Of each graph.")] = kernel_timing.REPLAYS,
    results: Annotated[Path, typer.Option(help="Folder of what is written.")] = common.RESULTS,
) -> None:
    """Measure, print the tables, write the JSON and its plot."""
    console = Console(width=max(Console().width, 140))
    if unknown := set(case or ()) - set(CASES):
        raise typer.BadParameter(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    device = kernel_timing.device_of_run(cpu)
    bandwidth = kernel_timing.copy_bandwidth(device)
    wanted = settings(
        device,
        case or [],
        tp or list((1,) if cpu else TPS),
        tokens or list(CPU_TOKENS if cpu else TOKENS),
    )
    rows: list[Row] = []
    with torch.inference_mode(), console.status("compiling") as status:
        compile_ahead([(name, s) for s in wanted for name in paths(s) if not path or name in path])
        for setting in wanted:
            status.update(f"{setting.case.name}, TP{setting.tp}, {setting.tokens} tokens")
            names = [name for name in paths(setting) if not path or name in path]
            rows += measure(setting, names, bandwidth, replays)
    prologue_aims.add_ratios(rows)
    aims = [] if cpu else prologue_aims.aims(rows)
    show(rows, aims, console)
    if results == common.RESULTS and (tokens or tp or case or path):
        console.print("nothing written: a part is not a result, unless --results names a folder")
        return
    written = common.write(
        f"tp_qknorm_{kernel_timing.slug(device)}",
        rows,
        folder=results,
        **header(device, bandwidth, replays, rows, aims),
    )
    console.print(written.name, prologue_plot.draw(written).name)


def header(
    device: torch.device,
    bandwidth: float,
    replays: int,
    rows: list[Row],
    aims: list[prologue_aims.Aim],
) -> dict[str, Any]:
    """What the JSON says beside the rows."""
    return {
        "device": kernel_timing.device_facts(device),
        "copy_gbps": round(bandwidth, 1),
        "replays": replays if device.type == "cuda" else kernel_timing.CPU_RUNS,
        "bytes": " ".join((Setting.bytes_moved.__doc__ or "").split()),
        "paths": {name: WHAT[name] for name in dict.fromkeys(row["path"] for row in rows)},
        "aims": [aim.as_row() for aim in aims],
    }


if __name__ == "__main__":
    typer.run(main)
