"""SGLang's view of the reasoning parsers: options of requests, and messages that are continued."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.parser.reasoning_parser import ReasoningParser

from sglang_minimax.parsers.continued import text_of
from sglang_minimax.parsers.reasoning_detector import MinimaxDetector

ANSWER = "Easy.\n</think>\n\nIt is"
QUESTION = {"role": "user", "content": "How much?"}


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def request(content: Any = None, **options: Any) -> ChatCompletionRequest:
    """With a content: one that continues it."""
    begun = [] if content is None else [{"role": "assistant", "content": content}]
    return ChatCompletionRequest(
        model="m",
        messages=[QUESTION, *begun],
        continue_final_message=content is not None,
        **options,
    )


def streamed(parser: ReasoningParser, pieces: list[str]) -> list[tuple[str, str]]:
    """What comes out of each piece and of the end."""
    results = [parser.parse_stream_chunk(each) for each in pieces]
    return [(thought or "", text or "") for thought, text in [*results, parser.parse_stream_end()]]


def joined(results: list[tuple[str, str]]) -> tuple[str, str]:
    thoughts, contents = zip(*results, strict=True)
    return "".join(thoughts), "".join(contents)


# --- messages that are continued ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a", "a"),
        (None, ""),
        ([], ""),
        ([part("a"), part("b")], "a b"),
        ([{"type": "input_text", "text": "a"}, {"type": "image_url", "image_url": {}}], "a"),
        ([SimpleNamespace(type="text", text="a"), SimpleNamespace(type="image_url")], "a"),
        ([{"type": "thinking", "thinking": "a", "text": "b"}, {"type": "text"}, "c"], ""),
    ],
    ids=str,
)
def test_the_text_of_a_message(content: Any, text: str) -> None:
    assert text_of(content) == text


def test_parts_are_joined_as_sglang_joins_them() -> None:
    from sglang.srt.parser.jinja_template_utils import (
        detect_jinja_template_content_format,
        process_content_for_template_format,
    )

    from sglang_minimax import TINY_M2

    template = (TINY_M2 / "chat_template.jinja").read_text()
    kind = detect_jinja_template_content_format(template)
    (message,) = request([part("a"), part("\n</think>")]).messages[1:]
    lists: list[list[Any]] = [[], [], [], []]
    found = process_content_for_template_format(message.model_dump(), kind, *lists)
    assert text_of(message.content) == found["content"] == "a \n</think>"


@pytest.mark.parametrize("content", [ANSWER, [part(ANSWER)], [part("Easy."), part("</think>")]])
def test_an_answer_goes_on_as_content(content: Any) -> None:
    asked = request(content)
    assert ReasoningParser("minimax", request=asked).parse_non_stream("85.") == ("", "85.")
    pieces = ["8", "5."]
    assert joined(streamed(ReasoningParser("minimax", request=asked), pieces)) == ("", "85.")


@pytest.mark.parametrize("content", ["Eas", [part("Eas")], ""])
def test_a_thought_goes_on_as_a_thought(content: Any) -> None:
    parser = ReasoningParser("minimax", request=request(content))
    assert parser.parse_non_stream("y.\n</think>\n\n85") == ("y.", "85")


@pytest.mark.parametrize(
    ("content", "opening"),
    [(None, "<think>"), ("", "<think>"), ("Eas", ""), (ANSWER, ""), ([part(ANSWER)], "")],
    ids=str,
)
def test_nothing_is_put_into_the_middle_of_a_message(content: Any, opening: str) -> None:
    asked, name = request(content), "minimax-append-think"
    assert ReasoningParser(name, request=asked).parse_non_stream("ab") == ("", f"{opening}ab")
    results = streamed(ReasoningParser(name, request=asked), ["a", "b"])
    assert results == [("", f"{opening}a"), ("", "b"), ("", "")]


# --- a reply that is only a thought ------------------------------------------------------------

ONLY_THOUGHTS = ["a", "a</think>", "a\n</think>\n\n"]
FORCED = request(chat_template_kwargs={"force_nonempty_content": True})


def forced(stream_reasoning: bool = False) -> ReasoningParser:
    return ReasoningParser("minimax", stream_reasoning=stream_reasoning, request=FORCED)


@pytest.mark.parametrize("text", ONLY_THOUGHTS)
def test_a_thought_alone_is_the_content(text: str) -> None:
    assert forced().parse_non_stream(text) == ("", "a")
    assert joined(streamed(forced(), [text])) == ("", "a")
    assert joined(streamed(forced(), list(text))) == ("", "a")


@pytest.mark.parametrize("text", ONLY_THOUGHTS)
def test_a_thought_that_was_streamed_is_the_content_as_well(text: str) -> None:
    """As in SGLang's base class, which does so only where the thought was cut off."""
    assert joined(streamed(forced(stream_reasoning=True), list(text))) == ("a", "a")
    base = ReasoningParser("deepseek-r1", request=FORCED)
    assert joined(streamed(base, ["a"])) == ("a", "a")


