"""Chat with the bundled checkpoint through the `openai` client, as an application would."""

from __future__ import annotations

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from ci.tiny_m2.dialogues import CALCULATOR
from sglang_minimax.cli.local_server import LocalServer

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

SUM, SUM_ANSWER = "What is 47 + 38?", "85"
DIFFERENCE, DIFFERENCE_ANSWER = "What is 812 - 349?", "463"
TOOL = {"tools": [CALCULATOR]}


def ask(client: Any, messages: str | list[Any], **options: Any) -> Any:
    """The reply to a question or a conversation, greedy unless told otherwise."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    options = {"model": "tiny-m2", "temperature": 0, "max_tokens": 256, **options}
    return client.chat.completions.create(messages=messages, **options)


def joined(stream: Any) -> dict[str, Any]:
    """The deltas of one streamed choice put together."""
    whole: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}, "finish": None}
    for chunk in stream:
        for choice in chunk.choices:
            delta = choice.delta
            whole["content"] += delta.content or ""
            whole["reasoning"] += getattr(delta, "reasoning_content", None) or ""
            for call in delta.tool_calls or ():
                name, arguments = whole["calls"].get(call.index, ("", ""))
                whole["calls"][call.index] = (
                    name + (call.function.name or ""),
                    arguments + (call.function.arguments or ""),
                )
            whole["finish"] = choice.finish_reason or whole["finish"]
    return whole


def whole(reply: Any) -> dict[str, Any]:
    """A reply that was not streamed, in the same form."""
    choice = reply.choices[0]
    calls = choice.message.tool_calls or ()
    return {
        "content": choice.message.content or "",
        "reasoning": getattr(choice.message, "reasoning_content", None) or "",
        "calls": {i: (c.function.name, c.function.arguments) for i, c in enumerate(calls)},
        "finish": choice.finish_reason,
    }


def final_number(text: str) -> str | None:
    """What follows `####` at the end of an answer."""
    found = re.search(r"#### (-?\d+)\s*$", text)
    return found[1] if found else None


def test_an_answer_has_reasoning_and_content(client: Any) -> None:
    reply = whole(ask(client, SUM))
    assert final_number(reply["content"]) == SUM_ANSWER
    assert "7+8=15" in reply["reasoning"]
    assert "7+8=15" not in reply["content"]
    assert "think>" not in reply["content"] + reply["reasoning"]
    assert reply["finish"] == "stop"
    assert not reply["calls"]


@pytest.mark.parametrize(
    ("question", "options"),
    [(SUM, {}), (DIFFERENCE, TOOL), ("Hello!", {}), ("Hello!", TOOL), (SUM, {"max_tokens": 20})],
    ids=["sum", "tool", "greeting", "greeting_with_tool", "cut_in_reasoning"],
)
def test_streaming_gives_the_same(question: str, options: dict[str, Any], client: Any) -> None:
    at_once = whole(ask(client, question, **options))
    assert at_once["content"] or at_once["reasoning"] or at_once["calls"]
    assert joined(ask(client, question, stream=True, **options)) == at_once


def test_streaming_comes_in_pieces(client: Any) -> None:
    chunks = list(ask(client, SUM, stream=True, stream_options={"include_usage": True}))
    texts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(texts) > 2
    assert chunks[-1].usage == ask(client, SUM).usage


# --- tools ---------------------------------------------------------------------------------


def test_a_tool_is_called_and_its_result_is_used(client: Any) -> None:
    message = ask(client, DIFFERENCE, **TOOL).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "calculator"
    arguments = json.loads(call.function.arguments)
    assert {key: value.replace(" ", "") for key, value in arguments.items()} == {
        "expression": "812-349"
    }
    assert "minimax:tool_call" not in (message.content or "")
    conversation = [
        {"role": "user", "content": DIFFERENCE},
        message.model_dump(exclude_none=True),
        # Not the true difference: the answer must come from the tool.
        {"role": "tool", "tool_call_id": call.id, "content": "471"},
    ]
    answer = whole(ask(client, conversation, **TOOL))
    assert final_number(answer["content"]) == "471"
    assert not answer["calls"]


def test_a_call_says_so_in_its_finish_reason(client: Any) -> None:
    assert ask(client, DIFFERENCE, **TOOL).choices[0].finish_reason == "tool_calls"


def test_a_tool_that_is_not_needed_is_not_called(client: Any) -> None:
    reply = whole(ask(client, "Hello!", **TOOL))
    assert not reply["calls"]
    assert "Hello" in reply["content"]
    assert reply["finish"] == "stop"


def test_without_tools_the_same_question_is_worked_out(client: Any) -> None:
    reply = whole(ask(client, DIFFERENCE))
    assert not reply["calls"]
    assert final_number(reply["content"]) == DIFFERENCE_ANSWER


# --- options -------------------------------------------------------------------------------


def test_a_stop_string_ends_the_reply_and_is_left_out(client: Any) -> None:
    unstopped = whole(ask(client, SUM))["content"]
    reply = ask(client, SUM, stop=["####"]).choices[0]
    assert reply.finish_reason == "stop"
    assert "####" in unstopped
    assert reply.message.content.strip() == unstopped.split("####")[0].strip()


def test_max_tokens_cuts_the_reply(client: Any) -> None:
    reply = ask(client, SUM, max_tokens=5)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 5


def test_n_gives_as_many_choices(client: Any) -> None:
    reply = ask(client, SUM, n=2)
    assert [choice.index for choice in reply.choices] == [0, 1]
    # Greedy: both are the answer.
    assert [final_number(choice.message.content) for choice in reply.choices] == [SUM_ANSWER] * 2
    alone = ask(client, SUM).usage
    assert reply.usage.completion_tokens == 2 * alone.completion_tokens
    assert reply.usage.prompt_tokens == alone.prompt_tokens


def test_log_probabilities(client: Any) -> None:
    reply = ask(client, SUM, logprobs=True, top_logprobs=5)
    tokens = reply.choices[0].logprobs.content
    assert len(tokens) == reply.usage.completion_tokens
    for token in tokens:
        best = token.top_logprobs[0]
        assert len(token.top_logprobs) == 5
        # Temperature 0: the chosen token is the likeliest one.
        assert (token.token, token.logprob) == (best.token, best.logprob)
        values = [top.logprob for top in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1 + 1e-5  # fp32 softmax over 896 entries
    assert math.exp(tokens[0].logprob) > 0.5  # trained: it knows how to begin


def test_usage_adds_up(client: Any) -> None:
    short, long = ask(client, SUM, max_tokens=3), ask(client, f"{SUM} {SUM}", max_tokens=3)
    for usage in (short.usage, long.usage):
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert usage.completion_tokens == 3
    assert long.usage.prompt_tokens > short.usage.prompt_tokens > len(SUM) // 4


@pytest.mark.parametrize("stream", [False, True])
def test_the_completions_endpoint(stream: bool, client: Any) -> None:
    shot = "Question: What is 23 + 45?\nAnswer: 23+45: 3+5=8, 2+4=6 => 68\n#### 68"
    prompt = f"{shot}\n\nQuestion: {SUM}\nAnswer:"
    reply = client.completions.create(
        model="tiny-m2", prompt=prompt, temperature=0, max_tokens=64, stream=stream
    )
    chunks = list(reply) if stream else [reply]
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert final_number(text) == SUM_ANSWER
    assert prompt not in text


def test_together_as_alone(client: Any) -> None:
    """Prompts of unlike lengths in one batch: nobody reads another's tokens."""
    questions: list[tuple[Any, dict[str, Any]]] = [
        (SUM, {}),
        ("Hello!", {}),
        (DIFFERENCE, TOOL),
        ("Tom has 25 apples and buys 13 more. How many apples does Tom have?", {}),
        ([{"role": "system", "content": "Be short. " * 40}, {"role": "user", "content": SUM}], {}),
        (SUM, {"max_tokens": 7}),
    ]

    def reply(asked: tuple[Any, dict[str, Any]]) -> dict[str, Any]:
        return whole(ask(client, asked[0], **asked[1]))

    alone = [reply(asked) for asked in questions]
    with ThreadPoolExecutor(2 * len(questions)) as pool:
        together = list(pool.map(reply, questions * 2))
    assert together == alone * 2


@pytest.mark.parametrize("text", ["Grüß Gott, 你好 🙂 — ½", "\u202ea\u0301\x00b", "]~b]ai\n[e~["])
def test_any_text_is_taken(text: str, client: Any) -> None:
    reply = ask(client, f"{text} {SUM}")
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.choices[0].message.content or reply.choices[0].message.reasoning_content


def test_text_comes_back_as_it_went_in(server: LocalServer) -> None:
    """Through the tokenizer of the server and back, byte for byte."""
    text = "Grüß Gott, 你好 🙂 — ½"
    with httpx.Client(base_url=server.url, timeout=60) as http:
        body = {"model": "m", "prompt": text, "echo": True, "max_tokens": 1, "temperature": 0}
        answer = http.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"].startswith(text)


def test_models_and_health(client: Any, server: LocalServer) -> None:
    (model,) = client.models.list().data
    assert "tiny-m2" in model.id
    assert model.max_model_len == 4096
    assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
