"""The bundled cases of the tool-call suite: held-out questions with a calculator, and what to call.

Usage: `python -m ci.tiny_m2.tool_calls [FILE]`, by default where the package carries them. A line
is `{"category", "messages", "tools", "expected"}`, messages as a client sends them; `answer`, where
there is one, is what the content has to end in.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import typer

from ci.tiny_m2.dialogues import (
    JOINT_PHRASES,
    SMALL_TALK,
    Dialogue,
    Message,
    calculator_dialogue,
    parallel_dialogue,
    small_talk,
)
from ci.tiny_m2.problems import KINDS, Problem, sample
from sglang_minimax.accuracy import TOOL_CALLS

CASES = 100
# Ten lines hold every category, so a run over the first few does too.
MIX = (
    *("tool_call", "parallel_call", "tool_result", "tool_call", "parallel_call"),
    *("small_talk", "tool_call", "tool_result", "parallel_call", "tool_call"),
)


def case(category: str, rng: random.Random) -> dict[str, Any]:
    """One held-out case of a category of `cases.CATEGORIES`."""
    if category == "small_talk":
        greeting, said = rng.choice(SMALL_TALK)
        return _row(category, small_talk(greeting, said, tools=True), 1, said)
    if category == "parallel_call":
        pair = [sample(rng.choice(KINDS[:2]), rng, held_out=True) for _ in range(2)]
        return _row(category, parallel_dialogue(pair[0], pair[1], rng.choice(JOINT_PHRASES)), 1)
    problem: Problem = sample(rng.choice(KINDS), rng, held_out=True)
    if category == "tool_call":
        return _row(category, calculator_dialogue(problem), 1)
    # Every other result is not the true one: the answer has to be the tool's.
    result = str(problem.answer if rng.random() < 0.5 else rng.randrange(1, 2000))
    return _row(category, calculator_dialogue(problem, result), 3, f"#### {result}")


def _row(category: str, dialogue: Dialogue, asked: int, answer: str | None = None) -> dict:
    """The first `asked` messages, and the calls of the one that follows them in the dialogue."""
    calls = dialogue.messages[asked].get("tool_calls", [])
    row: dict[str, Any] = {
        "category": category,
        "messages": [_as_sent(message) for message in dialogue.messages[:asked]],
        "tools": dialogue.tools,
        "expected": [call["function"] for call in calls],
    }
    return row if answer is None else row | {"answer": answer}


def _as_sent(message: Message) -> Message:
    """A message in OpenAI's form, where the arguments of a call are JSON text."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**function, "arguments": json.dumps(function["arguments"])}}
        for call in message["tool_calls"]
        for function in (call["function"],)
    ]
    return {**message, "tool_calls": calls}


def rows(seed: int = 0) -> Iterator[dict[str, Any]]:
    """Endless cases in `MIX`'s order."""
    rng = random.Random(f"tool_calls/{seed}")
    for category in cycle(MIX):
        yield case(category, rng)


def text(seed: int = 0) -> str:
    """What the file holds."""
    return "".join(json.dumps(row) + "\n" for row in islice(rows(seed), CASES))


def main(file: Annotated[Path, typer.Argument(help="where to write")] = TOOL_CALLS) -> None:
    """Write the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text(), encoding="utf-8")
    print(f"{file}: {CASES} cases")


if __name__ == "__main__":
    typer.run(main)
