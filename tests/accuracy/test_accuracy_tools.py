"""Tool calls against a server that says what it is told to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sglang_minimax.accuracy import TOOL_CALLS, pieces, run_tools, tool_cases, tools
from sglang_minimax.accuracy.errors import AccuracyError
from sglang_minimax.accuracy.settings import ToolSettings
from sglang_minimax.accuracy.tool_cases import load
from sglang_minimax.accuracy.tools import chosen
from tests.accuracy.conftest import Serve
from tests.accuracy.fake_server import FACTS, Body, Said

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"n": {"type": kind}, "text": {"type": "string"}},
                "required": ["n"],
            },
        },
    }
    for name, kind in (("count", "integer"), ("ask", "boolean"))
]
ONE = {"n": 1, "text": "a"}
TWO = [{"name": "count", "arguments": ONE}, {"name": "ask", "arguments": {"n": True}}]
COUNT, ASK = ("count", json.dumps(ONE)), ("ask", '{"n": true}')

#: question -> expected calls, the needed end of the content, the reply, and whether the reply is
#: well-formed and correct.
CASES: dict[str, tuple[list[Any], str | None, Said, bool, bool]] = {
    "right": (TWO, None, Said(calls=(COUNT, ASK), finish_reason="tool_calls"), True, True),
    "other order of keys": (
        TWO[:1],
        None,
        Said(calls=(("count", '{"text": "a", "n": 1}'),)),
        True,
        True,
    ),
    "text beside a call": (TWO[:1], None, Said("I count.", calls=(COUNT,)), True, True),
    "swapped": (TWO, None, Said(calls=(ASK, COUNT)), True, False),
    "one is missing": (TWO, None, Said(calls=(COUNT,)), True, False),
    "one too many": (TWO[:1], None, Said(calls=(COUNT, ASK)), True, False),
    "other value": (TWO[:1], None, Said(calls=(("count", '{"n": 2, "text": "a"}'),)), True, False),
    "one for true": (TWO[1:], None, Said(calls=(("ask", '{"n": 1}'),)), False, False),
    "text for a number": (TWO[:1], None, Said(calls=(("count", '{"n": "1"}'),)), False, False),
    "a required one is missing": (TWO[:1], None, Said(calls=(("count", "{}"),)), False, False),
    "no JSON": (TWO[:1], None, Said(calls=(("count", '{"n": 1'),)), False, False),
    "no object": (TWO[:1], None, Said(calls=(("count", "1"),)), False, False),
    "no such tool": (TWO[:1], None, Said(calls=(("counter", '{"n": 1}'),)), False, False),
    "left in the text": (
        TWO[:1],
        None,
        Said('<minimax:tool_call>\n<invoke name="count">\n</invoke>\n</minimax:tool_call>'),
        False,
        False,
    ),
    "begun beside a call": (TWO[:1], None, Said('<invoke name="', calls=(COUNT,)), False, False),
    "no call": (TWO[:1], None, Said("It is 1."), False, False),
    "cut off": (TWO[:1], None, Said(calls=(COUNT,), finish_reason="length"), False, False),
    "an answer": ([], "#### 4", Said("So it is\n#### 4\n", reasoning="hm"), True, True),
    "another answer": ([], "#### 4", Said("#### 5"), True, False),
    "a call for an answer": ([], "#### 4", Said("#### 4", calls=(COUNT,)), True, False),
}


def write(path: Path) -> Path:
    """The cases as a file."""
    rows = [
        {
            "category": "fake",
            "messages": [{"role": "user", "content": question}],
            "tools": TOOLS,
            "expected": expected,
            "answer": end,
        }
        for question, (expected, end, *_) in CASES.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(body: Body) -> Said:
    return CASES[body["messages"][-1]["content"]][2]


def outcome(serve: Serve, folder: Path, answer: Callable[[Body], Said] = said) -> Any:
    """A run, and what its log says by question."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    settings = ToolSettings(
        url=serve(answer).url, cases=str(write(folder / "cases.jsonl")), log=log, retries=0
    )
    result = run_tools(settings)
    entries = [json.loads(line) for line in log.read_text().splitlines()][1:]
    return result, {entry["messages"][-1]["content"]: entry for entry in entries}


