"""Calls that a chat template writes come back exactly, whole and in any pieces."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parsers.replies import every, parse, pieces
from tests.parsers.wire_text import (
    LISTS,
    NUMBERS,
    OBJECTS,
    STRINGS,
    TEMPLATES,
    TEXTS,
    Calls,
    ends_early,
    message,
    pieced,
    render,
    spells_json,
)

SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS)
BARE = STRINGS.filter(lambda text: not spells_json(text))
NOT_NULL = STRINGS.filter(lambda text: text.strip(" \t\r\n") != "null")
OPTIONS = ("red", "None", "2", "", "</parameter>", 1, 2.5, True, None)

# A part of a schema, and the values that can be told from each other in it.
KINDS: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "string": ({"type": "string"}, STRINGS),
    "integer": ({"type": "integer"}, st.integers()),
    "number": ({"type": "number"}, NUMBERS),
    "boolean": ({"type": "boolean"}, st.booleans()),
    "null": ({"type": "null"}, st.none()),
    "array": ({"type": "array", "items": {"type": "string"}}, LISTS),
    "object": ({"type": "object"}, OBJECTS),
    "nullable": ({"type": ["string", "null"]}, st.one_of(st.none(), NOT_NULL)),
    "optional": (
        {"anyOf": [{"type": "string"}, {"type": "null"}]},
        st.one_of(st.none(), NOT_NULL),
    ),
    "optional number": (
        {"oneOf": [{"type": "number"}, {"type": "null"}]},
        st.one_of(st.none(), NUMBERS),
    ),
    "string or number": (
        {"anyOf": [{"type": "string"}, {"type": "number"}]},
        st.one_of(NUMBERS, BARE),
    ),
    "enum": ({"enum": list(OPTIONS)}, st.sampled_from(OPTIONS)),
    "enum of strings": (
        {"type": "string", "enum": ["null", "1", "x"]},
        st.sampled_from(("null", "1", "x")),
    ),
    "reference": ({"$ref": "#/$defs/name"}, STRINGS),
    "reference to a list": ({"allOf": [{"$ref": "#/$defs/list~1s"}]}, LISTS),
    "true": (True, st.one_of(SCALARS, LISTS, OBJECTS, BARE)),
    "absent": (None, st.one_of(SCALARS, LISTS, OBJECTS, BARE)),
}
DEFINITIONS = {"name": {"type": "string"}, "list/s": {"type": "array"}}
# What a name may be: one line that does not hold the end of its own tag.
NAMES = pieced("a", "get_weather", "名前", 'a"b').filter(
    lambda name: name == name.strip() != "" and not re.search(r'\n|"\s*>', name) and len(name) < 250
)


@st.composite
def tools_and_calls(draw: st.DrawFn) -> tuple[dict[str, Any], list[tuple[str, Calls]], str]:
    """The schemas by tool, texts each followed by a block of calls, and a text at the end."""
    tools: dict[str, Any] = {}
    takes: dict[str, dict[str, str]] = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=2, unique=True)):
        of = draw(st.dictionaries(NAMES, st.sampled_from(list(KINDS)), max_size=4))
        properties = {key: KINDS[kind][0] for key, kind in of.items() if kind != "absent"}
        tools[name] = {"type": "object", "properties": properties, "$defs": DEFINITIONS}
        takes[name] = of

    def call() -> tuple[str, dict[str, Any]]:
        name = draw(st.sampled_from(list(takes)))
        values = {
            key: draw(KINDS[kind][1].filter(lambda value: not ends_early(value)))
            for key, kind in takes[name].items()
            if draw(st.booleans())
        }
        return name, values

    blocks = [
        (draw(TEXTS), [call() for _ in range(draw(st.integers(1, 3)))])
        for _ in range(draw(st.integers(1, 2)))
    ]
    return tools, blocks, draw(TEXTS)


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=150, deadline=None)
@given(case=tools_and_calls(), cuts=st.lists(st.integers(1, 800), max_size=40))
def test_calls_come_back(template, case, cuts):
    tools, blocks, tail = case
    reply = "".join(render(template, message(text, calls)) for text, calls in blocks) + tail
    expected = [call for _, calls in blocks for call in calls]
    text = "".join(text for text, _ in blocks) + tail
    for cut in ([reply], pieces(reply, cuts), every(reply, 1)):
        found = parse(cut, tools)
        assert found.text == text
        # As text: 1, 1.0 and True are equal in Python.
        values = [(name, json.dumps(given)) for name, given in found.values()]
        assert values == [(name, json.dumps(given)) for name, given in expected]


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(value=STRINGS, cuts=st.lists(st.integers(1, 200), max_size=20))
def test_a_string_comes_back_whatever_it_spells(template, value, cuts):
    tools = {"f": {"type": "object", "properties": {"s": {"type": "string"}}}}
    reply = render(template, message("", [("f", {"s": value, "t": 1}), ("f", {"s": value})]))
    for cut in ([reply], pieces(reply, cuts), every(reply, 1)):
        assert parse(cut, tools).values() == [("f", {"s": value, "t": 1}), ("f", {"s": value})]
