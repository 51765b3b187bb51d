"""Reasoning apart from content: each rule, wherever the reply is cut, and the way back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_minimax.parsers.reasoning import Parts, ReasoningParser
from tests.parsers.replies import CLOSE, OPEN, both, every, pieces, think, wire
from tests.parsers.wire_text import LISTS, NUMBERS, STRINGS, TEXTS, message, pieced, render

BLOCK = wire(("f", {"s": "x"}))

# reply, reasoning, content
RULES = [
    ("", "", ""),
    ("thought", "thought", ""),
    ("thought</think>content", "thought", "content"),
    # What the chat template puts around the two is taken off, and no more.
    ("thought\n</think>\n\ncontent", "thought", "content"),
    ("thought\n</think>\ncontent", "thought", "content"),
    ("thought\n\n</think>\n\n\ncontent\n", "thought\n", "\ncontent\n"),
    ("thought \n</think> \n\ncontent", "thought ", " \n\ncontent"),
    ("thought\n</think>", "thought", ""),
    ("thought\n</think>\n", "thought", ""),
    ("thought\n</think>\n\n", "thought", ""),
    ("\n</think>\n\ncontent", "", "content"),
    ("</think>content", "", "content"),
    ("\nthought", "\nthought", ""),
    # Some releases open the reasoning themselves.
    ("<think>thought</think>content", "thought", "content"),
    ("<think>\nthought\n</think>\n\ncontent", "thought", "content"),
    ("<think>\n\nthought</think>content", "\nthought", "content"),
    (" \n<think>thought</think>content", "thought", "content"),
    ("<think></think>content", "", "content"),
    ("<think>", "", ""),
    ("\n<think>\n", "", ""),
    ("  <thi", "  <thi", ""),
    ("  <thinking", "  <thinking", ""),
    ("  thought", "  thought", ""),
    # Only there.
    ("a <think> b</think>c", "a <think> b", "c"),
    ("<think><think>a</think>b", "<think>a", "b"),
    # The first end is the end; later tags are content.
    ("a</think>b</think>c", "a", "b</think>c"),
    ("a</think><think>b</think>c", "a", "<think>b</think>c"),
    # A block of tool calls ends the reasoning, whichever comes first.
    (f"a\n{BLOCK}", "a", f"\n{BLOCK}"),
    (f"a{BLOCK}b", "a", f"{BLOCK}b"),
    (BLOCK, "", BLOCK),
    (f"<think>{BLOCK}", "", BLOCK),
    (f"a{OPEN}b</think>c", "a", f"{OPEN}b</think>c"),
    (f"a\n</think>\n\n{BLOCK}", "a", BLOCK),
    (f"a</think>b\n{BLOCK}", "a", f"b\n{BLOCK}"),
    # Tags of other models and of parts of a call do not.
    ("use <tool_call> or [TOOL_CALLS]</think>b", "use <tool_call> or [TOOL_CALLS]", "b"),
    ('<invoke name="f"></invoke></think>b', '<invoke name="f"></invoke>', "b"),
    (f"a{CLOSE}</think>b", f"a{CLOSE}", "b"),
    ("a </thinking> </ think></think>b", "a </thinking> </ think>", "b"),
    # A beginning of a tag is reasoning where the reply ends.
    ("a\n</thin", "a\n</thin", ""),
    ("a\n<minimax:tool_call", "a\n<minimax:tool_call", ""),
    ("a\n", "a\n", ""),
]


@pytest.mark.parametrize(("reply", "thoughts", "content"), RULES, ids=repr)
def test_rules(reply, thoughts, content):
    assert think(reply) == (thoughts, content)
    for size in (1, 2, 3, 7):
        assert think(every(reply, size)) == (thoughts, content)
    for place in range(len(reply)):
        assert think(pieces(reply, [place])) == (thoughts, content)


@pytest.mark.parametrize(
    ("reply", "thoughts", "content"),
    [
        ("content", "", "content"),
        ("\n\ncontent</think>more", "", "\n\ncontent</think>more"),
        (f"a\n{BLOCK}", "", f"a\n{BLOCK}"),
        ("<thin", "", "<thin"),
        # It may open the reasoning itself.
        ("<think>\nthought\n</think>\n\ncontent", "thought", "content"),
        ("a <think>b</think>", "", "a <think>b</think>"),
    ],
    ids=repr,
)
def test_a_reply_that_begins_outside(reply, thoughts, content):
    for cut in ([reply], every(reply, 1), every(reply, 3)):
        assert think(cut, inside=False) == (thoughts, content)


def test_both_tags_in_one_piece():
    thoughts, reply = both(f"I call.\n</think>\n\nNow:\n{BLOCK}\nDone.")
    assert (thoughts, reply.text) == ("I call.", "Now:\nDone.")
    assert reply.values() == [("f", {"s": "x"})]


def test_a_thought_that_jumps_to_a_call():
    for cut in ([f"I call.\n{BLOCK}"], every(f"I call.\n{BLOCK}", 1)):
        thoughts, reply = both(cut)
        assert (thoughts, reply.text) == ("I call.", "")
        assert reply.values() == [("f", {"s": "x"})]


def test_a_value_that_holds_the_end_of_reasoning():
    thoughts, reply = both(f"a{wire(('f', {'s': 'b</think>c'}))}")
    assert thoughts == "a"
    assert reply.values() == [("f", {"s": "b</think>c"})]


def test_a_parser_knows_whether_it_is_thinking():
    parser = ReasoningParser()
    assert parser.is_thinking
    assert parser.feed("<think>a") == Parts("a", "")
    assert parser.feed("b</think") == Parts("b", "")
    assert parser.is_thinking
    assert parser.feed(">") == Parts("", "")
    assert not parser.is_thinking
    assert parser.feed("\n\nc") == Parts("", "c")
    assert parser.finish() == Parts("", "")


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    "text", [" \n", " <thi", "\n<think>", "<think>\n", "a\n</thi", "a</think>", "a</think>\nb"]
)
def test_a_second_end_says_nothing(text, inside):
    parser = ReasoningParser(inside=inside)
    parser.feed(text)
    parser.finish()
    assert parser.finish() == Parts("", "")


def test_reasoning_streams_but_for_what_may_be_a_tag():
    parser = ReasoningParser()
    assert [parser.feed(each).reasoning for each in ("a\n", "b <", "/th", "x", "\n\n")] == [
        *("a", "\nb ", "", "</thx", "\n")
    ]


# --- the way back ---

THOUGHTS = pieced().filter(
    lambda text: (
        text != "" and "</think>" not in text and OPEN not in text and not _opens_again(text)
    )
)


def _opens_again(text: str) -> bool:
    """What is left off a beginning cannot come back."""
    return text.lstrip().startswith("<think>")


@settings(max_examples=80, deadline=None)
@given(
    thoughts=THOUGHTS,
    content=TEXTS.filter(lambda text: "<think>" not in text),
    values=st.dictionaries(st.sampled_from("abc"), st.one_of(STRINGS, NUMBERS, LISTS), max_size=3),
    calls=st.integers(0, 2),
    cuts=st.lists(st.integers(1, 300), max_size=20),
)
def test_a_reply_that_is_sent_back_renders_to_what_was_generated(
    thoughts, content, values, calls, cuts
):
    """So the next turn finds its prompt in the KV cache."""
    types = {key: _type_of(value) for key, value in values.items()}
    tools = {"f": {"type": "object", "properties": types}}
    sent = message(content, [("f", values)] * calls, reasoning=thoughts)
    turn = render("tiny-m2", sent)
    assert turn.startswith("<think>\n")
    generated = turn.removeprefix("<think>\n")  # the prompt ends with it
    for cut in ([generated], pieces(generated, cuts), every(generated, 1)):
        found, reply = both(cut, tools)
        back = message(reply.text, [*reply.values()], reasoning=found)
        assert render("tiny-m2", back) == turn
        assert json.dumps(back) == json.dumps(sent)


def _type_of(value: object) -> dict[str, str]:
    if isinstance(value, str):
        return {"type": "string"}
    return {"type": "array" if isinstance(value, list) else "number"}