def faults(result: Any, entries: dict[str, Any]) -> list[str]:
    """Where a verdict is not the one that stands in CASES."""
    found = []
    for question, (*_, well_formed, correct) in CASES.items():
        entry = entries[question]
        for side in ("whole", "streamed"):
            judged = (entry[side]["well_formed"], entry[side]["correct"])
            if judged != (well_formed, correct):
                found.append(f"{question} ({side}): {judged}")
        if not entry["same"]:
            found.append(f"{question}: streamed {entry['streamed']} not {entry['whole']}")
    wanted = [sum(row[3] for row in CASES.values()), sum(row[4] for row in CASES.values())]
    wanted = [*wanted, *wanted, len(CASES)]
    if [score.right for score in result.scores.values()] != wanted:
        found.append(f"{result.scores} not {wanted}")
    return found


def test_each_case_is_judged(serve: Serve, tmp_path: Path) -> None:
    result, entries = outcome(serve, tmp_path)
    assert faults(result, entries) == []
    assert tuple(result.scores) == tools.SCORES
    figures = result.figures
    assert (figures["cases"], figures["truncated"]) == (len(CASES), 2)
    assert figures["completion_tokens"] == 4 * len(CASES)
    assert entries["right"]["streamed"]["calls"] == [
        {"name": "count", "arguments": COUNT[1]},
        {"name": "ask", "arguments": ASK[1]},
    ]


MISTAKES = {
    "the schema is not looked at": lambda patch: patch.setattr(
        tool_cases, "fits", lambda arguments, schema: True
    ),
    "python's one is true": lambda patch: patch.setattr(tool_cases, "_canonical", lambda x: x),
    "order does not matter": lambda patch: patch.setattr(
        tool_cases, "_canonical", lambda calls: sorted(json.dumps(c, sort_keys=True) for c in calls)
    ),
    "the name alone counts": lambda patch: patch.setattr(
        tool_cases, "_canonical", lambda calls: [name for name, _ in calls]
    ),
    "text of a call is text": lambda patch: patch.setattr(tool_cases, "MARKUP", ()),
    "keys as they come": lambda patch: patch.setattr(
        tool_cases, "_canonical", lambda calls: json.dumps(calls)
    ),
    "cut-off calls count": lambda patch: patch.setattr(
        "sglang_minimax.accuracy.endpoint.Reply.is_truncated", False
    ),
    "the last piece wins": lambda patch: patch.setattr(pieces, "Pieces", LastPiece),
}


