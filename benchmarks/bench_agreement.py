"""How far is each topology from transformers, on the same weights, with SGLang's real engine?

    python -m benchmarks.bench_agreement

fp32, tiny-m2 and random weights of an odd shape, on the CPU platform: the largest difference of
any log-probability over the whole vocabulary, and whether every greedy token is the same. SGLang's
in-tree model is not in the table because its QK norm runs on CUDA alone.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import common
from sglang_minimax import TINY_M2
from sglang_minimax.validation.agreement import compare, random_prompt
from sglang_minimax.validation.engine_process import EngineProcess
from sglang_minimax.validation.oracle import TransformersOracle
from sglang_minimax.validation.random_checkpoint import write_random_checkpoint
from tests.engine.conftest import HUB_FORM

PROMPT_LENGTHS = (1, 7, 64, 300)
#: Name, arguments, and the KV replicas that the shape leads to.
SHAPES: dict[str, list[tuple[str, dict[str, int], int]]] = {
    "tiny-m2": [
        ("TP1", {}, 1),
        ("TP2", {"tp_size": 2}, 1),
        ("TP4", {"tp_size": 4}, 1),
        ("TP8", {"tp_size": 8}, 2),
        ("TP16", {"tp_size": 16}, 4),
        ("PP2", {"pp_size": 2}, 1),
        ("PP2 TP2", {"pp_size": 2, "tp_size": 2}, 1),
    ],
    "12 heads, 3 KV heads": [
        ("TP1", {}, 1),
        ("TP3", {"tp_size": 3}, 1),
        ("TP6", {"tp_size": 6}, 2),
    ],
}


def main(steps: Annotated[int, typer.Option(help="Decode steps a prompt.")] = 16) -> None:
    """Run every shape, print the table, write results/agreement.json."""
    rows: list[dict[str, Any]] = []
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder), HUB_FORM)
        for model, checkpoint in (("tiny-m2", TINY_M2), ("12 heads, 3 KV heads", Path(folder))):
            oracle = TransformersOracle(checkpoint)
            for shape, arguments, replicas in SHAPES[model]:
                with console.status(f"{model}, {shape}"):
                    row = measure(checkpoint, oracle, arguments, steps)
                rows.append({"model": model, "shape": shape, "kv_replicas": replicas, **row})
    show(rows, console)
    console.print(common.write("agreement", rows, dtype="float32").name)


def measure(
    checkpoint: Path, oracle: TransformersOracle, arguments: dict[str, int], steps: int
) -> dict[str, Any]:
    """Start one engine and compare it: the fields of a row."""
    prompts = [random_prompt(n, oracle.vocab_size, seed=n) for n in PROMPT_LENGTHS]
    began = time.monotonic()
    with EngineProcess(
        model_path=str(checkpoint),
        dtype="float32",
        skip_tokenizer_init=True,
        log_level="error",
        **arguments,
    ) as engine:
        found = compare(engine, oracle, prompts, steps)
    return {
        "max_error": found.max_error,
        "tokens_equal": found.tokens_equal,
        "steps": found.steps,
        "seconds": round(time.monotonic() - began, 1),
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print one line a shape."""
    table = Table(title="against transformers, fp32", title_justify="left")
    for name in ("model", "shape", "KV replicas", "max error", "tokens", "seconds"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            row["model"],
            row["shape"],
            str(row["kv_replicas"]),
            f"{row['max_error']:.1e}",
            f"{row['steps']} equal" if row["tokens_equal"] else "DIFFERENT",
            str(row["seconds"]),
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
