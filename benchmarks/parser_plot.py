"""The plot of results/parsers.json: CPU seconds over the argument's length, both logarithmic."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from benchmarks.parser_table import CONTENT, Row, size

COLORS = {"in-tree": "C1", "ours": "C0"}
STYLES = ("-", "--", ":")
#: What of a row is drawn, its title, its unit, and how many of them a second has.
PANELS = (
    ("cpu_seconds", "the whole reply", "CPU seconds", 1.0),
    ("longest_increment", "longest increment", "CPU milliseconds", 1e3),
)


def draw(path: Path) -> Path:
    """Draw the JSON file at `path`, beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    data = json.loads(path.read_text())
    rows = [row for row in data["rows"] if row["content"] == CONTENT] or data["rows"]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, (name, title, unit, scale) in zip(axes, PANELS, strict=True):
        panel(axis, rows, name, scale)
        axis.set_title(title, fontsize=9)
        axis.set_ylabel(unit, fontsize=8)
    machine = f"{data['provenance']['machine']}, {data['provenance']['date']}"
    figure.suptitle(f"one string argument of a tool call, streamed; {machine}", fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    pyplot.close(figure)
    return path.with_suffix(".png")


def panel(axis: Any, rows: list[Row], name: str, scale: float) -> None:
    """A line for each parser and chunk; a run that was stopped ends where it was stopped."""
    chunks = list(dict.fromkeys(row["chunk"] for row in rows))
    for parser, color in COLORS.items():
        for chunk, style in zip(chunks, itertools.cycle(STYLES), strict=False):
            mine = [row for row in rows if (row["parser"], row["chunk"]) == (parser, chunk)]
            places = [
                (row["stopped_at"] or row["characters"], scale * row[name]["median"])
                for row in mine
            ]
            label = f"{parser}, {chunk}-character chunks"
            axis.plot(*zip(*sorted(places), strict=True), style, color=color, label=label)
            for row, place in zip(mine, places, strict=True):
                stopped = row["stopped_at"] is not None
                axis.plot(*place, "x" if stopped else "o", color=color, markersize=5)
                if stopped:
                    axis.annotate("stopped", place, (0, 6), **_SMALL)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    sizes = sorted({row["characters"] for row in rows})
    axis.set_xticks(sizes, [size(each) for each in sizes])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    axis.tick_params(which="both", labelsize=7)
    axis.grid(alpha=0.3)
    axis.margins(x=0.08, y=0.15)
    axis.legend(fontsize=7, frameon=False)


_SMALL: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "ha": "center"}