class LastPiece(pieces.Pieces):
    """Keeps a piece of the arguments in place of all of them."""

    def calls(self) -> list[dict[str, str]]:
        """The calls with the last letter of their arguments."""
        return [{**call, "arguments": call["arguments"][-1:]} for call in super().calls()]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_shows(
    name: str, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "python's one is true":
        # The schema notices it first; so a schema that allows both.
        monkeypatch.setattr(tool_cases, "fits", lambda arguments, schema: True)
        assert not outcome(serve, tmp_path)[1]["one for true"]["whole"]["correct"]
        MISTAKES[name](monkeypatch)
        assert outcome(serve, tmp_path)[1]["one for true"]["whole"]["correct"]
        return
    MISTAKES[name](monkeypatch)
    assert faults(*outcome(serve, tmp_path))


@pytest.mark.parametrize(
    ("change", "well_formed"),
    [
        # A name that comes twice, pieces that lie in the wrong call, a call that never ends.
        (lambda begin, rest: (begin, begin, *rest), False),
        (lambda begin, rest: (begin, *(indexed(each, 1) for each in rest)), False),
        (lambda begin, rest: (begin, *rest[:-1]), False),
        (lambda begin, rest: (begin, *rest), True),
    ],
    ids=["named_twice", "wrong_index", "unfinished", "as_it_is"],
)
def test_a_stream_that_is_not_the_whole(
    change: Any, well_formed: bool, serve: Serve, tmp_path: Path
) -> None:
    begin, *rest = Said(calls=(COUNT,)).deltas()
    streamed = Said(calls=(COUNT,), pieces=change(begin, rest))

    def answer(body: Body) -> Said:
        question = body["messages"][-1]["content"]
        return streamed if body.get("stream") and question == "one is missing" else said(body)

    result, entries = outcome(serve, tmp_path, answer)
    entry = entries["one is missing"]
    assert entry["whole"]["well_formed"]
    assert (entry["streamed"]["well_formed"], entry["same"]) == (well_formed, well_formed)
    assert result.scores["streamed-same"].right == len(CASES) - (not well_formed)


def indexed(delta: Body, index: int) -> Body:
    """The piece in another call."""
    (call,) = delta["tool_calls"]
    return {"tool_calls": [{**call, "index": index}]}


def test_a_log_is_gone_on_with(serve: Serve, tmp_path: Path) -> None:
    broken = True

    def answer(body: Body) -> Said:
        question = body["messages"][-1]["content"]
        return Said(status=500) if broken and question == "swapped" else said(body)

    server = serve(answer)
    settings = ToolSettings(
        url=server.url,
        cases=str(write(tmp_path / "cases.jsonl")),
        log=tmp_path / "log",
        retries=0,
        limit=6,
    )
    with pytest.raises(AccuracyError, match="1 of 6 requests failed"):
        run_tools(settings)
    broken = False
    before = len(server.asked)
    result = run_tools(settings)
    assert server.questions()[before:] == ["swapped"] * 2
    assert (result.figures["answered_before"], result.figures["cases"]) == (5, 6)


def test_calls_only_leaves_out_what_has_an_answer(serve: Serve, tmp_path: Path) -> None:
    """Another model than tiny-m2 knows nothing of how its answers end."""
    server, cases = serve(said), str(write(tmp_path / "cases.jsonl"))
    settings = ToolSettings(url=server.url, cases=cases, calls_only=True, limit=len(CASES) - 1)
    without = [question for question, (_, end, *_) in CASES.items() if end is None]
    result = run_tools(settings)
    assert result.figures["cases"] == len(without) == len(CASES) - 3
    assert set(server.questions()) == set(without)
    assert result.settings["calls_only"] is True
    bundled = chosen(load(TOOL_CALLS), ToolSettings(calls_only=True))
    assert (len(bundled), {case.answer for case in bundled}) == (70, {None})


def test_calls_only_without_a_call_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(write(path).read_text().splitlines()[-1])
    with pytest.raises(AccuracyError, match=r"every case of .* has an 'answer'"):
        run_tools(ToolSettings(url="http://127.0.0.1:1", cases=str(path), calls_only=True))


def test_half_a_stream_is_no_wrong_answer(serve: Serve, tmp_path: Path) -> None:
    server = serve(lambda body: replace(said(body), breaks=True))
    cases = str(write(tmp_path / "cases.jsonl"))
    with pytest.raises(AccuracyError, match=r"1 of 1 .* ended with no reason"):
        run_tools(ToolSettings(url=server.url, cases=cases, limit=1))


def test_a_server_without_a_parser(serve: Serve, tmp_path: Path) -> None:
    facts = {k: v for k, v in FACTS.items() if k != "tool_call_parser"}
    server = serve(said, facts=facts)
    cases = str(write(tmp_path / "cases.jsonl"))
    with pytest.raises(AccuracyError, match="--tool-call-parser minimax-m2"):
        run_tools(ToolSettings(url=server.url, cases=cases))
    # One that says nothing of itself may have one.
    server = serve(said, facts={})
    assert run_tools(ToolSettings(url=server.url, cases=cases)).figures["cases"] == len(CASES)
