"""Anything may come: no exception, and no text lost outside of blocks."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sglang_minimax.parsers.schema import of_tool
from sglang_minimax.parsers.tool_calls import Arguments, Text, ToolCallParser
from tests.parsers.replies import (
    CLOSE,
    OPEN,
    both,
    every,
    parse,
    same_however_cut,
    schema,
    think,
)
from tests.parsers.wire_text import JSON_VALUES, PARTS_OF_TAGS, TAGS, pieced

TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
TOOLS = {"f": schema(**{each: {"type": each} for each in TYPES})}
INVOKE = '<invoke name="f">'
BEGIN = OPEN + INVOKE
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


STEMS = tuple(tag.partition("=")[0] + "=" * ("=" in tag) for tag in TAGS)
GAPS = st.one_of(
    st.lists(st.sampled_from((*PARTS_OF_TAGS, "<", "</", ">", " ", "\n", "x")), max_size=5).map(
        "".join
    ),
    pieced(),
).filter(lambda text: not any(stem in text for stem in STEMS))


@settings(max_examples=200, deadline=None)
@given(gaps=st.lists(GAPS, min_size=5, max_size=5))
def test_text_inside_of_a_block_comes_through(gaps):
    """And no call is lost behind it, whatever it ends with."""
    first, within, between, before, last = gaps
    named = f'{INVOKE}{before}<parameter name="string">x</parameter></invoke>'
    text = f"{OPEN}{first}{INVOKE}{within}</invoke>{between}{named}{last}{CLOSE}"
    # White space alone is layout. Other text at the beginning makes text of the opening tag.
    first = OPEN + first if first.strip() else ""
    found = same_however_cut(text, TOOLS)
    assert found.text == first + "".join(gap for gap in gaps[1:] if gap.strip())
    assert found.values() == [("f", {}), ("f", {"string": "x"})]


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


def test_a_megabyte_whole():
    for text in ("<" * (1 << 20), " " * (1 << 20), "</parameter>" * 50_000):
        parser = ToolCallParser({})
        events = parser.feed(text) + parser.finish()
        assert "".join(each.text for each in events if isinstance(each, Text)) == text
        thoughts, reply = both(text)
        assert thoughts == text
        assert reply.text == ""
