"""The plot of results/tp_qknorm_<device>.json: microseconds over tokens, and the exchange's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.kernel_timing import COLD, HOT, PROCESS
from benchmarks.prologue_aims import Row, exchange_costs
from benchmarks.prologue_paths import NO_EXCHANGE, VIRTUAL

#: (tokens, median, low, high) of a line.
Point = tuple[int, float, float, float]


def draw(path: Path) -> Path:
    """Draw the JSON file at `path`, beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    data = json.loads(path.read_text())
    rows = data["rows"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    costs = exchange_costs(rows, HOT)
    kinds = (HOT, COLD) if data["device"]["type"] == "cuda" else (PROCESS,)
    panels = [(case, kind) for case in cases for kind in kinds]
    count = len(panels) + bool(costs)
    columns = min(count, len(kinds) if len(kinds) > 1 else 3)
    lines = -(-count // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4.6 * columns, 3.4 * lines), layout="constrained", squeeze=False
    )
    flat = list(axes.flat)
    for axis, (case, kind) in zip(flat, panels, strict=False):
        times(axis, lines_of(rows, case, 1, kind))
        axis.set_title(
            f"{case}, TP1, {kind}{' L2' if kind in (HOT, COLD) else ' time'}", fontsize=9
        )
    if costs:
        exchange(flat[len(panels)], costs)
    for axis in flat[count:]:
        axis.remove()
    machine = f"{data['device']['name']}, {data['provenance']['date']}"
    figure.suptitle(f"attention prologue; {machine}", fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    pyplot.close(figure)
    return path.with_suffix(".png")


def lines_of(rows: Iterable[Row], case: str, tp: int, kind: str) -> dict[str, list[Point]]:
    """Path -> its points, by tokens; virtual ranks have a panel of their own."""
    lines: dict[str, list[Point]] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        found = row.get("microseconds", {}).get(kind)
        if found and (row["case"], row["tp"]) == (case, tp):
            if row["path"] in (VIRTUAL, NO_EXCHANGE):
                continue
            point = (row["tokens"], found["median"], found["low"], found["high"])
            lines.setdefault(row["path"], []).append(point)
    return lines


def times(axis: Any, lines: dict[str, list[Point]]) -> None:
    """Medians over tokens with the band from the 10th to the 90th percentile, both logarithmic."""
    for name, points in lines.items():
        tokens, medians, low, high = zip(*points, strict=True)
        (line,) = axis.plot(tokens, medians, marker="o", markersize=3, label=name)
        axis.fill_between(tokens, low, high, color=line.get_color(), alpha=0.2)
    axis.set_yscale("log")
    over_tokens(axis, "microseconds")
    axis.yaxis.set_major_formatter(_plain)
    axis.yaxis.set_minor_formatter(_leading)


def over_tokens(axis: Any, label: str) -> None:
    """Powers of two from left to right, in plain numbers."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(_plain)
    axis.set_xlabel("tokens", fontsize=8)
    axis.set_ylabel(label, fontsize=8)
    axis.tick_params(which="both", labelsize=7)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, frameon=False)


def _plain(value: float, place: int) -> str:
    return f"{value:g}"


def _leading(value: float, place: int) -> str:
    """Minor ticks at 2 and 5 times a power of ten alone."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def exchange(axis: Any, costs: dict[tuple[str, int, int], float]) -> None:
    """What the exchange adds on one device, a line for each group size."""
    for tp in sorted({tp for case, tp, _ in costs if case == "prologue"}):
        points = sorted((t, cost) for (case, size, t), cost in costs.items() if size == tp)
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"TP{tp}")
    axis.set_title("exchange among virtual ranks on one device, hot L2", fontsize=9)
    over_tokens(axis, "microseconds added")
