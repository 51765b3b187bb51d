"""Reasoning through the server: with and without streaming, split or not, and continued."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from sglang_minimax.cli.local_server import LocalServer
from tests.server.forced import both
from tests.server.test_chat import (
    DIFFERENCE,
    SUM,
    SUM_ANSWER,
    TOOL,
    ask,
    final_number,
    joined,
    whole,
)

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]


def test_the_templates_line_breaks_are_taken_off(client: Any) -> None:
    reply = both(client, "\n\n\nThe content.\n")
    assert reply["content"] == "\nThe content.\n", "two of them are the template's"
    assert reply["reasoning"] == reply["reasoning"].strip("\n") != ""


def test_a_reply_that_is_sent_back_is_found_in_the_cache(client: Any) -> None:
    """The rendered turn is what the model wrote, token by token: thought, text and call."""
    first = ask(client, DIFFERENCE, **TOOL)
    message = first.choices[0].message
    (call,) = message.tool_calls
    messages = [
        {"role": "user", "content": DIFFERENCE},
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "ok"},
    ]
    options = {"max_tokens": 4, "extra_body": {"return_meta_info": True}, **TOOL}
    follow = ask(client, messages, **options)
    written = first.usage.prompt_tokens + first.usage.completion_tokens
    cached = follow.choices[0].model_extra["meta_info"]["cached_tokens"]
    assert cached >= written - 2, "all but the end of the turn"


def test_not_separated(client: Any) -> None:
    options = {"extra_body": {"separate_reasoning": False}}
    at_once = whole(ask(client, SUM, **options))
    assert joined(ask(client, SUM, stream=True, **options)) == at_once
    assert at_once["reasoning"] == ""
    thought, _, answer = at_once["content"].partition("</think>")
    assert "7+8=15" in thought
    assert final_number(answer) == SUM_ANSWER


def test_not_streamed_reasoning_comes_at_once(client: Any) -> None:
    stream = ask(client, SUM, stream=True, extra_body={"stream_reasoning": False})
    thoughts, content = [], ""
    for chunk in stream:
        delta = chunk.choices[0].delta if chunk.choices else None
        if delta is not None and getattr(delta, "reasoning_content", None):
            assert content == ""
            thoughts.append(delta.reasoning_content)
        content += (delta and delta.content) or ""
    (thought,) = thoughts
    assert "7+8=15" in thought
    assert final_number(content) == SUM_ANSWER


def test_not_streamed_reasoning_that_is_cut_off(client: Any) -> None:
    options = {"max_tokens": 12, "extra_body": {"stream_reasoning": False}}
    reply = joined(ask(client, SUM, stream=True, **options))
    assert reply == whole(ask(client, SUM, max_tokens=12))
    assert reply["reasoning"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("begun", "is_content"),
    [
        ("47+38:", False),
        ("47+38=85\n</think>\n\nThe answer is", True),
        ([{"type": "text", "text": "47+38=85\n</think>\n\nThe answer is"}], True),
        ("", False),
    ],
    ids=["inside", "after", "after_in_parts", "empty"],
)
def test_a_message_that_is_continued(
    client: Any, begun: Any, is_content: bool, stream: bool
) -> None:
    messages = [{"role": "user", "content": SUM}, {"role": "assistant", "content": begun}]
    options = {"max_tokens": 40, "extra_body": {"continue_final_message": True}}
    found = ask(client, messages, stream=stream, **options)
    reply = joined(found) if stream else whole(found)
    assert bool(reply["reasoning"]) is not is_content
    assert "think>" not in reply["content"] + reply["reasoning"]
    if is_content:
        assert reply["content"]


def test_a_thought_alone_is_the_content_where_a_request_wants_some(client: Any) -> None:
    """`both`: with streaming it comes once too, if nothing of it has been sent before."""
    wanted = {"chat_template_kwargs": {"force_nonempty_content": True}, "stream_reasoning": False}
    reply = both(client, "\n\n", extra_body=wanted)
    assert reply["content"]
    assert reply["reasoning"] == ""
    cut = {"max_tokens": 3, "extra_body": wanted}
    reply = both(client, "Never said.", **cut)
    assert (bool(reply["content"]), reply["reasoning"]) == (True, "")


def test_append_think(server: LocalServer) -> None:
    """The text is left whole, with the tag that the template opened put before it."""
    for parser, reasoning in (("minimax-append-think", ""), ("minimax", "a")):
        answer = httpx.post(
            f"{server.url}/separate_reasoning",
            json={"text": "a\n</think>\n\nb", "reasoning_parser": parser},
            timeout=60,
        ).json()
        assert answer["reasoning_text"] == reasoning
        assert answer["text"] == ("b" if reasoning else "<think>a\n</think>\n\nb")
