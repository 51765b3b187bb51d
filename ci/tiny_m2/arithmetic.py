"""A GSM8K-format set that `tiny-m2` can solve: held-out questions, and training ones for the shots.

Usage: `python -m ci.tiny_m2.arithmetic [FOLDER]` writes `test.jsonl` and `train.jsonl`, by default
where the package carries them. A line is GSM8K's `{"question", "answer"}`; the answer is the worked
one, ending in `#### N`. Which questions the model answers has no part in the choice.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated

import typer

from ci.tiny_m2.dialogues import worked_answer
from ci.tiny_m2.problems import Kind, Problem, sample
from sglang_minimax.accuracy import ARITHMETIC

TEST_QUESTIONS = 200
TRAIN_QUESTIONS = 64
# Ten lines hold every kind, so a run over the first few does too. Word problems notice mistakes
# that sums of two digits do not, hence the largest share.
MIX: tuple[Kind, ...] = (
    *("word", "two_digit", "three_digit", "word", "three_digit"),
    *("two_digit", "word", "three_digit", "two_digit", "word"),
)


def questions(*, held_out: bool, seed: int = 0) -> Iterator[Problem]:
    """Endless problems of one side of the split, in `MIX`'s order, no question twice."""
    rng = random.Random(f"arithmetic/{'test' if held_out else 'train'}/{seed}")
    seen: set[str] = set()
    for kind in cycle(MIX):
        problem = sample(kind, rng, held_out=held_out)
        while problem.question in seen:
            problem = sample(kind, rng, held_out=held_out)
        seen.add(problem.question)
        yield problem


def lines(problems: Iterator[Problem], count: int) -> str:
    """The first `count` problems, one JSON object a line."""
    rows = (
        {"question": problem.question, "answer": worked_answer(problem).strip()}
        for problem in islice(problems, count)
    )
    return "".join(json.dumps(row) + "\n" for row in rows)


def files(seed: int = 0) -> dict[str, str]:
    """What the folder holds, by file name."""
    return {
        "test.jsonl": lines(questions(held_out=True, seed=seed), TEST_QUESTIONS),
        "train.jsonl": lines(questions(held_out=False, seed=seed), TRAIN_QUESTIONS),
    }


def main(folder: Annotated[Path, typer.Argument(help="where to write")] = ARITHMETIC) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf-8")
        print(f"{folder / name}: {text.count(chr(10))} questions")


if __name__ == "__main__":
    typer.run(main)
