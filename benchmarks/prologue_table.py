"""The README's rows of the attention prologue, from the result files of GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.kernel_timing import COLD, HOT
from benchmarks.prologue_aims import timed
from benchmarks.prologue_paths import CUDA, IN_TREE, TRITON

TOKENS = (1, 8, 64, 128, 2048, 8192)
HEAD = (
    *("tokens", "SGLang in-tree, hot / cold L2", "`cuda`", "`triton`", "in-tree / `cuda`"),
    "`cuda`, of copy bandwidth",
)
NOT_YET = (
    "Not yet measured on hardware: no GPU was at hand. `python -m benchmarks.bench_tp_qknorm` "
    "measures it on one ([how](docs/benchmarks-kernels.md))."
)


def gpu_results(folder: Path = RESULTS, stem: str = "tp_qknorm") -> list[Path]:
    """The result files of GPUs, by name; the one of `--cpu` is none."""
    return sorted(path for path in folder.glob(f"{stem}_*.json") if path.stem != f"{stem}_cpu")


def rows(data: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line for each number of tokens: microseconds of the whole prologue at TP1."""
    known = timed(data["rows"])
    lines = []
    for tokens in TOKENS:
        found = {path: known.get(("prologue", 1, tokens, path)) for path in (IN_TREE, CUDA, TRITON)}
        ours = found[CUDA]
        if ours is None:
            continue
        ratio = ours.get("ratio", {}).get(IN_TREE)
        times = [
            " / ".join(f"{row['microseconds'][kind]['median']:.1f}" for kind in (HOT, COLD)) + " us"
            if row
            else "not run"
            for row in found.values()
        ]
        ratios = " / ".join(f"{ratio[kind]:.1f}x" for kind in (HOT, COLD)) if ratio else ""
        lines.append((str(tokens), *times, ratios, f"{ours['copy_share'][COLD]:.0%}"))
    return lines


def aims(data: dict[str, Any]) -> str:
    """The aims as sentences of a list."""
    verdicts = {True: "met", False: "**not met**", None: "not measured"}
    return "\n".join(
        f"- {aim['name']}: {aim['asked']}: {verdicts[aim['met']]} ({aim['found']})"
        if aim["met"] is not None
        else f"- {aim['name']}: {aim['asked']}: not measured"
        for aim in data["aims"]
    )


def read(path: Path) -> dict[str, Any]:
    """A result file."""
    return json.loads(path.read_text())
