"""Does each topology compute the same model: SGLang's in-tree class and ours, in the same engine?

    python -m benchmarks.bench_topologies

Every shape of ci/topologies.yaml with SGLang's real engine on the CPU platform, fp32, against
transformers on the same weights: the largest difference of any log-probability over the whole
vocabulary, whether each greedy token is equal, and how many layers of KV cache a pipeline stage
holds. The in-tree class runs with its two Triton norm kernels in PyTorch (benchmarks/intree.py).
Writes results/topologies.json and results/topologies.png.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import common
from benchmarks.intree import serve_intree
from sglang_minimax import TINY_M2
from sglang_minimax.moe_exchange.paths import SGLANG
from sglang_minimax.validation.agreement import compare, random_prompt
from sglang_minimax.validation.engine_process import EngineFailed, EngineProcess
from sglang_minimax.validation.oracle import TransformersOracle
from sglang_minimax.validation.run import ShapeResult, refusal, run_shape, why_not_here
from sglang_minimax.validation.session import Session
from sglang_minimax.validation.shapes import EXCHANGE, catalogue

MODELS = {"in_tree": serve_intree, "ours": None}
#: A rebalance every few steps, over two ranks with two spare slots.
EPLB: dict[str, Any] = {
    "tp_size": 2,
    "ep_size": 2,
    "ep_num_redundant_experts": 2,
    "enable_eplb": True,
    "eplb_algorithm": "deepseek",
    "eplb_rebalance_num_iterations": 12,
    "expert_distribution_recorder_buffer_size": 12,
}


def main(
    only: Annotated[list[str] | None, typer.Option(help="A shape of the list; repeatable.")] = None,
) -> None:
    """Run every shape with both models, print the table, write JSON and the plot."""
    console, rows = Console(), []
    with tempfile.TemporaryDirectory() as folder:
        session = Session(Path(folder))
        for shape in catalogue().shapes:
            if shape.exchange or (only and shape.name not in only):
                continue  # a path that is asked for has no counterpart in-tree
            subject = session.subject(shape.model)
            if refusal(shape, subject.arch) or why_not_here(shape.sizes()):
                continue
            row: dict[str, Any] = {"shape": shape.name, "why": shape.why}
            for model, before in MODELS.items():
                # The in-tree class knows SGLang's own path to the experts alone.
                path = f",{EXCHANGE}{SGLANG.name}" if before else ""
                place = shape.model_copy(update={"topology": shape.topology + path})
                with console.status(f"{shape.name}, {model}"):
                    row[model] = outcome(run_shape(place, subject, before=before, timeout=120))
            rows.append(row)
    if not only:
        row = {"shape": "tp=2,ep=2 --enable-eplb", "why": "experts move while requests run"}
        for model, before in MODELS.items():
            with console.status(f"EPLB, {model}"):
                row[model] = rebalance(before)
        rows.append(row)
    show(rows, console)
    if not only:
        common.write("topologies", rows, dtype="float32")
        draw(rows, common.RESULTS / "topologies.png")


def outcome(result: ShapeResult) -> dict[str, Any]:
    """What a row keeps of one run."""
    failed = result.max_error is None
    return {
        "max_error": result.max_error,
        "tolerance": result.tolerance,
        "tokens_equal": result.tokens_equal,
        "kv_layers": list(result.kv_layers),
        "collectives": result.collectives,
        "bytes_a_token": result.bytes_a_token,
        "seconds": round(result.seconds, 1),
        "ends": result.shortcomings[0] if failed and result.shortcomings else None,
        "shortcomings": list(result.shortcomings),
    }


def rebalance(before: Any) -> dict[str, Any]:
    """tiny-m2 with `--enable-eplb`: the difference from transformers, or how the engine ended."""
    oracle = TransformersOracle(TINY_M2)
    prompts = [random_prompt(5 + 9 * i, oracle.vocab_size, seed=70 + i) for i in range(4)]
    common_arguments = {"model_path": str(TINY_M2), "dtype": "float32", "log_level": "info"}
    try:
        with EngineProcess(
            before=before, skip_tokenizer_init=True, **common_arguments, **EPLB
        ) as engine:
            found = compare(engine, oracle, prompts, 16)
            moves = engine.log.count("rebalance end")
    except EngineFailed as error:
        lines = [line.strip() for line in error.log.splitlines() if "Error: " in line]
        last = next((line for line in lines if "gloo" not in line), "the engine ended")
        return {"max_error": None, "tokens_equal": None, "ends": last, "shortcomings": [last]}
    return {
        "max_error": found.max_error,
        "tokens_equal": found.tokens_equal,
        "ends": None,
        "rebalances": moves,
        "shortcomings": [],
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print one line a shape."""
    table = Table(title="against transformers, fp32", title_justify="left")
    for name in ("shape", "in-tree", "ours", "KV layers in-tree", "KV layers ours"):
        table.add_column(name)
    for row in rows:
        layers = [", ".join(map(str, row[m].get("kv_layers", []))) for m in MODELS]
        table.add_row(row["shape"], *(cell(row[model]) for model in MODELS), *layers)
    console.print(table)


def cell(found: dict[str, Any]) -> str:
    """The error, or how it ended."""
    if found["max_error"] is None:
        return f"ends: {found['ends']}"[:90]
    return f"{found['max_error']:.1e}" + ("" if found["tokens_equal"] else ", OTHER TOKENS")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Errors of both models beside what the arithmetic allows."""
    measured = [row for row in rows if row["ours"].get("tolerance")]
    names = [row["shape"] for row in measured]
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(names) + 1.4), layout="constrained")
    for model, marker, label in (
        ("in_tree", "o", "SGLang in-tree"),
        ("ours", "D", "sglang-minimax"),
    ):
        points = [
            (row[model]["max_error"], index)
            for index, row in enumerate(measured)
            if row[model]["max_error"] is not None
        ]
        axes.scatter(*zip(*points, strict=True), marker=marker, label=label, alpha=0.75)
    for index, row in enumerate(measured):
        if row["in_tree"]["max_error"] is None:
            axes.annotate(
                "in-tree ends",
                (row["ours"]["tolerance"], index),
                xytext=(8, 0),
                textcoords="offset points",
                fontsize=8,
                va="center",
            )
        axes.plot([row["ours"]["tolerance"]] * 2, [index - 0.4, index + 0.4], color="grey")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(1e-6, 1e-4)
    axes.set_xlabel("largest difference of a log-probability; the bar is what fp32 allows")
    figure.legend(loc="outside upper left", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    typer.run(main)
