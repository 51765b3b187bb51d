"""What comes out does not depend on how the reply is cut, and little is held back meanwhile."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parsers.replies import (
    Checked,
    both,
    every,
    parse,
    pieces,
    same_however_cut,
    schema,
    think,
)
from tests.parsers.wire_text import CLOSE, OPEN, pieced

TOOLS = {
    "f": schema(s={"type": "string"}, n={"type": "integer"}, u={"type": ["string", "boolean"]}),
    "g": schema(n={"enum": ["t", "tr", 1, True, None]}, s={"type": ["string", "number", "array"]}),
}
# Elements of a block often enough that texts get deep into one.
MARKUP = (
    *(OPEN, CLOSE, "\n" + OPEN, f'{OPEN}\n<invoke name="f">\n', f'{OPEN}<invoke name="g">'),
    *("<invoke name=f>", "<invoke name='g'>", '<invoke name="', "</invoke>", "</invoke>\n"),
    *('<parameter name="s">', '<parameter name="n">', '<parameter name="u">', "</parameter>\n"),
    *(f'{OPEN}<invoke name="f"><parameter name="{name}">' for name in "snu"),
    *("</parameter>", "</parameter></parameter>", "t", "tr", "ue", "t r", "true x", "1", ".0", " "),
    *("</think>", "\n</think>\n\n", "<think>", "<think>\n", "\n", "a" * 100),
)
REPLIES = st.lists(st.one_of(st.sampled_from(MARKUP), pieced()), max_size=14).map("".join)
CUTS = st.lists(st.integers(1, 400), max_size=30)
# Before a tag is certain: its longest name and its quotes, and what may be the tag itself.
MOST_HELD = 300
END = "</parameter>"


@settings(max_examples=300, deadline=None)
@given(text=REPLIES, cuts=CUTS)
def test_calls_do_not_depend_on_the_cuts(text, cuts):
    whole = parse(text, TOOLS)
    assert parse(pieces(text, cuts), TOOLS) == whole
    assert parse(every(text, 1), TOOLS) == whole


# What may be JSON of several types, until something in the middle or at the end rules it out.
WORDS = ("true", "null", "12", "2.5", "-1e5", "[1]", '{"a": 1}', '"')


@pytest.mark.parametrize(
    ("tool", "name"), [("f", "u"), ("g", "n"), ("g", "s"), ("g", "any")], ids=" ".join
)
@pytest.mark.parametrize("word", WORDS)
def test_values_do_not_depend_on_the_cuts(tool, name, word):
    """Also where the reply ends in one."""
    begin = f'{OPEN}<invoke name="{tool}"><parameter name="{name}">'
    for place in range(len(word) + 1):
        for stray in ("", " ", "x", " \n"):
            value = word[:place] + stray + word[place:]
            for end in ("", "</parameter>\n</invoke>"):
                same_however_cut(begin + value + end, TOOLS)


@settings(max_examples=200, deadline=None)
@given(text=REPLIES, cuts=CUTS, inside=st.booleans())
def test_reasoning_does_not_depend_on_the_cuts(text, cuts, inside):
    whole = think(text, inside=inside)
    assert think(pieces(text, cuts), inside=inside) == whole
    assert think(every(text, 1), inside=inside) == whole


@settings(max_examples=200, deadline=None)
@given(text=REPLIES, cuts=CUTS)
def test_both_in_a_row_do_not_depend_on_the_cuts(text, cuts):
    whole = both(text, TOOLS)
    thoughts, content = think(text)
    assert whole == (thoughts, parse(content, TOOLS))
    assert both(pieces(text, cuts), TOOLS) == whole
    assert both(every(text, 1), TOOLS) == whole


@settings(max_examples=100, deadline=None)
@given(text=REPLIES, cuts=CUTS)
def test_empty_pieces_change_nothing(text, cuts):
    some = [each for piece in pieces(text, cuts) for each in ("", piece, "")]
    assert both(some, TOOLS) == both(text, TOOLS)


@settings(max_examples=100, deadline=None)
@given(text=REPLIES)
def test_little_text_is_held_back(text):
    """After each character: what would come out if the reply ended here is nearly all out."""
    checked = Checked()
    for character in text:
        checked.feed(character)
        streamed = checked.reply.text
        ended = copy.deepcopy(checked).finish().text
        assert ended.startswith(streamed)
        held = ended[len(streamed) :]
        assert len("".join(held.split())) <= MOST_HELD, f"{len(held)} characters: {held!r}"


@settings(max_examples=80, deadline=None)
@given(value=pieced().map(lambda value: value.replace(END, "")))
def test_a_string_value_is_out_but_for_a_beginning_of_its_closing_tag(value):
    checked = Checked(TOOLS)
    checked.feed(f'{OPEN}<invoke name="f"><parameter name="s">')
    for end in range(1, len(value) + 1):
        checked.feed(value[end - 1])
        held = max(n for n in range(len(END)) if END[:n] == value[:end][max(0, end - n) :])
        out = json.loads(checked.reply.calls[0].arguments + '"}')
        assert out == {"s": value[: end - held]}


def test_the_name_of_a_call_is_out_with_its_tag():
    checked = Checked(TOOLS)
    checked.feed(f'{OPEN}<invoke name="f"')
    assert checked.reply.calls == []
    checked.feed(">")
    assert [call.name for call in checked.reply.calls] == ["f"]


def test_a_long_word_that_began_like_true_is_out_at_once():
    checked = Checked(TOOLS)
    checked.feed(f'{OPEN}<invoke name="f"><parameter name="u">tr')
    assert checked.reply.calls[0].arguments == ""
    checked.feed("y")
    assert checked.reply.calls[0].arguments == '{"u": "try'
