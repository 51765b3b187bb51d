"""The bundled set's first rows with replies as models write them, and a run over them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang_minimax.accuracy import ARITHMETIC, run_gsm8k
from sglang_minimax.accuracy.results import Result
from sglang_minimax.accuracy.settings import Gsm8kSettings
from tests.accuracy.conftest import Serve
from tests.accuracy.fake_server import Body, Said, question_of

ROWS = [json.loads(line) for line in (ARITHMETIC / "test.jsonl").open()][:14]
RIGHT = {row["question"]: row["answer"].rpartition("#### ")[2] for row in ROWS}
NUMBER = {row["question"]: i for i, row in enumerate(ROWS)}


def replies(n: str) -> list[Said]:
    """Replies to a question whose answer is n, as models write them, one for each row."""
    return [
        Said(f"{n}\n#### {n}"),
        Said(f"The answer is {n}."),  # flexible alone
        Said(f"#### {int(n) + 1}"),
        Said(f"#### 7\nNo, wait.\n#### {n}"),  # strict takes the first, flexible the last
        Said(f"#### {n}\nThat was step 1"),  # strict alone
        Said(f"${n}.00"),
        Said(f"#### {n}.", reasoning="no"),
        Said("I do not know.", reasoning=f"#### {n}"),  # a thought is no answer
        Said("", reasoning=f"so it is {n}", finish_reason="length"),
        Said(f"so far: {n}", finish_reason="length"),
        Said(f"1+1=2\n</think>\n\n#### {n}"),  # a server without a reasoning parser
        Said(f"{n} is it\n</think>\n\nno"),
        Said(f"#### {n}\nQuestion: 1+1?\nAnswer: #### 2"),  # goes on where it should have ended
        Said("", finish_reason="stop"),
    ]


def answer(body: Body) -> Said:
    """The reply of a question's row. A completion stops where the server is told to, a chat not."""
    question = question_of(body)
    said = replies(RIGHT[question])[NUMBER[question]]
    if "prompt" not in body:
        return said
    text = said.text.partition("Question:")[0] if "Question:" in body["stop"] else said.text
    return replace(said, text=text, reasoning="")


def shown_to_the_evaluator(prompt: str) -> str:
    """What lm-eval's filters have to see of that reply: no thought, nothing behind a stop."""
    body = {"messages": json.loads(prompt)} if prompt.startswith("[") else {"prompt": prompt}
    text = answer({**body, "stop": ["Question:"]}).text
    if "messages" in body:
        text = text.rpartition("</think>")[2].partition("Question:")[0]
    return text


def settings(server: Any, **changes: Any) -> Gsm8kSettings:
    """A run over those rows."""
    values = {"url": server.url, "limit": len(ROWS), "shots": 2, "retries": 0, "timeout": 20.0}
    return Gsm8kSettings(**{"prompt": None, **values, **changes})


@dataclass(frozen=True)
class Ran:
    """A run and its log."""

    result: Result
    entries: dict[str, dict[str, Any]]
    asked: list[Body]


def run(serve: Serve, log: Path, **changes: Any) -> Ran:
    """Run against a fresh server."""
    log.unlink(missing_ok=True)
    server = serve(answer)
    result = run_gsm8k(settings(server, log=log, **changes))
    lines = [json.loads(line) for line in log.read_text().splitlines()][1:]
    return Ran(result, {line["id"]: line for line in lines}, server.asked)
