"""Calls through everything that a request may ask for beside them, and through the other APIs."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from ci.tiny_m2.dialogues import CALCULATOR
from sglang_minimax.cli.local_server import LocalServer
from tests.server.forced import both, start
from tests.server.test_chat import DIFFERENCE, joined, whole
from tests.server.test_tool_calls import CODE, TOOLS, arguments, block, invoke, post

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

TEXT = "\n\nBefore." + block(invoke(path="a.py", text=CODE), invoke(path="b"))
VALUES = [{"path": "a.py", "text": CODE}, {"path": "b"}]
USAGE = {"stream_options": {"include_usage": True}}


# --- several choices, log-probabilities, usage -------------------------------------------------


def test_two_choices_at_once(client: Any) -> None:
    choices = start(client, TEXT, n=2, **TOOLS).choices
    assert [choice.index for choice in choices] == [0, 1]
    for choice in choices:
        reply = whole(SimpleNamespace(choices=[choice]))
        assert (arguments(reply), reply["content"]) == (VALUES, "Before.")
        assert reply["finish"] == "tool_calls"
    assert len({call.id for choice in choices for call in choice.message.tool_calls}) == 4


def test_two_choices_streamed(client: Any) -> None:
    """Their pieces come in turns, and each has a parser of its own."""
    choices = [
        choice
        for chunk in start(client, TEXT, n=2, stream=True, **TOOLS)
        for choice in chunk.choices
    ]
    for index in (0, 1):
        mine = [SimpleNamespace(choices=[each]) for each in choices if each.index == index]
        reply = joined(mine)
        assert (arguments(reply), reply["content"]) == (VALUES, "Before.")
        assert reply["finish"] == "tool_calls"
    calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
    names = [call.id for call in calls if call.id]
    assert len(set(names)) == len(names) == 4


def test_each_token_has_its_log_probability(client: Any) -> None:
    """Also those of tags, of which nothing comes out."""
    reply = start(client, TEXT, logprobs=True, **TOOLS)
    tokens = [each.token for each in reply.choices[0].logprobs.content]
    assert len(tokens) == reply.usage.completion_tokens
    assert "<minimax:tool_call>" in tokens
    chunks = start(client, TEXT, logprobs=True, stream=True, **TOOLS)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    streamed = [each.token for choice in choices for each in (choice.logprobs or NONE).content]
    assert streamed == tokens


NONE = SimpleNamespace(content=())


def test_usage_of_a_streamed_call(client: Any) -> None:
    chunks = list(start(client, TEXT, stream=True, **USAGE, **TOOLS))
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage == start(client, TEXT, **TOOLS).usage
    assert arguments(joined(chunks)) == VALUES


# --- stop strings that are tags ----------------------------------------------------------------


def test_a_stop_string_that_closes_a_call(client: Any) -> None:
    """The call is not closed then: the tag is not in the text that we see."""
    reply = both(client, TEXT, stop=["</invoke>"], **TOOLS)
    ((_, written),) = reply["calls"].values()
    # The first one is in a value, and stops as well.
    assert written == json.dumps(VALUES[0]).partition("</invoke>")[0]
    assert reply["finish"] == "stop"
    reply = both(client, block(invoke(path="a")), stop=["</invoke>"], **TOOLS)
    assert (reply["calls"], reply["finish"]) == ({0: ("write", '{"path": "a"')}, "stop")


def test_a_stop_string_that_opens_a_block(client: Any) -> None:
    reply = both(client, TEXT, stop=["<minimax:tool_call>"], **TOOLS)
    assert (reply["content"], reply["calls"]) == ("Before.\n", {})
    assert reply["finish"] == "stop"


# --- somebody leaves ---------------------------------------------------------------------------


def test_a_client_that_leaves_in_the_middle_of_a_call(client: Any) -> None:
    """Another one, in the same batch, gets what it would have got alone."""
    text = block(invoke(text=CODE * 8))
    alone = joined(start(client, text, stream=True, **TOOLS))
    leaving, staying = (start(client, text, stream=True, **TOOLS) for _ in range(2))
    begun = until_arguments(staying)
    until_arguments(leaving)
    leaving.close()
    assert joined([*begun, *staying]) == alone
    assert arguments(both(client, block(invoke(path="a")), **TOOLS)) == [{"path": "a"}]


def until_arguments(stream: Any) -> list[Any]:
    """Its chunks up to the first that has arguments of a call."""
    chunks = []
    for chunk in stream:
        chunks.append(chunk)
        calls = chunk.choices[0].delta.tool_calls if chunk.choices else None
        if calls and calls[0].function.arguments:
            return chunks
    raise AssertionError("no call")


# --- other APIs --------------------------------------------------------------------------------

FUNCTION = CALCULATOR["function"]
MESSAGES = {
    "messages": [{"role": "user", "content": DIFFERENCE}],
    "max_tokens": 256,
    "tools": [{"name": FUNCTION["name"], "input_schema": FUNCTION["parameters"]}],
}
#: Not in the thought, and in a call only behind its arguments.
STOP = {"stop_sequences": ["</parameter>"]}
EXPRESSION = {"expression": "812 - 349"}


def events(server: LocalServer, api: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    (model,) = httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"]
    body = {"model": model["id"], "temperature": 0, "stream": True, **body}
    answer = httpx.post(f"{server.url}/v1/{api}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    begin = "data: "
    lines = [line for line in answer.text.split("\n") if line.startswith(begin + "{")]
    return [json.loads(line.removeprefix(begin)) for line in lines]


def message(found: list[dict[str, Any]]) -> tuple[str, str, str]:
    """Of Anthropic's events: what was called, its arguments, and the stop reason."""
    (name,) = (
        each["content_block"]["name"]
        for each in found
        if each["type"] == "content_block_start" and each["content_block"]["type"] == "tool_use"
    )
    deltas = [each["delta"] for each in found if each["type"] == "content_block_delta"]
    written = "".join(each.get("partial_json", "") for each in deltas)
    (end,) = (each["delta"] for each in found if each["type"] == "message_delta")
    assert found[-1]["type"] == "message_stop"
    return name, written, end["stop_reason"]


