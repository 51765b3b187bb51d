"""Does every topology give the same answers, and what does each planted mistake cost?

    python -m benchmarks.bench_accuracy

Asks tiny-m2 the bundled arithmetic questions, in SGLang's real engine on the CPU platform: every
shape of ci/topologies.yaml in fp32, with an Eagle3 draft, and in bf16; then each mistake of
tests/engine/mistakes.py in a shape where it acts. The judge is transformers' greedy replies in
fp32. A run that was stopped goes on behind its last whole cell; `--fresh` begins again. Writes
results/accuracy_matrix.json and results/accuracy_matrix.png; exits with 1 where a shape falls
short. `--part` and `--only` run a selection, which is printed and not written.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import accuracy_matrix as matrix
from benchmarks import accuracy_plot, accuracy_table, common
from benchmarks.accuracy_questions import Asked
from sglang_minimax import TINY_M2, TINY_M2_EAGLE3
from sglang_minimax.accuracy import ARITHMETIC
from sglang_minimax.accuracy.journal import Journal
from sglang_minimax.errors import MinimaxError
from sglang_minimax.validation.engine_process import preload

LOG = Path("build/accuracy_matrix.jsonl")
NAME = "accuracy_matrix"
#: So many the committed results have. Every ten lines of the set hold each of its kinds, and
#: replies are compared token by token.
QUESTIONS = 50
BUNDLED_QUESTIONS = 200
ROOT = Path(__file__).parents[1]
#: What decides a cell's row beside model, draft and data.
CODE = (
    *("sglang_minimax/**/*.py", "jit_kernels/**/*.py", "tests/engine/mistakes*.py"),
    *(f"benchmarks/accuracy_{name}.py" for name in ("judging", "matrix", "questions")),
    "ci/topologies.yaml",
)


def main(
    questions: Annotated[
        int, typer.Option(min=1, max=BUNDLED_QUESTIONS, help="The first so many of the set.")
    ] = QUESTIONS,
    part: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(matrix.PARTS)}; repeatable.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="A shape of the list; repeatable.")] = None,
    fresh: Annotated[bool, typer.Option(help="Do not go on with a run that was stopped.")] = False,
    log: Annotated[Path, typer.Option(help="Where a run that is stopped goes on.")] = LOG,
    results: Annotated[Path, typer.Option(help="Where to write.")] = common.RESULTS,
) -> None:
    """Run the matrix, print each cell as it ends, write JSON and the plot."""
    console = Console()
    wanted = chosen(part, only, console)
    if fresh:
        log.unlink(missing_ok=True)
    # Computing on several threads before a fork would leave the children without them.
    torch.set_num_threads(1)
    with console.status("importing SGLang, and asking transformers"):
        logging.disable(logging.WARNING)
        preload()
        logging.disable(logging.NOTSET)
        asked = Asked(questions)
        heading = {"suite": NAME, "questions": questions, **fingerprints()}
        reference = matrix.reference_score(asked)
    console.print(f"transformers, fp32: {reference.right} of {reference.asked} right")
    try:
        with Journal(log, heading) as journal:
            rows = run(wanted, asked, journal, console)
    except MinimaxError as error:
        raise SystemExit(f"{error} Or use --fresh, which begins again.") from error
    data = {"reference": reference.as_dict(), "near_tie": asked.near_tie, "rows": rows}
    show(data, console)
    if not part and not only:
        more = {key: value for key, value in data.items() if key != "rows"}
        accuracy_plot.draw(common.write(NAME, rows, folder=results, **more))
    short = [row for row in rows if matrix.falls_short(row)]
    for row in short:
        console.print(f"falls short: {describe(row)}", markup=False)
    raise typer.Exit(1 if short else 0)


def chosen(
    part: Sequence[str] | None, only: Sequence[str] | None, console: Console
) -> list[matrix.Cell]:
    """The cells that were asked for; leaves with 2 and a sentence for a name that is none."""
    everything = list(matrix.cells())
    shapes = {cell.shape.name for cell in everything}
    for given, known, what in ((part, matrix.PARTS, "part"), (only, shapes, "shape")):
        if unknown := set(given or ()) - set(known):
            text = f"there is no {what} {', '.join(sorted(unknown))}; use {' '.join(sorted(known))}"
            console.print(text, markup=False)
            raise typer.Exit(2)
    return [
        cell
        for cell in everything
        if (not part or cell.part in part) and (not only or cell.shape.name in only)
    ]


def fingerprints() -> dict[str, str]:
    """What a run that goes on must have in common with the one before."""
    files = {
        "model": TINY_M2 / "model.safetensors",
        "draft": TINY_M2_EAGLE3 / "model.safetensors",
        "data": ARITHMETIC / "test.jsonl",
    }
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    return {**hashes, "code": code_sha256(ROOT), "sglang": common.version("sglang")}


def code_sha256(root: Path) -> str:
    """A hash of the files of CODE with their places, so that a log holds rows of one build."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in CODE for path in root.glob(pattern)}):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        found.update(f"{path.relative_to(root)} {content}\n".encode())
    return found.hexdigest()


def run(
    wanted: Sequence[matrix.Cell], asked: Asked, journal: Journal, console: Console
) -> list[dict[str, Any]]:
    """Every cell that the log does not hold yet; all rows, in the order of the matrix."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[at]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("cells", total=len(wanted), at="")
        for cell in wanted:
            progress.update(task, at=cell.id)
            if cell.id not in journal.entries:
                journal.add(matrix.run(cell, asked))
                console.print(describe(journal.entries[cell.id]), markup=False, soft_wrap=True)
            progress.advance(task)
    return [journal.entries[cell.id] for cell in wanted]


def describe(row: dict[str, Any]) -> str:
    """One line."""
    said = (
        row.get("reason") or f"{row['right']} of {row['asked']} right, same {row['same_replies']}"
    )
    ties = f", near ties {len(row['near_ties'])}" if row.get("near_ties") else ""
    return f"{row['id']:56} {row['status']:8} {row.get('seconds', 0):5.1f} s  {said}{ties}"


def show(data: dict[str, Any], console: Console) -> None:
    """Both tables and the notes."""
    for head, lines in (
        (accuracy_table.SHAPES_HEAD, accuracy_table.shapes(data["rows"])),
        (accuracy_table.MISTAKES_HEAD, accuracy_table.mistakes(data["rows"])),
    ):
        if lines:
            table = Table(*head)
            for line in lines:
                table.add_row(*line)
            console.print(table, markup=False)
    console.print(accuracy_table.notes(data), markup=False)


if __name__ == "__main__":
    typer.run(main)
