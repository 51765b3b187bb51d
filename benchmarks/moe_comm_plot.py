"""The plot of results/moe_comm.json: bytes by topology and way, and the model's times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.moe_comm_cases import DECODE, OURS, PREFILL, Row
from benchmarks.moe_comm_table import launches

PARTS = {"attention": "C7", "gather": "C0", "combine": "C2"}
MODEL = "the model's microseconds a layer: NOT MEASURED"


def draw(path: Path) -> Path:
    """Draw the JSON file at `path`, beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    data = json.loads(path.read_text())
    loads = (DECODE, PREFILL)
    bars = [distinct(data["rows"], load) for load in loads]
    height = 0.19 * max(map(len, bars)) + 1.4
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 2 * height), layout="constrained")
    for (left, right), load, rows in zip(axes, loads, bars, strict=True):
        stacked(left, rows)
        left.set_title(f"{load}: bytes that reach a rank, a token a layer (arithmetic)", fontsize=9)
        modelled(right, rows)
        right.set_title(f"{load}: {MODEL}", fontsize=9)
    axes[0][0].legend(fontsize=7, frameon=False)
    stamp = data["provenance"]
    figure.suptitle(f"collectives of one layer, published shape; {stamp['date']}", fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    pyplot.close(figure)
    return path.with_suffix(".png")


def distinct(rows: list[Row], load: str) -> list[Row]:
    """A row for each topology, way and path: checkpoints of one path have the same bytes."""
    found: dict[tuple[str, str, str], Row] = {}
    for launch in launches(rows):
        for way, row in launch.items():
            if row["load"] == load:
                found.setdefault((row["topology"], way, row["path"]), row)
    return sorted(found.values(), key=lambda row: list(found).index(_key(row)))


def _key(row: Row) -> tuple[str, str, str]:
    return row["topology"], row["way"], row["path"]


def label(row: Row) -> str:
    """Topology and way; of ours the path."""
    return f"{row['topology']}, {row['way'] if row['way'] != OURS else 'ours: ' + row['path']}"


def stacked(axis: Any, rows: list[Row]) -> None:
    """A bar a row, in parts."""
    left = [0.0] * len(rows)
    for part, color in PARTS.items():
        widths = [row["bytes_a_token_a_layer"][part] for row in rows]
        axis.barh(range(len(rows)), widths, left=left, color=color, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    _lines(axis, rows)
    axis.set_xlabel("bytes", fontsize=8)


def modelled(axis: Any, rows: list[Row]) -> None:
    """A hatched bar to the least that the model allows, and a line to the most."""
    for index, row in enumerate(rows):
        low, high = row["model_microseconds_a_layer"]
        color = "C0" if row["way"] == OURS else "C1"
        axis.barh(index, low, color="white", edgecolor=color, hatch="////")
        axis.plot([low, high], [index, index], color=color)
    _lines(axis, rows)
    axis.set_xlabel("microseconds, by the model of benchmarks/links.py", fontsize=8)


def _lines(axis: Any, rows: list[Row]) -> None:
    axis.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=6)
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(axis="x", alpha=0.3)
