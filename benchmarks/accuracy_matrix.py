"""The cells of the accuracy matrix, and how one of them is run with SGLang's real engine.

A cell is a shape of ci/topologies.yaml with a dtype, with or without an Eagle3 draft, with or
without one of the planted mistakes of tests/engine/mistakes.py. Each starts an engine of its own.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from benchmarks.accuracy_judging import differences, is_within, verdict
from benchmarks.accuracy_questions import Asked
from sglang_minimax import TINY_M2, TINY_M2_EAGLE3
from sglang_minimax.accuracy.results import Score
from sglang_minimax.config import Architecture
from sglang_minimax.moe_exchange.rules import VARIABLE
from sglang_minimax.validation import hosts
from sglang_minimax.validation.engine_process import EngineFailed, EngineProcess
from sglang_minimax.validation.run import refusal, why_not_here
from sglang_minimax.validation.shapes import Shape, arguments, catalogue
from sglang_minimax.validation.subject import read_config
from tests.engine.mistakes import MISTAKES, PATIENCE, Mistake

Row = dict[str, Any]
FP32, EAGLE3, BF16, MISTAKE = PARTS = ("fp32", "eagle3", "bf16", "mistakes")
DRAFT: dict[str, Any] = {
    "speculative_algorithm": "EAGLE3",
    "speculative_draft_model_path": str(TINY_M2_EAGLE3),
    "speculative_num_steps": 3,
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 4,
}
#: What these change are the layers' outputs that a draft reads, and nothing without a draft.
OF_A_DRAFT = ("last_layer_not_captured", "captured_a_layer_early")
#: Seconds for an engine to start, and to answer everything; with a mistake, `PATIENCE`.
TIMEOUT = 300.0
#: How much a row keeps of why an engine ended.
_REASON = 240
#: Our own sentence; one of them only points at another.
_SENTENCE = re.compile(r"^sglang-minimax: (?!.*see the error above)(.+)", re.MULTILINE)
#: What a rank raises, what it logs before it leaves, and what a C++ library throws. Ranks that lose
#: a rank which ended complain about that, which says nothing.
_ERROR = re.compile(
    r"\b(\w+(?:Error|Exception): (?!.*Connection (?:closed|reset) by peer).*)"
    r"|(?<=\] )(rank \d+: .*)"
    r"|^ *what\(\):\s+(?:\[[^]]*\] )?(.*)",
    re.MULTILINE,
)
_NO_ANSWER = re.compile(r"no answer within (\d+ s)")


@dataclass(frozen=True)
class Cell:
    """One engine: `part` of the matrix, its shape, and the mistake in it."""

    part: str
    shape: Shape
    mistake: Mistake | None = None

    @property
    def id(self) -> str:
        """What a log knows it by."""
        return " ".join((self.part, self.mistake.name if self.mistake else self.shape.name))

    @property
    def has_draft(self) -> bool:
        """Whether the engine drafts tokens with Eagle3."""
        of_a_draft = self.mistake is not None and self.mistake.name in OF_A_DRAFT
        return self.part == EAGLE3 or of_a_draft

    @property
    def dtype(self) -> str:
        """Of weights and activations, in SGLang's words."""
        return "bfloat16" if self.part == BF16 else "float32"

    def blank(self) -> Row:
        """What is known before it ran."""
        return {
            "id": self.id,
            "part": self.part,
            "shape": self.shape.name,
            "mistake": self.mistake.name if self.mistake else None,
            "eagle3": self.has_draft,
            "dtype": self.dtype,
        }


def cells() -> Iterator[Cell]:
    """The whole matrix: every shape of the list in each part, and the mistakes."""
    for part in (FP32, EAGLE3):
        yield from (Cell(part, shape) for shape in catalogue().shapes)
    for mistake in MISTAKES:
        found = catalogue().find(mistake.topology)
        assert found is not None, f"{mistake.topology} is not in the list"
        yield Cell(MISTAKE, found, mistake)
    yield from (Cell(BF16, shape) for shape in catalogue().shapes)


