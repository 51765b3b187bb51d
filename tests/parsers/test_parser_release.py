"""From where on a value goes out that may be a string or something else, and that it is right."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_minimax.parsers.schema import ALL, STRING, Allowed
from sglang_minimax.parsers.values import Value, as_json
from tests.parsers.replies import every, pieces

WORDS = ("true", "false", "null")


def value(*types: str) -> Value:
    return Value(Allowed(frozenset(types) or ALL))


def text_of(types: tuple[str, ...], fed: list[str]) -> list[str]:
    found = value(*types)
    return [found.feed(each) for each in fed] + [found.end()]


NULLABLE, COUNT = ("string", "null"), ("string", "integer")
LIST, OBJECT, ANY = ("string", "array"), ("string", "object"), ()


@pytest.mark.parametrize(
    ("types", "fed", "out"),
    [
        (("string",), ["", "a", "\n", "b"], ['"', "a", "\\n", "b", '"']),
        (NULLABLE, ["n", "u", "x", "y"], ["", "", '"nux', "y", '"']),
        (NULLABLE, [" ", "5", "6"], ["", '" 5', "6", '"']),
        (NULLABLE, ["nu", "ll", " "], ["", "", "", "null"]),
        (("integer",), ["1", "2"], ["", "", "12"]),
        (COUNT, ["1", "2", "a", "b"], ["", "", '"12a', "b", '"']),
        (ANY, ["t", "r", "y"], ["", "", '"try', '"']),
        (ANY, ["[", "a", "]"], ["", '"[a', "]", '"']),
        # A bracket that opens what is not allowed says it at once.
        (LIST, ["{", '"a"', "}"], ['"{', '\\"a\\"', "}", '"']),
        (LIST, ["[", '"', "a"], ["", "", "", '"[\\"a"']),
        (OBJECT, ["[", "1", "]"], ['"[', "1", "]", '"']),
        (OBJECT, ["{", '"', "a"], ["", "", "", '"{\\"a"']),
        (NULLABLE, ["{", "}"], ['"{', "}", '"']),
        (COUNT, ["[", "1"], ['"[', "1", '"']),
    ],
    ids=str,
)
def test_a_value_goes_out_from_where_it_is_certain(types, fed, out):
    assert text_of(types, fed) == out


# text, and how much of it is there when it can be nothing but a string, whatever is allowed
STRINGS = [
    ("hello", 1),
    ("{hello}", 2),
    ("{ hello", 3),
    ("{'a': 1}", 2),
    ("{1: 2}", 2),
    ("{{x}}", 2),
    ("[package]", 2),
    ("[tool.x]", 3),
    ("[nonsense", 3),
    ("['a']", 2),
    ("[1 2]", 4),
    ("[01]", 3),
    ("1.2.3.4", 4),
    ("1..2", 3),
    ("2024-01-01", 5),
    ("007", 2),
    ("-x", 2),
    ("--", 2),
    ("1 2", 3),
    ("1e5 6", 5),
    ("12px", 3),
    ("true or false", 6),
    ("nil", 2),
    ("<b>", 1),
]


@pytest.mark.parametrize(("text", "certain"), STRINGS, ids=repr)
@pytest.mark.parametrize("before", ["", "\n "])
def test_a_string_goes_out_at_the_character_that_makes_it_one(text, certain, before):
    found = value()
    out = [found.feed(each) for each in before + text]
    certain += len(before)
    assert not any(out[: certain - 1])
    assert json.loads(out[certain - 1] + '"') == (before + text)[:certain]
    assert json.loads("".join(out) + found.end()) == before + text


# --- nothing goes out that is JSON of another type ---

PARTS = (*"{}[],:-+.eE0129 \n\t", '"', '"a"', "tr", "ue", *WORDS, "1.5", "2E-3", " " * 70, "1" * 70)
ANYTHING = st.lists(st.sampled_from(PARTS), max_size=7).map("".join)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=4,
)
WRITTEN = st.builds(
    lambda value, indent, before, after: before + json.dumps(value, indent=indent) + after,
    JSON.filter(lambda value: value not in (float("inf"), float("-inf"))),
    st.sampled_from((None, 0, 1, 70)),
    st.sampled_from(("", " ", "\n" * 70)),
    st.sampled_from(("", " ", "\t" * 70)),
)
TYPES = st.sets(st.sampled_from(sorted(ALL))).map(lambda some: frozenset(some) | {STRING})


@settings(max_examples=400, deadline=None)
@given(
    text=st.one_of(ANYTHING, WRITTEN),
    types=TYPES,
    cuts=st.lists(st.integers(1, 100), max_size=8),
)
def test_what_goes_out_early_is_what_the_whole_text_is(text, types, cuts):
    allowed = Allowed(types)
    found = as_json(text, allowed)
    for cut in ([text], every(text, 1), pieces(text, cuts)):
        parser = Value(allowed)
        out = "".join([*map(parser.feed, cut), parser.end()])
        if found is None:
            assert json.loads(out) == text
        else:
            assert out == found


@pytest.mark.parametrize("exponent", ["", "e5", "E5", "e+05", "E-5"])
@pytest.mark.parametrize("digits", ["0", "-0", "12", "1.0", "-0.25", "1" * 100, "0." + "0" * 100])
def test_every_number_is_waited_for(digits, exponent):
    text = digits + exponent
    for before, after in itertools.product(("", " "), repeat=2):
        found = value("string", "number")
        assert not "".join(found.feed(each) for each in before + text + after)
        assert found.end() == text


@pytest.mark.parametrize("inner", ["", *WORDS, "1", "-1.5E+3", '"a"', "[]", "{}", " 1 , 2 ", "\n"])
def test_every_list_is_waited_for(inner):
    found = value("string", "array")
    assert not "".join(found.feed(each) for each in f"[{inner}]")
    assert found.end() == f"[{inner}]"
