"""A part of `make accuracy`: four shapes, Eagle3 at TP1 and TP2, and a planted mistake.

With ten questions bf16 could hardly fall short: it is asked by `make accuracy` alone.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.accuracy_matrix import (
    EAGLE3,
    FP32,
    MISTAKE,
    Cell,
    falls_short,
    judged,
    reference_score,
    run,
    why_not,
)
from benchmarks.accuracy_questions import Asked
from sglang_minimax.validation.shapes import Shape, catalogue
from tests.engine.mistakes import MISTAKES

QUESTIONS = 10
#: TP8 answers in test_eagle3.py.
SHAPES = ("tp=1", "tp=4", "tp=2,dp=2", "pp=2")


@pytest.fixture(scope="module")
def asked() -> Asked:
    """Every kind of question, and transformers' replies."""
    torch.set_num_threads(1)
    return Asked(QUESTIONS)


def shape(topology: str) -> Shape:
    found = catalogue().find(topology)
    assert found is not None
    return found


def test_the_reference_answers(asked: Asked) -> None:
    """Otherwise agreement with it would say nothing of answers; each reply ended by itself."""
    assert reference_score(asked).right >= QUESTIONS - 1
    end = asked.tokenizer.eos_token_id
    assert all(reply[-1] == end for reply in asked.references)
    # Well above what fp32 leaves open, a margin is a mistake.
    assert 1e-6 < asked.near_tie < 1e-3


@pytest.mark.parametrize(
    ("part", "topology"),
    [
        *((FP32, topology) for topology in SHAPES),
        *((EAGLE3, topology) for topology in ("tp=1", "tp=2")),
    ],
)
def test_a_shape_gives_the_references_answers(asked: Asked, part: str, topology: str) -> None:
    row = run(Cell(part, shape(topology)), asked)
    assert not falls_short(row), row
    assert row["same_replies"] + len(row["near_ties"]) == QUESTIONS
    if part == EAGLE3:
        assert row["accept_length"] > 1.5, "no draft was used"


@pytest.mark.slow
def test_a_planted_mistake_costs_answers(asked: Asked) -> None:
    """In the engine for real; as a shape's own result it would fall short."""
    mistake = next(each for each in MISTAKES if each.name == "full_rotary")
    row = run(Cell(MISTAKE, shape("tp=1"), mistake), asked)
    assert row["status"] == "answers"
    assert row["right"] < reference_score(asked).right / 2
    assert row["same_replies"] < QUESTIONS


def test_one_changed_token_is_reported(asked: Asked) -> None:
    """The least likely one, late in a reply whose answer stays right."""
    replies = [list(reply) for reply in asked.references]
    step = 2
    so_far = [*asked.questions[3].prompt, *replies[3][:step]]
    replies[3][step] = int(asked.oracle.log_probabilities(so_far)[-1].argmin())
    row = judged(Cell(FP32, shape("tp=1")), asked, replies)
    assert row["status"] == "differs"
    assert falls_short({"part": FP32, **row})
    (found,) = row["differences"]
    assert (found["question"], found["step"]) == (3, step)
    assert found["margin"] > asked.near_tie


def test_what_cannot_run_says_why(asked: Asked) -> None:
    row = run(Cell(FP32, shape("tp=3")), asked)
    assert row["status"] == "not run"
    assert "attention-TP size 3" in row["reason"]
    assert "stages share" in (why_not(Cell(EAGLE3, shape("pp=2"))) or "")