def test_anthropics_messages_streamed(server: LocalServer) -> None:
    name, written, reason = message(events(server, "messages", MESSAGES))
    assert (name, json.loads(written), reason) == ("calculator", EXPRESSION, "tool_use")


@pytest.mark.parametrize("fewer", [8, 10])
def test_anthropics_messages_streamed_and_cut_off(server: LocalServer, fewer: int) -> None:
    """The call is there, as a beginning of JSON; the stop reason says that it is no more."""
    spent = post(server, "messages", MESSAGES)["usage"]["output_tokens"]
    found = events(server, "messages", {**MESSAGES, "max_tokens": spent - fewer})
    name, written, reason = message(found)
    assert (name, reason) == ("calculator", "max_tokens")
    assert json.dumps(EXPRESSION).startswith(written)
    assert not written.endswith("}")


def test_anthropics_messages_say_which_stop_sequence_cut_a_call(server: LocalServer) -> None:
    """In-tree says `end_turn`, as of a reply that has nothing to say."""
    answer = post(server, "messages", {**MESSAGES, **STOP})
    assert [item["type"] for item in answer["content"]] == ["thinking"]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "</parameter>")
    whole_answer = post(server, "messages", {**MESSAGES, "stop_sequences": ["never"]})
    assert whole_answer["stop_reason"] == "tool_use"
    assert "stop_sequence" not in whole_answer


def test_the_responses_api_streamed(server: LocalServer) -> None:
    body = {
        "input": DIFFERENCE,
        "max_output_tokens": 256,
        "tools": [{"type": "function", **FUNCTION}],
    }
    found = events(server, "responses", body)
    kind = "response.function_call_arguments"
    written = "".join(each["delta"] for each in found if each["type"] == f"{kind}.delta")
    (done,) = (each for each in found if each["type"] == f"{kind}.done")
    assert json.loads(written) == EXPRESSION
    assert done["arguments"] == written
    last = found[-1]
    assert (last["type"], last["response"]["status"]) == ("response.completed", "completed")
    (call,) = (each for each in last["response"]["output"] if each["type"] == "function_call")
    assert (call["name"], call["arguments"]) == ("calculator", written)
    assert call["status"] == "completed"
