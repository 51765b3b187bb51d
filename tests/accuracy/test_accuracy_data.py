"""The bundled sets are what their scripts write, held out, and of the form they claim."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from ci.tiny_m2 import arithmetic, tool_calls
from ci.tiny_m2.problems import Problem
from sglang_minimax.accuracy import ARITHMETIC, TOOL_CALLS, gsm8k_data, tool_cases
from sglang_minimax.accuracy.errors import AccuracyError

OPERATION = re.compile(r"^(\d+)([+-])(\d+):", re.MULTILINE)


def test_the_files_are_what_the_scripts_write() -> None:
    for name, text in arithmetic.files().items():
        assert (ARITHMETIC / name).read_text() == text, "run python -m ci.tiny_m2.arithmetic"
    assert TOOL_CALLS.read_text() == tool_calls.text(), "run python -m ci.tiny_m2.tool_calls"
    assert arithmetic.files(seed=1) != arithmetic.files()


def operations(row: dict[str, str]) -> list[str]:
    """What the worked answer does, as `345+128`."""
    return ["".join(parts) for parts in OPERATION.findall(row["answer"])]


def test_no_operation_of_a_question_is_in_its_shots() -> None:
    """Read from the text, not from the hash that made the split."""
    splits = gsm8k_data.load("arithmetic", shots=5)
    assert splits is not None
    assert len(splits["test"]) == 200
    shown = {each for row in splits["train"] for each in operations(row)}
    assert all(set(operations(row)) - shown for row in splits["test"])
    questions = [row["question"] for rows in splits.values() for row in rows]
    assert len(set(questions)) == len(questions)


def test_the_worked_answers_are_right() -> None:
    """By Python, with the numbers of the worked steps."""
    splits = gsm8k_data.load("arithmetic", shots=5)
    assert splits is not None
    for row in [*splits["test"], *splits["train"]]:
        final = row["answer"].rpartition("#### ")[2]
        assert str(eval(operations(row)[-1])) == final
        assert all(number in row["question"] for number in re.findall(r"\d+", operations(row)[0]))


def test_a_few_lines_hold_every_kind() -> None:
    kinds: list[Problem] = [
        next(problems)
        for problems in [arithmetic.questions(held_out=True)]
        for _ in range(len(arithmetic.MIX))
    ]
    assert {each.kind for each in kinds} == {"two_digit", "three_digit", "word"}
    assert all(each.held_out for each in kinds)


def test_expected_calls_fit_their_tools() -> None:
    cases = tool_cases.load(TOOL_CALLS)
    assert len(cases) == 100
    assert {case.category for case in cases[:10]} == set(tool_calls.MIX)
    for case in cases:
        schemas = tool_cases.tool_schemas(case.tools)
        for call in case.expected:
            jsonschema.validate(call["arguments"], schemas[call["name"]])
        for message in case.messages:
            for call in message.get("tool_calls", ()):
                assert isinstance(call["function"]["arguments"], str)


GOOD = '{"question": "1+1?", "answer": "2\\n#### 2"}'
OTHER = '{"question": "1+2?", "answer": "3\\n#### 3"}'


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([GOOD, "{"], "line 2 of .* is no JSON"),
        ([GOOD, "", "[1]"], "line 3 of .* is no object"),
        (['{"question": "1+1?"}'], "line 1 of .* has no text 'answer'"),
        (['{"question": 1, "answer": "#### 2"}'], "line 1 of .* has no text 'question'"),
        ([GOOD, '{"question": "1+1?", "answer": "2"}'], "line 2 .* does not end in '#### '"),
        (['{"question": "1+1?", "answer": "#### two"}'], "line 1 .* does not end in '#### '"),
        (["", ""], "holds no question"),
    ],
)
def test_data_that_are_not_gsm8ks(tmp_path: Path, lines: list[str], words: str) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(AccuracyError, match=words):
        gsm8k_data.load(str(tmp_path), shots=0)


def test_real_gsm8k_lines_are_accepted(tmp_path: Path) -> None:
    """Thousands with commas, line separators inside a text, a missing end of line."""
    rows = [
        {"question": "a\u2028b", "answer": "<<1+1=2>>2\n#### 1,200"},
        {"question": "c", "answer": "#### -3"},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert gsm8k_data.load(str(path), shots=0) == {"test": rows, "train": []}


def test_shots_need_examples(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(GOOD)
    with pytest.raises(AccuracyError, match=r"5 shots come from .*train\.jsonl"):
        gsm8k_data.load(str(tmp_path), shots=5)
    (tmp_path / "train.jsonl").write_text(OTHER)
    with pytest.raises(AccuracyError, match="has 1 examples"):
        gsm8k_data.load(str(tmp_path), shots=5)
    assert gsm8k_data.load("openai/gsm8k", shots=5) is None
    with pytest.raises(AccuracyError, match="there is no"):
        gsm8k_data.load("./a/b/c", shots=0)


@pytest.mark.parametrize(
    ("data", "train"),
    [("test.jsonl", f"{OTHER}\n{GOOD}"), ("train.jsonl", GOOD)],
    ids=["equal_rows", "the_same_file"],
)
def test_a_shot_is_no_question(tmp_path: Path, data: str, train: str) -> None:
    (tmp_path / "test.jsonl").write_text(GOOD)
    (tmp_path / "train.jsonl").write_text(train)
    with pytest.raises(AccuracyError, match=r"train\.jsonl holds 1 of the questions"):
        gsm8k_data.load(str(tmp_path / data), shots=1)
    # Without shots nothing is shown.
    assert gsm8k_data.load(str(tmp_path / data), shots=0)


CASE = {
    "messages": [{"role": "user", "content": "?"}],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "expected": [{"name": "f", "arguments": {}}],
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": []}, "no message"),
        ({"messages": "?"}, "no 'messages'"),
        ({"expected": [{"name": "g", "arguments": {}}]}, "name of one of its tools"),
        ({"expected": [{"name": "f", "arguments": "{}"}]}, "'arguments', an object"),
        ({"tools": [{"type": "function"}]}, "tool without a name"),
        ({"tools": [{"function": {"name": "f", "parameters": {"type": 3}}}]}, "no JSON schema"),
        ({"answer": 3}, "'answer' that is no text"),
    ],
)
def test_cases_that_are_none(tmp_path: Path, change: dict, words: str) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps(CASE) + "\n" + json.dumps(CASE | change))
    with pytest.raises(AccuracyError, match=f"line 2 of .*{words}"):
        tool_cases.load(path)