def why_not(cell: Cell) -> str | None:
    """Why a cell is not run, in one sentence; None where it is."""
    arch = Architecture.from_config(read_config(TINY_M2))
    if reason := refusal(cell.shape, arch) or why_not_here(cell.shape.sizes()):
        return reason
    if cell.has_draft and cell.shape.sizes().pp > 1:
        return "drafts read the outputs of layers that stages share, and are refused"
    return None


def run(cell: Cell, asked: Asked) -> Row:
    """Start the cell's engine, ask everything at once, judge. Never raises for an engine's end."""
    row = cell.blank()
    if reason := why_not(cell):
        return {**row, "status": "not run", "reason": reason}
    began = time.monotonic()
    try:
        with engine(cell, timeout=PATIENCE if cell.mistake else TIMEOUT) as started:
            replies = started.generate_together(asked.requests())
    except EngineFailed as error:
        row |= {"status": "ends", "reason": why_it_ended(error)}
    else:
        row |= judged(cell, asked, [reply["output_ids"] for reply in replies])
        if cell.has_draft:
            row["accept_length"] = fmean(r["meta_info"]["spec_accept_length"] for r in replies)
    return {**row, "seconds": round(time.monotonic() - began, 1)}


def engine(cell: Cell, **more: Any) -> AbstractContextManager[EngineProcess]:
    """The cell's engine with tiny-m2, or the first host of it where there are two."""
    start = hosts.two_hosts if cell.shape.sizes().nodes == 2 else EngineProcess
    return start(
        before=partial(_prepare, cell.shape.exchange, cell.mistake.plant if cell.mistake else None),
        model_path=str(TINY_M2),
        dtype=cell.dtype,
        skip_tokenizer_init=True,
        log_level="info",
        **(DRAFT if cell.has_draft else {}),
        **arguments(cell.shape),
        **cell.shape.arguments,
        **more,
    )


def judged(cell: Cell, asked: Asked, replies: Sequence[Sequence[int]]) -> Row:
    """Counts and status of a cell's replies, as token ids in the order of the questions.

    fp32, with a draft or without: "ok" where each is the reference's, or leaves it at a near tie;
    else "differs". bf16: "ok" where the accuracy is in the reference's interval; else "outside".
    A mistake: "answers", whatever it answers.
    """
    score = asked.score(replies)
    same = sum(list(a) == list(b) for a, b in zip(asked.references, replies, strict=True))
    row: Row = {"right": score.right, "asked": score.asked, "same_replies": same}
    if cell.part == MISTAKE:
        return {**row, "status": "answers"}
    if cell.part == BF16:
        within = is_within(score, asked.score(asked.references))
        return {**row, "status": "ok" if within else "outside"}
    return {**row, **verdict(differences(asked.references, replies, asked.margin), asked.near_tie)}


def falls_short(row: Row) -> bool:
    """Whether a row makes the run fail. A mistake may cost what it likes."""
    return row["part"] != MISTAKE and row["status"] not in ("ok", "not run")


def reference_score(asked: Asked) -> Score:
    """transformers' own accuracy on the questions, fp32."""
    return asked.score(asked.references)


def _prepare(path: str | None, plant: Callable[[], None] | None) -> None:
    """In the engine's process: the shape's path to the experts, and the mistake."""
    if path is not None:
        os.environ[VARIABLE] = path
    if plant is not None:
        plant()


def why_it_ended(error: EngineFailed) -> str:
    """Our own sentence in the log; else its first error, a rank's cause before what follows it.

    An engine that we stopped because it did not answer `hangs`, whatever it had said before.
    """
    first, *_ = str(error).splitlines()
    hung = _NO_ANSWER.search(first)
    said = _SENTENCE.search(error.log) or _ERROR.search(error.log)
    reason = next(filter(None, said.groups())) if said else "" if hung else first
    if hung:
        reason = f"hangs, stopped after {hung[1]}" + (f": {reason}" if reason else "")
    return reason[:_REASON]
