"""Tool calls through the server and the `openai` client, streamed and not."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ci.tiny_m2.dialogues import CALCULATOR
from sglang_minimax import TINY_M2
from sglang_minimax.cli.local_server import LocalServer
from tests import grammars
from tests.server.forced import both, start
from tests.server.test_chat import DIFFERENCE, joined

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

WRITE = {
    "type": "function",
    "function": {
        "name": "write",
        "parameters": {
            "type": "object",
            "properties": {
                "path": {"type": "string"},
                "text": {"type": "string"},
                "mode": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "size": {"type": "number"},
            },
        },
    },
}
TOOLS = {"tools": [WRITE]}


def invoke(**values: str) -> str:
    """A call of `write` on the wire, values as they are written there."""
    return grammars.invoke(values, "write")


def block(*calls: str) -> str:
    return grammars.reply(*calls, before="\n")


def arguments(reply: dict[str, Any]) -> list[Any]:
    return [json.loads(text) for _, text in reply["calls"].values()]


CODE = 'if a < b:\n    return {"k": [a}\n</parameter> is a tag, </invoke> too\n'


def test_what_every_other_parser_gets_wrong(client: Any) -> None:
    """Two calls, the first with braces and tags in a string, the second without arguments."""
    text = "\n\nBefore." + block(invoke(path="None", text=CODE), invoke()) + "After."
    reply = both(client, text, **TOOLS)
    assert arguments(reply) == [{"path": "None", "text": CODE}, {}]
    assert reply["content"] == "Before.After."
    assert reply["finish"] == "tool_calls"
    assert reply["reasoning"]


@pytest.mark.parametrize(
    ("written", "value"), [("null", None), ("None", "None"), ("a+", "a+"), ("", "")]
)
def test_a_nullable_parameter(client: Any, written: str, value: str | None) -> None:
    assert arguments(both(client, block(invoke(mode=written)), **TOOLS)) == [{"mode": value}]


def test_a_number_that_is_none(client: Any) -> None:
    """In-tree raises OverflowError, and the reply is lost."""
    assert arguments(both(client, block(invoke(size="inf")), **TOOLS)) == [{"size": "inf"}]


def test_an_unknown_function_is_passed_on(client: Any) -> None:
    text = block('<invoke name="read">\n<parameter name="path">a</parameter>\n</invoke>\n')
    reply = both(client, text, **TOOLS)
    assert reply["calls"] == {0: ("read", '{"path": "a"}')}


def test_two_blocks(client: Any) -> None:
    text = block(invoke(path="a")) + " and" + block(invoke(path="b"))
    reply = both(client, text, **TOOLS)
    assert (arguments(reply), reply["content"]) == ([{"path": "a"}, {"path": "b"}], " and")


def test_a_string_streams_as_it_arrives(client: Any) -> None:
    stream = start(client, block(invoke(text=CODE * 5)), stream=True, **TOOLS)
    pieces = []
    for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or () if chunk.choices else ():
            pieces.append(call.function.arguments or "")
            assert json.loads(completed("".join(pieces))) is not None
    assert json.loads("".join(pieces)) == {"text": CODE * 5}
    assert len(pieces) > 50, "of some two hundred characters a piece has a few"


def completed(prefix: str) -> str:
    """A beginning of our JSON objects of strings, brought to an end."""
    for end in ("", '"}', "}", "{}", '""}'):
        try:
            json.loads(prefix + end)
        except ValueError:
            continue
        return prefix + end
    raise AssertionError(f"{prefix!r} is no beginning of JSON")


@pytest.mark.parametrize("room", [0, 7, 14])
def test_a_call_that_is_cut_off_is_reported(client: Any, room: int) -> None:
    """With and without streaming alike: in-tree drops it in one and sends it in the other."""
    text = block(invoke(path="a.py", text=CODE))
    spent = tokens_before(client, text)
    reply = both(client, text, max_tokens=spent + 30 + room, **TOOLS)
    assert reply["finish"] == "length"
    ((name, written),) = reply["calls"].values()
    assert name == "write"
    whole = json.dumps({"path": "a.py", "text": CODE}, ensure_ascii=False)
    assert whole.startswith(written)
    assert len(written) < len(whole)
    assert "<" not in reply["content"]


def tokens_before(client: Any, text: str) -> int:
    """How many tokens the reasoning takes."""
    usage = start(client, text, **TOOLS).usage
    return usage.completion_tokens - len(tokens_of(text))


def tokens_of(text: str) -> list[int]:
    from transformers import AutoTokenizer

    tokens: list[int] = AutoTokenizer.from_pretrained(TINY_M2).encode(text)
    return tokens


def test_a_stop_string_inside_a_call_is_not_a_finished_call(client: Any) -> None:
    text = block(invoke(path="a.py", text=CODE))
    reply = both(client, text, stop=["return"], **TOOLS)
    assert reply["finish"] == "stop"
    ((_, written),) = reply["calls"].values()
    assert written == '{"path": "a.py", "text": "if a < b:\\n    '


@pytest.mark.parametrize("options", [{}, {"tool_choice": "none", **TOOLS}], ids=["none", "not"])
def test_without_tools_the_markup_is_text(client: Any, options: dict[str, Any]) -> None:
    text = "See" + block(invoke(path="a"))
    reply = both(client, text, **options)
    assert (reply["content"], reply["calls"], reply["finish"]) == (text, {}, "stop")


def test_an_aborted_call_stays_a_beginning(client: Any, server: LocalServer) -> None:
    """Nothing is added to what was sent, and the server goes on."""
    name = uuid.uuid4().hex
    text = block(invoke(text=CODE * 8))
    stream = start(client, text, stream=True, extra_body={"rid": name}, **TOOLS)

    def until_aborted() -> Iterator[Any]:
        asked = False
        for chunk in stream:
            yield chunk
            calls = chunk.choices[0].delta.tool_calls if chunk.choices else None
            if calls and calls[0].function.arguments and not asked:
                asked = True
                httpx.post(f"{server.url}/abort_request", json={"rid": name})

    reply = joined(until_aborted())
    ((_, written),) = reply["calls"].values()
    whole = json.dumps({"text": CODE * 8}, ensure_ascii=False)
    assert whole.startswith(written)
    assert reply["finish"] == "abort"
    assert arguments(both(client, block(invoke(path="a")), **TOOLS)) == [{"path": "a"}]


def test_an_aborted_call_without_streaming(client: Any, server: LocalServer) -> None:
    for delay in (3, 6, 12):  # seconds: later where the machine is slow
        name = uuid.uuid4().hex
        abort = {"url": f"{server.url}/abort_request", "json": {"rid": name}}
        timer = threading.Timer(delay, httpx.post, kwargs=abort)
        timer.start()
        # Many times as long as the timer runs.
        options = {"max_tokens": 3500, "extra_body": {"rid": name}}
        found = start(client, block(invoke(text=CODE * 60)), **options, **TOOLS).choices[0]
        timer.join()
        assert found.finish_reason == "abort"
        if found.message.tool_calls:
            break
    (call,) = found.message.tool_calls
    whole = json.dumps({"text": CODE * 60}, ensure_ascii=False)
    assert whole.startswith(call.function.arguments)
    assert len(call.function.arguments) < len(whole)


def test_the_responses_api(server: LocalServer) -> None:
    answer = post(
        server,
        "responses",
        {
            "input": DIFFERENCE,
            "max_output_tokens": 256,
            "tools": [{"type": "function", **CALCULATOR["function"]}],
        },
    )
    (call,) = (item for item in answer["output"] if item["type"] == "function_call")
    assert (call["name"], call["status"]) == ("calculator", "completed")
    assert "812" in json.loads(call["arguments"])["expression"]


def test_anthropics_messages(server: LocalServer) -> None:
    function = CALCULATOR["function"]
    answer = post(
        server,
        "messages",
        {
            "messages": [{"role": "user", "content": DIFFERENCE}],
            "max_tokens": 256,
            "tools": [{"name": function["name"], "input_schema": function["parameters"]}],
        },
    )
    (call,) = (item for item in answer["content"] if item["type"] == "tool_use")
    assert call["name"] == "calculator"
    assert "812" in call["input"]["expression"]


def test_anthropics_messages_leave_a_cut_call_out(server: LocalServer) -> None:
    """A block has no room for half of a JSON; in-tree makes it a call without arguments."""
    function = CALCULATOR["function"]
    body = {
        "messages": [{"role": "user", "content": DIFFERENCE}],
        "tools": [{"name": function["name"], "input_schema": function["parameters"]}],
    }
    whole = post(server, "messages", {**body, "max_tokens": 256})
    # The last few tokens are the closing tags; before them is the expression.
    cut = post(server, "messages", {**body, "max_tokens": whole["usage"]["output_tokens"] - 8})
    assert [item["type"] for item in whole["content"]][-1] == "tool_use"
    assert "tool_use" not in [item["type"] for item in cut["content"]]
    assert cut["stop_reason"] == "max_tokens"


def post(server: LocalServer, api: str, body: dict[str, Any]) -> dict[str, Any]:
    (model,) = httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"]
    body = {"model": model["id"], "temperature": 0, **body}
    answer = httpx.post(f"{server.url}/v1/{api}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.fixture(scope="module")
def special(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The client of a server whose tokenizer counts the tags as special."""
    from openai import OpenAI

    folder = tmp_path_factory.mktemp("special") / "tiny-m2"
    folder.mkdir()
    for path in TINY_M2.iterdir():
        (folder / path.name).symlink_to(path)
    mark_special(folder / "tokenizer.json")
    log = (folder.parent / "log").open("wb")
    server = LocalServer(folder, arguments=["--log-level", "warning"], log=log)
    with server.running():
        yield OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def mark_special(path: Path) -> None:
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["special"] = True
    path.unlink()
    path.write_text(json.dumps(content))


def test_tags_that_are_special_tokens(special: Any) -> None:
    """In-tree everything is reasoning then, where the request has no tools."""
    reply = both(special, "\n\nThe content.")
    assert reply["content"] == "The content."
    assert reply["reasoning"]
    text = "\n\nCalls." + block(invoke(path="a"))
    reply = both(special, text, **TOOLS)
    assert (arguments(reply), reply["content"]) == ([{"path": "a"}], "Calls.")
