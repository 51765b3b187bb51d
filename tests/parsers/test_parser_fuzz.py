"""Anything may come: no exception, no text lost outside of blocks, and time as the length."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sglang_minimax.parsers.reasoning import ReasoningParser
from sglang_minimax.parsers.schema import of_tool
from sglang_minimax.parsers.tool_calls import Arguments, Text, ToolCallParser
from tests.parsers.replies import CLOSE, OPEN, both, every, parse, schema, think
from tests.parsers.wire_text import JSON_VALUES, pieced

TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
TOOLS = {"f": schema(**{each: {"type": each} for each in TYPES})}
BEGIN = f'{OPEN}<invoke name="f">'
END = f"</invoke>{CLOSE}"


def value(kind: str, text: str) -> str:
    return f'{BEGIN}<parameter name="{kind}">{text}</parameter>{END}'


# --- anything ---

BYTES = st.binary(max_size=200)
DECODED = st.one_of(
    BYTES.map(lambda raw: raw.decode(errors="replace")),
    BYTES.map(lambda raw: raw.decode(errors="surrogateescape")),
    st.text(max_size=200),
    pieced(),
)


@settings(max_examples=150, deadline=None)
@given(text=DECODED)
def test_text_without_a_block_comes_through(text):
    assume(OPEN not in text)
    found = parse(text)
    assert (found.text, found.calls) == (text, [])
    assert parse(every(text, 1)).text == text


@settings(max_examples=100, deadline=None)
@given(text=DECODED, kind=st.sampled_from(TYPES))
def test_any_value_of_any_type_is_a_call(text, kind):
    text = text.replace("</parameter>", "")
    reply = parse(value(kind, text), TOOLS)
    assert reply.text == ""
    ((name, given),) = reply.values()
    assert (name, list(given)) == ("f", [kind])
    if kind == "string":
        assert given[kind] == text


@settings(max_examples=100, deadline=None)
@given(text=DECODED)
def test_no_character_of_the_reasoning_is_lost(text):
    assume("</think>" not in text and OPEN not in text)
    assume(not text.lstrip().startswith("<think>"))
    assert think(text) == (text, "")
    assert think(text, inside=False) == ("", text)


@settings(max_examples=100, deadline=None)
@given(parameters=JSON_VALUES, name=pieced())
def test_any_schema_can_be_asked(parameters, name):
    of_tool(parameters).allowed(name)
    of_tool({"properties": {name: parameters}}).allowed(name)


@settings(max_examples=60, deadline=None)
@given(before=DECODED, after=DECODED)
def test_text_around_a_block_comes_through(before, after):
    assume(OPEN not in before and OPEN not in after and not before.endswith("\n"))
    found = parse(before + value("string", "x") + after, TOOLS)
    assert found.text == before + after
    assert found.values() == [("f", {"string": "x"})]


# --- what breaks readers of JSON ---

HARD = {
    "brackets": "[" * 100_000,
    "closed brackets": "[" * 100_000 + "]" * 100_000,
    "objects": '{"a":' * 100_000,
    "digits": "1" + "0" * 5000,
    "digits in an object": '{"a": 1' + "0" * 5000 + "}",
    "digits and a line break": '{"a": "\n", "b": 1' + "0" * 5000 + "}",
    "exponent": "1e999",
    "exponent in a list": "[1e999]",
    "exponent and a line break": '["\n", -1e999]',
    "inf": "inf",
    "Infinity": "Infinity",
    "-inf": "-inf",
    "nan": "nan",
    "NaN": "NaN",
    "[NaN]": "[NaN]",
    "-0": "-0",
    "-": "-",
    "surrogate": '["\ud800"]',
    "quotes": '["' + '\\"' * 100_000,
    "keys": "{" + ", ".join(f'"{n}": {n}' for n in range(20_000)) + "}",
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("kind", [*TYPES, "none"])
def test_hard_values(name, kind):
    text = HARD[name]
    whole = _arguments(value(kind, text))
    assert whole == _arguments(*every(value(kind, text), 5000))
    key, _, given = whole.partition(": ")
    assert (key, given[-1]) == ('{"' + kind + '"', "}")
    # Either as it was written, but for characters that JSON does not allow, or as a string.
    if given[:-1] != text:
        read = json.loads(given[:-1], parse_int=str, parse_constant=_no_constant)
        if isinstance(read, str):
            assert read == text
        else:
            assert json.loads(text, strict=False, parse_int=str) == read


def _arguments(*cut: str) -> str:
    parser = ToolCallParser(TOOLS)
    events = [event for piece in cut for event in parser.feed(piece)] + parser.finish()
    return "".join(event.json for event in events if isinstance(event, Arguments))


def _no_constant(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


def test_many_parameters():
    names = "".join(f'<parameter name="{n}">{n}</parameter>' for n in range(100_000))
    given = json.loads(_arguments(BEGIN + names + END))
    assert given == {str(n): n for n in range(100_000)}


def test_a_schema_that_doubles_at_each_step_is_read_once():
    """A request's schema must not stop the server: 2**40 steps if each reference were followed."""
    both_next = [
        {"anyOf": [{"$ref": f"#/$defs/{n + 1}"}, {"$ref": f"#/$defs/{n + 1}"}]} for n in range(40)
    ]
    itself = {"anyOf": [{"$ref": "#/$defs/me"}] * 2, "allOf": [{"$ref": "#/$defs/me"}] * 2}
    definitions = {str(n): each for n, each in enumerate(both_next)} | {"me": itself}
    parameters = {
        "$defs": definitions,
        "allOf": [{"$ref": "#"}, {"$ref": "#"}],
        "properties": {"a": {"$ref": "#/$defs/0"}, "b": {"$ref": "#/$defs/me"}},
    }
    found = parse(f'{BEGIN}<parameter name="a">1</parameter>{END}', {"f": parameters})
    assert found.values() == [("f", {"a": 1})]