@pytest.mark.parametrize("stream_reasoning", [True, False])
def test_a_thought_with_content_stays_one(stream_reasoning: bool) -> None:
    for text in ("a\n</think>\n\nb", "a\n<minimax:tool_call>"):
        whole = forced().parse_non_stream(text)
        assert whole[0] == "a"
        assert joined(streamed(forced(stream_reasoning), list(text))) == whole


@pytest.mark.parametrize("stream_reasoning", [True, False])
def test_content_that_was_held_back_stays_content(stream_reasoning: bool) -> None:
    """Behind the thought of a continued message; it might have been an opening tag."""
    wanted = {"force_nonempty_content": True}
    parser = ReasoningParser(
        "minimax",
        stream_reasoning=stream_reasoning,
        request=request(ANSWER, chat_template_kwargs=wanted),
    )
    assert parser.parse_non_stream("<th") == ("", "<th")
    assert streamed(parser, ["<t", "h"]) == [("", ""), ("", ""), ("", "<th")]


def test_a_thought_that_is_not_streamed_is_kept_in_pieces() -> None:
    """Added up piece by piece, a long one would take quadratic time."""
    detector = MinimaxDetector(stream_reasoning=False)
    for piece in "abc":
        assert detector.parse_streaming_increment(piece).reasoning_text == ""
    assert detector._thoughts == ["a", "b", "c"]
    assert detector.parse_streaming_increment("</think>").reasoning_text == "abc"
    assert detector._thoughts == []


# --- what SGLang reads of the parser -----------------------------------------------------------


@pytest.mark.parametrize("name", ["minimax", "minimax-append-think"])
def test_every_reply_thinks(name: str) -> None:
    """No request can switch it off, and its grammar waits for `</think>`."""
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat

    handler = OpenAIServingChat.__new__(OpenAIServingChat)
    handler.reasoning_parser = name
    handler.template_manager = SimpleNamespace(reasoning_config=None)
    handler._reasoning_detector = ReasoningParser(name).detector
    asked = request(chat_template_kwargs={"enable_thinking": False, "thinking": False})
    assert handler._get_reasoning_from_request(asked)
    handler.apply_reasoning_enabled(asked, True)
    with pytest.raises(ValueError, match="always-on"):
        handler.apply_reasoning_enabled(asked, False)


@pytest.mark.parametrize("name", ["minimax", "minimax-append-think"])
def test_what_the_base_class_is_told(name: str) -> None:
    found = ReasoningParser(name).detector
    # Nothing of ours asks this; of the base class, other code may.
    assert found._find_tool_start("a<minimax:tool_call>") == 1
    # Else SGLang would put `<think>` behind prompts that no chat template makes.
    assert found.thinks_internally


def test_whether_it_thinks_is_told_after_each_piece() -> None:
    found = MinimaxDetector()
    told = []
    for piece in ("a", "</th", "ink>", "b"):
        found.parse_streaming_increment(piece)
        told.append(found._in_reasoning)
    assert told == [True, True, False, False]
