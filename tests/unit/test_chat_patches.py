"""What is changed of SGLang's chat handlers for our parsers, and that others are left alone."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_minimax.patches import chat, thinking_grammar

WRAPPERS: list[Callable[..., Any]] = [
    chat.keep_the_reason_of_a_cut,
    chat.leave_cut_calls_out,
    chat.keep_tags_in_the_text,
    thinking_grammar.begin_behind_a_finished_thought,
    thinking_grammar.keep_them_from_thoughts,
]


class Other:
    """A handler of another model: what we read of it, and nothing that we could change."""

    tool_call_parser = reasoning_parser = "deepseek-r1"

    @property
    def openai_serving_chat(self) -> Other:
        return self


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", ["deepseek-r1", None])
def test_another_model_does_not_notice(wrap: Callable[..., Any], name: str | None) -> None:
    def original(self: Any, *passed: Any, **named: Any) -> Any:
        return passed, named

    handler: Any = Other()
    handler.tool_call_parser = handler.reasoning_parser = name
    # Arguments that SGLang does not have yet, and None for those that it has.
    passed, named = (None, None, None, "new"), {"newer": 1}
    assert wrap(original)(handler, *passed, **named) == (passed, named)


def test_a_grammar_backend_of_another_model_does_not_notice() -> None:
    seen: list[Any] = []

    def original(self: Any, *passed: Any, **named: Any) -> None:
        seen.append((passed, named))

    backend = SimpleNamespace()
    parser = SimpleNamespace(detector=Other())
    init = thinking_grammar.know_what_ends_a_reply(original)
    init(backend, "backend", parser, None, True, "new", newer=1)
    init(backend, tokenizer=None, reasoning_parser=parser, grammar_backend="backend")
    assert seen[0] == (("backend", parser, None, True, "new"), {"newer": 1})
    assert seen[1][0] == ("backend", parser, None)
    assert vars(backend) == {}


CUT, WHOLE = '{"a', "{}"
#: More digits than Python makes a number of.
LONG = '{"a": ' + "1" * 5000 + "}"


def call(arguments: str) -> Any:
    return SimpleNamespace(function=SimpleNamespace(arguments=arguments))


@pytest.mark.parametrize(
    ("name", "calls", "expected"),
    [
        ("minimax-m2", [CUT], "stop"),
        ("minimax-m2", [WHOLE, CUT], "stop"),
        ("minimax-m2", [WHOLE, WHOLE], "tool_calls"),
        ("minimax-m2", [LONG], "tool_calls"),
        ("minimax-m2", [], "tool_calls"),
        ("deepseek-r1", [CUT], "tool_calls"),  # SGLang's own answer
        (None, [CUT], "tool_calls"),
    ],
)
@pytest.mark.parametrize("by_name", [True, False])
def test_the_reason_of_a_cut(
    name: str | None, calls: list[str], expected: str, by_name: bool
) -> None:
    """The last call of a reply is the one that was cut off."""

    def original(self: Any, text: str, tools: Any, finish_reason: Any, *rest: Any) -> Any:
        finish_reason.update(type="tool_calls", matched=None)
        return SimpleNamespace(tool_calls=[call(each) for each in calls] or None)

    reason = {"type": "stop", "matched": "END"}
    handler = SimpleNamespace(tool_call_parser=name)
    wrapped = chat.keep_the_reason_of_a_cut(original)
    if by_name:
        wrapped(handler, "text", tools=[], finish_reason=reason)
    else:
        wrapped(handler, "text", [], reason, "auto", 0)
    matched = "END" if expected == "stop" else None
    assert reason == {"type": expected, "matched": matched}


def test_a_call_without_a_finish_reason() -> None:
    def original(self: Any, *passed: Any) -> Any:
        return SimpleNamespace(tool_calls=[call('{"a')])

    handler = SimpleNamespace(tool_call_parser="minimax-m2")
    wrapped = chat.keep_the_reason_of_a_cut(original)
    assert wrapped(handler, "text", [], None).tool_calls


@pytest.mark.parametrize(
    ("reason", "matched", "arguments", "expected"),
    [
        ("stop", "END", '{"a', ("stop_sequence", "END")),
        ("stop", "END", "{}", ("end_turn", None)),  # whole: SGLang's own answer
        ("stop", 3, '{"a', ("end_turn", None)),  # the model has ended its turn
        ("length", None, '{"a', ("max_tokens", None)),
        ("abort", None, '{"a', (None, None)),
        ("abort", None, "{}", ("end_turn", None)),
    ],
)
def test_anthropics_stop_reason(
    reason: str, matched: Any, arguments: str, expected: tuple[str | None, str | None]
) -> None:
    found = anthropics([arguments], finish_reason=reason, matched_stop=matched)
    assert (found.stop_reason, found.stop_sequence) == expected
    assert ("tool_use" in [block.type for block in found.content]) is (arguments == "{}")


def anthropics(calls: list[str], name: str | None = "minimax-m2", **choice: Any) -> Any:
    """Anthropic's message of a reply with such calls."""
    from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionResponse

    tool_calls = [
        {"id": f"c{number}", "function": {"name": "f", "arguments": arguments}}
        for number, arguments in enumerate(calls)
    ]
    message = {"role": "assistant", "tool_calls": tool_calls}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    response = ChatCompletionResponse(
        id="i", model="m", choices=[{"index": 0, "message": message, **choice}], usage=usage
    )
    chat_handler = SimpleNamespace(tool_call_parser=name, supports_inline_system=True)
    return AnthropicServing(chat_handler)._convert_response(response)


