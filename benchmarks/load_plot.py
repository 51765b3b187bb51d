"""The plot of results/load.json: seconds and bytes of a rank, in-tree beside ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LOADERS = ("in-tree", "ours")


def draw(path: Path) -> Path:
    """Draw the JSON file at `path`, beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    data = json.loads(path.read_text())
    panels: tuple[tuple[str, str, Callable[[Row], float]], ...] = (
        ("names", "CPU seconds, warm files", lambda r: r["warm"]["cpu_seconds"]["median"]),
        ("bytes", "seconds, cold files", lambda r: r["cold"]["seconds"]["median"]),
        ("bytes", "MB from the disk", lambda r: r["cold"]["storage_bytes"]["median"] / 1e6),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for axis, (checkpoint, label, value) in zip(axes, panels, strict=True):
        rows = [row for row in data["rows"] if row["checkpoint"] == checkpoint]
        bars(axis, rows, value)
        axis.set_ylabel(label)
        tensors = data["checkpoints"][checkpoint]
        size = f"{tensors['tensors']:,} tensors, {tensors['bytes'] / 1e9:.1f} GB"
        axis.set_title(f"{checkpoint}: {size}", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    machine = f"{data['provenance']['machine']}, {data['provenance']['date']}"
    figure.suptitle(f"what loading costs rank 0; {machine}", fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    return path.with_suffix(".png")


def bars(axis: Any, rows: list[Row], value: Callable[[Row], float]) -> None:
    """One pair of bars a topology; a loader that refuses has none, and says so."""
    names = list(dict.fromkeys(row["topology"] for row in rows))
    for offset, loader in zip((-0.2, 0.2), LOADERS, strict=True):
        mine = {row["topology"]: row for row in rows if row["loader"] == loader}
        heights = [value(mine[n]) if "cold" in mine.get(n, {}) else 0.0 for n in names]
        drawn = axis.bar([i + offset for i in range(len(names))], heights, 0.38, label=loader)
        texts = [(f"{h:.0f}" if h >= 100 else f"{h:.2g}") if h else "refuses" for h in heights]
        axis.bar_label(drawn, texts, fontsize=7)
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.margins(y=0.12)
