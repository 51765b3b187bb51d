"""The generators tell the truth, and training never sees a held-out operation."""

from __future__ import annotations

import random
import re

import pytest

from ci.tiny_m2.cases import CATEGORIES, cases
from ci.tiny_m2.dialogues import Completion, Stream
from ci.tiny_m2.problems import (
    KINDS,
    Step,
    add_columns,
    answer_text,
    chain,
    final_number,
    held_out_problems,
    is_held_out,
    sample,
    subtract_columns,
    worked_step,
)

COLUMN = re.compile(r"([\d+-]+)=(\d+)")


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_what_python_computes(kind):
    rng = random.Random(1)
    for _ in range(300):
        problem = sample(kind, rng)
        assert eval(problem.expression) == problem.answer  # digits, blanks, + and - only
        assert final_number(answer_text(problem)) == str(problem.answer)
        assert problem.answer >= 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_column_of_a_chain_is_true_and_spells_the_result(kind):
    rng = random.Random(2)
    for _ in range(300):
        for step in sample(kind, rng).steps:
            columns = COLUMN.findall(worked_step(step).partition(":")[2].partition("=>")[0])
            assert all(eval(left) == int(right) for left, right in columns)
            last = columns[-1][1]
            spelled = last + "".join(right[-1] for _, right in columns[-2::-1])
            assert int(spelled) == step.result


def test_columns_carry_and_borrow():
    assert add_columns(95, 8) == ["5+8=13", "9+1=10"]
    assert subtract_columns(305, 128) == ["15-8=7", "10-2-1=7", "3-1-1=1"]
    with pytest.raises(ValueError, match="12 - 30 is negative"):
        subtract_columns(12, 30)


def test_a_tenth_is_held_out_and_the_split_is_stable():
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    assert 0.08 < sum(is_held_out(a, "+", b) for a, b in pairs) / len(pairs) < 0.12
    # Any change of the hash would make training data of what the checkpoint is tested on.
    assert [n for n in range(60) if is_held_out(23, "+", n)] == [14, 29, 38, 44, 47]


def test_training_never_sees_a_held_out_operation():
    stream = Stream("any seed")
    for _ in range(3000):
        item = next(stream)
        problems = [item.problem, *item.shots] if isinstance(item, Completion) else item.problems
        assert not any(problem.held_out for problem in problems)


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_problems_are_held_out_distinct_and_repeatable(kind):
    problems = held_out_problems(kind, 100)
    assert all(problem.held_out for problem in problems)
    assert len({problem.question for problem in problems}) == 100
    assert problems == held_out_problems(kind, 100)


def test_chain_of_two_steps_has_two_lines():
    rng = random.Random(3)
    lengths = {len(p.steps): chain(p).count("\n") for p in (sample("word", rng) for _ in range(99))}
    assert lengths == {1: 0, 2: 1}


def test_step_prints_as_the_calculator_expression():
    assert str(Step(23, "+", 45)) == "23 + 45"


@pytest.mark.parametrize("category", CATEGORIES)
def test_cases_repeat_for_a_seed_and_differ_between_seeds(category):
    first = [case.messages for case in cases(category, 20)]
    assert first == [case.messages for case in cases(category, 20)]
    assert first != [case.messages for case in cases(category, 20, seed=1)]