def test_anthropic_keeps_the_whole_calls_before_a_cut_one() -> None:
    found = anthropics(['{"a": 1}', "{}", CUT], finish_reason="length")
    blocks = [(block.type, block.id, block.input) for block in found.content]
    assert blocks == [("tool_use", "c0", {"a": 1}), ("tool_use", "c1", {})]
    assert found.stop_reason == "max_tokens"


def test_anthropic_leaves_out_what_sglang_cannot_read() -> None:
    """It would end the request with a 500."""
    found = anthropics(['{"a": 1}', LONG], finish_reason="tool_calls")
    assert [block.input for block in found.content] == [{"a": 1}]


@pytest.mark.parametrize("name", ["deepseek-r1", None])
def test_anthropics_answer_to_another_model_is_sglangs(name: str | None) -> None:
    found = anthropics([CUT], name, finish_reason="abort")
    assert [(block.type, block.input) for block in found.content] == [("tool_use", {})]
    assert found.stop_reason == "end_turn"


class Spelling:
    """A tokenizer of characters that counts one tag as a special token."""

    def __init__(self, special: str) -> None:
        self.special = special

    def encode(self, text: str, add_special_tokens: bool) -> list[str]:
        return [text] if text == self.special else list(text)

    def decode(self, tokens: list[str], skip_special_tokens: bool) -> str:
        return "".join(each for each in tokens if each != self.special or not skip_special_tokens)


@pytest.mark.parametrize(
    ("name", "special", "asked", "expected"),
    [
        ("minimax", "</think>", True, False),
        ("minimax-append-think", "</think>", True, False),
        ("minimax", "</think>", False, False),
        # Nothing of ours would be lost: special tokens stay out, as the request says.
        ("minimax", "[e~[", True, True),
        ("minimax-append-think", "[e~[", True, True),
        ("minimax", None, True, True),
        ("deepseek-r1", "</think>", True, True),
        (None, "</think>", True, True),
    ],
)
def test_special_tokens_are_kept_for_tags(
    name: str | None, special: str | None, asked: bool, expected: bool
) -> None:
    tokenizer = special and Spelling(special)
    handler = SimpleNamespace(
        reasoning_parser=name, tokenizer_manager=SimpleNamespace(tokenizer=tokenizer)
    )
    request = SimpleNamespace(skip_special_tokens=asked)
    chat.keep_tags_in_the_text(lambda self, request: None)(handler, request)
    assert request.skip_special_tokens is expected


def test_the_bundled_tokenizer_does_not_count_tags_as_special() -> None:
    from tests.grammars import tokenizer

    assert not chat._is_special(tokenizer())
