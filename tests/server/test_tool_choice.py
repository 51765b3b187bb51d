"""Forced and strict tools through the `openai` client: in the model's format, behind its thought.

The grammar is SGLang's, with our structural tag; the bundled checkpoint knows one of the tools.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import openai
import pytest

from ci.tiny_m2.dialogues import CALCULATOR
from tests.server.test_chat import DIFFERENCE, SUM, SUM_ANSWER, ask, final_number, joined, whole

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

# Token ids of the bundled checkpoint.
BLOCK_OPEN, BLOCK_CLOSE, TURN_CLOSE = 6, 7, 3


def tool(name: str, strict: bool = False, **properties: Any) -> dict[str, Any]:
    """A tool all of whose parameters are required."""
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    function = {"name": name, "description": name, "strict": strict, "parameters": parameters}
    return {"type": "function", "function": function}


UNIT = {"enum": ["C", "F"]}
WEATHER = tool(
    "weather",
    city={"type": "string", "maxLength": 12},
    days={"type": "integer", "minimum": 1, "maximum": 9},
    unit={"type": ["string", "null"], "enum": ["C", "F", None]},
    near={"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
)
NAMED = {"type": "function", "function": {"name": "weather"}}


def reply(client: Any, question: str, stream: bool, **options: Any) -> dict[str, Any]:
    """Of one question, put together if it is streamed."""
    found = ask(client, question, stream=stream, **options)
    return joined(found) if stream else whole(found)


def called(reply: dict[str, Any], *tools: dict[str, Any]) -> list[str]:
    """The names of the calls of a good reply, all of which fit their tools."""
    assert reply["finish"] == "tool_calls"
    assert reply["reasoning"]
    assert reply["content"] == ""
    assert "<" not in reply["reasoning"]
    schemas = {each["function"]["name"]: each["function"]["parameters"] for each in tools}
    for name, arguments in reply["calls"].values():
        jsonschema.validate(json.loads(arguments), schemas[name])
    return [name for name, _ in reply["calls"].values()]


both_ways = pytest.mark.parametrize("stream", [False, True], ids=["at_once", "streamed"])


@both_ways
@pytest.mark.parametrize("question", [DIFFERENCE, "Hello!"])
def test_required(question: str, stream: bool, client: Any) -> None:
    tools = [CALCULATOR]
    found = reply(client, question, stream, tools=tools, tool_choice="required")
    assert called(found, *tools) == ["calculator"]


@both_ways
def test_a_named_tool(stream: bool, client: Any) -> None:
    tools = [CALCULATOR, WEATHER]
    found = reply(client, DIFFERENCE, stream, tools=tools, tool_choice=NAMED)
    assert called(found, *tools) == ["weather"]


@both_ways
def test_one_call_of_two_tools(stream: bool, client: Any) -> None:
    tools = [WEATHER, CALCULATOR]
    options = {"tool_choice": "required", "parallel_tool_calls": False}
    found = reply(client, DIFFERENCE, stream, tools=tools, **options)
    assert len(called(found, *tools)) == 1


@both_ways
@pytest.mark.parametrize("parallel", [True, False])
def test_several_calls(parallel: bool, stream: bool, client: Any) -> None:
    """Without the token that closes the block the model calls on where it may."""
    options = {"tool_choice": "required", "parallel_tool_calls": parallel, "max_tokens": 200}
    bias = {str(BLOCK_CLOSE): -100}
    found = reply(client, DIFFERENCE, stream, tools=[CALCULATOR], logit_bias=bias, **options)
    assert (len(found["calls"]) > 1) is parallel


@both_ways
def test_strict_tools(stream: bool, client: Any) -> None:
    strict = json.loads(json.dumps(CALCULATOR))
    strict["function"]["strict"] = True
    # Not what the model knows: it would write `expression`.
    strict["function"]["parameters"] = tool("", expression={"enum": ["1 + 1"]})["function"][
        "parameters"
    ]
    found = reply(client, DIFFERENCE, stream, tools=[strict])
    assert called(found, strict) == ["calculator"]
    assert json.loads(found["calls"][0][1]) == {"expression": "1 + 1"}


@both_ways
def test_strict_tools_need_not_be_called(stream: bool, client: Any) -> None:
    found = reply(client, "Hello!", stream, tools=[tool("f", strict=True, unit=UNIT)])
    assert not found["calls"]
    assert "Hello" in found["content"]
    assert found["finish"] == "stop"


# --- thoughts that jump ------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("jump", [BLOCK_OPEN, TURN_CLOSE], ids=["to_a_call", "to_the_end"])
def test_a_thought_cannot_go_around_the_grammar(jump: int, stream: bool, client: Any) -> None:
    tools = [tool("f", unit=UNIT)]
    options = {"tools": tools, "logit_bias": {str(jump): 100}, "max_tokens": 100}
    # Without a grammar the bias does what it should: nothing is thought.
    jumped = reply(client, "Hello!", stream, **options)
    assert not jumped["reasoning"]
    assert not jumped["calls"]
    found = reply(client, "Hello!", stream, tool_choice="required", **options)
    assert called(found, *tools)[0] == "f"


@both_ways
def test_a_grammar_holds_for_the_rest_of_an_answer(stream: bool, client: Any) -> None:
    """There is no thought to wait for behind `</think>`."""
    begun = {"role": "assistant", "content": "Easy.\n</think>\n\n"}
    messages = [{"role": "user", "content": SUM}, begun]
    extra: dict[str, Any] = {"continue_final_message": True, "regex": "It is [0-9]{2}!"}
    found = ask(client, messages, stream=stream, max_tokens=50, extra_body=extra)
    rest = joined(found) if stream else whole(found)
    assert re.fullmatch(extra["regex"], rest["content"])
    assert (rest["finish"], rest["reasoning"]) == ("stop", "")


@both_ways
@pytest.mark.parametrize("in_parts", [False, True])
def test_a_continued_answer_is_forced_to_call(in_parts: bool, stream: bool, client: Any) -> None:
    begun: Any = "Easy.\n</think>\n\nI call."
    messages = [
        {"role": "user", "content": DIFFERENCE},
        {"role": "assistant", "content": [{"type": "text", "text": begun}] if in_parts else begun},
    ]
    options = {"tools": [CALCULATOR], "tool_choice": "required", "parallel_tool_calls": False}
    extra = {"continue_final_message": True}
    found = ask(client, messages, stream=stream, extra_body=extra, **options)
    rest = joined(found) if stream else whole(found)
    assert (rest["finish"], rest["reasoning"]) == ("tool_calls", "")
    assert [name for name, _ in rest["calls"].values()] == ["calculator"]


@both_ways
def test_requests_side_by_side(stream: bool, client: Any) -> None:
    """One with a grammar and one without in a batch: only one is held back."""
    tools = [tool("f", unit=UNIT)]
    forced = {"tools": tools, "tool_choice": "required", "logit_bias": {str(BLOCK_OPEN): 100}}
    with ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(reply, client, question, stream, **options)
            for _ in range(2)
            for question, options in (("Hello!", {**forced, "max_tokens": 100}), (SUM, {}))
        ]
        for number, future in enumerate(futures):
            found = future.result()
            if number % 2:
                assert final_number(found["content"]) == SUM_ANSWER
            else:
                assert called(found, *tools)[0] == "f"


# --- schemas that cannot be had ----------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        {"type": "integer", "minimum": 5, "maximum": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 5, "maximum": 1}},
        {"enum": ["a\x00"]},
    ],
    ids=["empty", "empty_within", "zero"],
)
def test_a_schema_that_cannot_be_compiled_is_refused(value: Any, client: Any) -> None:
    options: dict[str, Any] = {"tools": [tool("f", x=value)], "tool_choice": "required"}
    for stream in (False, True):
        with pytest.raises((openai.BadRequestError, openai.APIError), match="grammar"):
            reply(client, "Hello!", stream, **options)
    assert final_number(whole(ask(client, SUM))["content"]) == SUM_ANSWER


def test_a_tool_whose_name_cannot_be_written_is_refused(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="at least one element"):
        ask(client, "Hello!", tools=[tool('f">\n')], tool_choice="required")
