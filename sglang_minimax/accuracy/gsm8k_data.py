"""GSM8K-shaped rows from a file, a folder or the hub, checked line by line. No evaluator."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sglang_minimax.accuracy import ARITHMETIC
from sglang_minimax.accuracy.errors import AccuracyError

Row = dict[str, str]

#: What the bundled set is called where a path or a hub name is asked for.
BUNDLED = "arithmetic"

#: The columns of a row.
KEYS = ("question", "answer")

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|gsm8k")
_ANSWER = re.compile(r"#### *-?[0-9][0-9,.]*\s*$")


def load(data: str, shots: int) -> dict[str, list[Row]] | None:
    """Rows by split, `test` and `train`, from a path; None where `data` is a hub name.

    A file is the test split, and `train.jsonl` beside it the other. Without one there are no shots.
    Raises AccuracyError for data that is not there or not GSM8K's, with the line.
    """
    path = ARITHMETIC if data == BUNDLED else Path(data)
    if not path.exists():
        if _HUB_NAME.fullmatch(data):
            return None
        raise AccuracyError(
            f"there is no {data}; give a JSONL file, a folder with test.jsonl, {BUNDLED} for the "
            "bundled set, or a hub name such as openai/gsm8k."
        )
    test = path / "test.jsonl" if path.is_dir() else path
    if not test.exists():
        raise AccuracyError(f"{path} holds no test.jsonl; give the file itself.")
    train = test.parent / "train.jsonl"
    if shots and not train.exists():
        raise AccuracyError(
            f"{shots} shots come from {train}, which does not exist; put it there or ask without "
            "shots."
        )
    splits = {"test": rows(test), "train": rows(train) if shots else []}
    check_shots(len(splits["train"]), shots, str(train))
    _check_apart(splits, str(train))
    return splits


def check_shots(available: int, shots: int, where: str) -> None:
    """Raise AccuracyError where there are fewer examples than shots."""
    if available < shots:
        raise AccuracyError(f"{where} has {available} examples; ask with so many shots or fewer.")


def _check_apart(splits: dict[str, list[Row]], where: str) -> None:
    """Raise AccuracyError where an example is a question too: a shot would show its answer."""
    examples = {_texts(row) for row in splits["train"]}
    if both := sum(_texts(row) in examples for row in splits["test"]):
        raise AccuracyError(
            f"{where} holds {both} of the questions with their answers, which shots would show; "
            "take them out, or ask without shots."
        )


def _texts(row: Row) -> tuple[str, ...]:
    return tuple(row[key] for key in KEYS)


def rows(path: Path) -> list[Row]:
    """The rows of a JSONL file. Raises AccuracyError with the first line that is none."""
    found = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AccuracyError(f"{path} cannot be read: {error}.") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            found.append(_row(line, f"line {number} of {path}"))
    if not found:
        raise AccuracyError(f"{path} holds no question.")
    return found


def _row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        raise AccuracyError(f"{where} is no JSON; GSM8K has one object a line.") from None
    if not isinstance(row, dict):
        raise AccuracyError(f'{where} is no object like {{"question": ..., "answer": ...}}.')
    for name in KEYS:
        if not isinstance(row.get(name), str):
            raise AccuracyError(f"{where} has no text {name!r}, as GSM8K has.")
    if not _ANSWER.search(row["answer"]):
        raise AccuracyError(f"the answer in {where} does not end in '#### ' and a number.")
    return {"question": row["question"], "answer": row["answer"]}