# --- time ---

Make = Callable[[int], str]
SHAPES: dict[str, Make] = {
    "plain text": lambda n: "a" * n,
    "<": lambda n: "<" * n,
    "white space": lambda n: " " * n,
    "line breaks": lambda n: "\n" * n,
    "beginnings of a tag": lambda n: "<minimax:tool_cal" * (n // 17),
    "< in a block": lambda n: OPEN + "<" * n,
    "white space in a block": lambda n: OPEN + " " * n,
    "tags without a name": lambda n: OPEN + "<invoke name=" * (n // 13),
    "opening tags": lambda n: OPEN * (n // len(OPEN)),
    "blocks": lambda n: (OPEN + CLOSE) * (n // 39),
    "calls": lambda n: OPEN + '<invoke name="f"></invoke>' * (n // 26),
    "parameters": lambda n: BEGIN + '<parameter name="a">1</parameter>' * (n // 33),
    "a string": lambda n: value("string", "a" * n),
    "line breaks in a string": lambda n: value("string", "\n" * n),
    "closing tags in a string": lambda n: value("string", "</parameter>" * (n // 12)),
    "tags and space in a string": lambda n: value("string", "</parameter> " * (n // 13)),
    "space behind a tag": lambda n: value("string", "</parameter>" + " " * n),
    "< in a string": lambda n: value("string", "<" * n),
    "a number": lambda n: value("number", "1" * n),
    "an integer": lambda n: value("integer", "1" * n + "." + "0" * n),
    "space of any type": lambda n: value("any", " " * n),
    "space after a word": lambda n: value("any", "true" + " " * n),
    "digits of any type": lambda n: value("any", "1" * n),
    "a list": lambda n: value("array", "[" + "1," * (n // 2) + "1]"),
    "a broken list": lambda n: value("array", '["\n' + '\\"' * (n // 2)),
    "an object": lambda n: value("object", '{"a": "' + "\n" * n + '"}'),
    "brackets": lambda n: value("any", "[" * n),
    "thoughts": lambda n: "a <b\n" * (n // 5) + "</think>\n\nb",
    "space before <think>": lambda n: " " * n + "<think>\na",
}
TIMES = 4
# 4 times the text; quadratic work would take 16 times as long. Observed up to 5.
MOST = 8.0
# Below this the clock and the garbage collector are what is measured.
NEGLIGIBLE = 0.05
# What is not looked at again: a name, its quotes, and a tag.
BUFFER = 300


def _seconds(text: str, size: int) -> float:
    cut = every(text, size)
    best = float("inf")
    gc.disable()  # its work grows with all that pytest has loaded
    for _ in range(2):
        reasoning, calls = ReasoningParser(), ToolCallParser(TOOLS)
        before = time.process_time()
        for piece in cut:
            parts = reasoning.feed(piece)
            calls.feed(parts.reasoning)
            calls.feed(parts.content)
        reasoning.finish()
        calls.finish()
        best = min(best, time.process_time() - before)
    gc.enable()
    return best


def _grows_as_the_length(make: Make, length: int, size: int) -> None:
    long = _seconds(make(length * TIMES), size)
    if long > NEGLIGIBLE:
        assert long <= MOST * _seconds(make(length), size) + NEGLIGIBLE


@pytest.mark.parametrize("name", SHAPES)
def test_time_grows_as_the_length(name):
    _grows_as_the_length(SHAPES[name], 10_000, 4)
    _grows_as_the_length(SHAPES[name], 20_000, 1 << 30)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_time_of_half_a_megabyte_grows_as_the_length(name):
    _grows_as_the_length(SHAPES[name], 1 << 17, 4)
    _grows_as_the_length(SHAPES[name], 1 << 17, 1 << 30)


@pytest.mark.parametrize("name", SHAPES)
def test_no_buffer_grows_that_is_looked_at_again(name):
    """What is quadratic for a long text of small pieces, without a clock.

    Lists of pieces are not looked at here: they grow with what is held back (a value, white space),
    nothing but their last piece is ever read, and they are joined once. The clock sees those.
    """
    reasoning, calls = ReasoningParser(), ToolCallParser(TOOLS)
    for piece in every(SHAPES[name](4000), 4):
        parts = reasoning.feed(piece)
        calls.feed(parts.reasoning)
        calls.feed(parts.content)
        assert len(reasoning._rest) <= BUFFER
        assert len(calls._rest) - calls._at <= BUFFER
        assert len(calls._rest) <= BUFFER + len(parts.content)


def test_a_megabyte_whole():
    for text in ("<" * (1 << 20), " " * (1 << 20), "</parameter>" * 50_000):
        parser = ToolCallParser({})
        events = parser.feed(text) + parser.finish()
        assert "".join(each.text for each in events if isinstance(each, Text)) == text
        thoughts, reply = both(text)
        assert thoughts == text
        assert reply.text == ""
