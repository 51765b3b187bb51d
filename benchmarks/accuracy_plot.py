"""The plot of results/accuracy_matrix.json: accuracy of every shape, and with each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sglang_minimax.accuracy.results import Score

MARKS = {"fp32": ("o", "fp32"), "eagle3": ("x", "fp32, Eagle3"), "bf16": ("D", "bf16")}


def draw(path: Path) -> Path:
    """Draw the JSON file at `path`, beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    data = json.loads(path.read_text())
    reference = Score(data["reference"]["right"], data["reference"]["asked"])
    mistakes = [row for row in data["rows"] if row["mistake"]]
    shapes = [row for row in data["rows"] if not row["mistake"]]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
    _shapes(axes[0], [row for row in shapes if "right" in row])
    _mistakes(axes[1], mistakes)
    for axis in axes:
        low, high = reference.interval
        axis.axvspan(100 * low, 100 * high, color="grey", alpha=0.2)
        axis.set_xlabel("right answers, %; the band is the reference's 95 % interval", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()
        axis.grid(alpha=0.3)
    machine = f"{data['provenance']['machine']}, {data['provenance']['date']}"
    figure.suptitle(f"tiny-m2, {reference.asked} questions; {machine}", fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=90)
    pyplot.close(figure)
    return path.with_suffix(".png")


def _percent(row: dict[str, Any]) -> float:
    return 100 * row["right"] / row["asked"]


def _shapes(axis: Any, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(row["shape"] for row in rows))
    for part, (marker, label) in MARKS.items():
        mine = [row for row in rows if row["part"] == part]
        places = [names.index(row["shape"]) for row in mine]
        axis.plot([_percent(row) for row in mine], places, marker, label=label, alpha=0.7)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlim(0, 103)
    axis.set_title("every shape", fontsize=9)
    axis.legend(fontsize=7, loc="lower left")


def _mistakes(axis: Any, rows: list[dict[str, Any]]) -> None:
    axis.barh(
        range(len(rows)), [_percent(row) if "right" in row else 0 for row in rows], color="C1"
    )
    for place, row in enumerate(rows):
        if "right" not in row:
            axis.text(1, place, "no answers", fontsize=7, va="center")
    axis.set_yticks(range(len(rows)), [row["mistake"] for row in rows])
    axis.set_xlim(0, 103)
    axis.set_title("planted mistakes", fontsize=9)
