"""The oracle of the other tests: what is a beginning of JSON, and what is not."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings

from tests.parsers.json_prefix import JsonPrefix
from tests.parsers.wire_text import JSON_VALUES


@settings(max_examples=100, deadline=None)
@given(value=JSON_VALUES)
def test_every_beginning_of_json_is_one(value):
    text = json.dumps(value)
    prefix = JsonPrefix()
    for character in text:
        prefix.feed(character)
    assert prefix.is_whole


@pytest.mark.parametrize("text", ["", "{", '{"a', '{"a": 1', "[1,", '"', "-", "1.", "1e", "tru"])
def test_a_beginning_is_not_the_whole(text):
    prefix = JsonPrefix()
    prefix.feed(text)
    assert not prefix.is_whole


@pytest.mark.parametrize(
    "text",
    [
        *("}", "]", "{,", "{1", "[,", "[1,]", '{"a"}', '{"a": }', '{"a": 1,}', "{}{", "[}", "{]"),
        *("1 2", "01", "+1", ".5", "-a", "1.e", "tre", "None", "nul ", "'a'", '"\n', '"\\x'),
        *('"\\u00g', '{"a" 1', '{"a": 1 "b"', '""a', "NaN", "Infinity", '"\ud800', "{}}", "1-"),
    ],
)
def test_what_is_no_beginning_of_json(text):
    prefix = JsonPrefix()
    with pytest.raises(AssertionError):
        prefix.feed(text)
