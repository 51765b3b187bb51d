"""How the text of a parameter becomes JSON, by its schema: one row for each rule."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from sglang_minimax.parsers.schema import of_tool
from sglang_minimax.parsers.values import MOST_NESTED, as_json, escaped
from tests.parsers.replies import same_however_cut, schema, wire

ABSENT = object()
STRING, INTEGER, NUMBER, BOOLEAN, NULL, ARRAY, OBJECT = (
    {"type": each} for each in ("string", "integer", "number", "boolean", "null", "array", "object")
)
NULLABLE = {"type": ["string", "null"]}
DEFINITIONS = {
    "text": {"type": "string"},
    "count": {"$ref": "#/$defs/whole"},
    "whole": {"type": "integer"},
    "a/b~c": {"type": "string"},
    "x y%": {"type": "string"},
    "loop": {"$ref": "#/$defs/loop"},
    "ping": {"$ref": "#/$defs/pong"},
    "pong": {"$ref": "#/$defs/ping"},
    "tree": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
    "node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}}},
}


def arguments(of: Any, text: str) -> str:
    """The JSON of one parameter, the same however the reply is cut."""
    parameters = schema() if of is ABSENT else schema(p=of)
    tools = {"f": parameters | {"$defs": DEFINITIONS}}
    before = copy.deepcopy(tools)
    reply = same_however_cut(wire(("f", {"p": text})), tools)
    assert tools == before, "the schema was changed"
    assert reply.calls[0].complete
    return reply.calls[0].arguments.removeprefix('{"p": ').removesuffix("}")


SPELLINGS = (
    *("", " ", "None", "null", "nil", "true", "True", "0", "007", "1e5", "2.0", "-0", "inf", "NaN"),
    *("{}", "[]", '{"a": 1}', '"quoted"', "}", "{", "\n", "\nx\n", "\\", '"', "\t", "\x00", "🦀"),
    *("</invoke>", "<invoke name=", "</parameter>", "<", "&lt;", "\ud800", "\u2028", "\x7f"),
)


@pytest.mark.parametrize("text", SPELLINGS)
@pytest.mark.parametrize(
    "of",
    [
        STRING,
        {"type": ["string"]},
        {"type": "String"},
        {"anyOf": [STRING, STRING]},
        {"oneOf": [STRING]},
        {"allOf": [STRING, {}]},
        {"$ref": "#/$defs/text"},
        {"enum": ["a", "b"]},
        {"const": "a"},
        {"type": "string", "enum": ["a", 1]},
        {"type": ["string", "null"], "const": "a"},
    ],
    ids=str,
)
def test_a_string_stays_a_string(of, text):
    assert json.loads(arguments(of, text)) == text


# schema, text, JSON
RULES: list[tuple[Any, str, str]] = [
    # As it was written, without the white space around it.
    (INTEGER, "5", "5"),
    (INTEGER, " -12\n", "-12"),
    (INTEGER, "0", "0"),
    (INTEGER, "1" + "0" * 5000, "1" + "0" * 5000),
    (INTEGER, "2.0", "2"),
    (INTEGER, "-3.000", "-3"),
    (NUMBER, "5", "5"),
    (NUMBER, "2.0", "2.0"),
    (NUMBER, "1e999", "1e999"),
    (NUMBER, "-1.5E-7", "-1.5E-7"),
    (NUMBER, "0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
    (BOOLEAN, "true", "true"),
    (BOOLEAN, "\nfalse ", "false"),
    (NULL, "null", "null"),
    (ARRAY, "[1, 2]", "[1, 2]"),
    (ARRAY, "[ ]", "[ ]"),
    (ARRAY, "\n[1,\n 2]\n", "[1,\n 2]"),
    (OBJECT, '{"a":{"b":[null]}}', '{"a":{"b":[null]}}'),
    (OBJECT, '{"a": 1, "a": 2}', '{"a": 1, "a": 2}'),
    (OBJECT, '{"a": 1e999}', '{"a": 1e999}'),
    # What does not fit goes out as a string, with its white space.
    (INTEGER, "2.5", '"2.5"'),
    (INTEGER, "1e3", '"1e3"'),
    (INTEGER, "five", '"five"'),
    (INTEGER, " 5a\n", '" 5a\\n"'),
    (INTEGER, "", '""'),
    (INTEGER, "+5", '"+5"'),
    (INTEGER, "05", '"05"'),
    (INTEGER, "1_000", '"1_000"'),
    (INTEGER, "٣", '"٣"'),
    (INTEGER, "true", '"true"'),
    (INTEGER, "null", '"null"'),
    (INTEGER, '"5"', '"\\"5\\""'),
    (NUMBER, "inf", '"inf"'),
    (NUMBER, "-Infinity", '"-Infinity"'),
    (NUMBER, "nan", '"nan"'),
    (NUMBER, "1.", '"1."'),
    (NUMBER, ".5", '".5"'),
    (NUMBER, "1,000", '"1,000"'),
    (BOOLEAN, "yes", '"yes"'),
    (BOOLEAN, "1", '"1"'),
    (BOOLEAN, "TRUE", '"TRUE"'),
    (NULL, "", '""'),
    (NULL, "nil", '"nil"'),
    (OBJECT, "[1]", '"[1]"'),
    (ARRAY, '{"a": 1}', '"{\\"a\\": 1}"'),
    (ARRAY, "1, 2", '"1, 2"'),
    (ARRAY, "[1, 2", '"[1, 2"'),
    (ARRAY, "[1,]", '"[1,]"'),
    (ARRAY, "['a']", "\"['a']\""),
    (ARRAY, "[NaN]", '"[NaN]"'),
    (ARRAY, "[1] [2]", '"[1] [2]"'),
    (OBJECT, "null", '"null"'),
    # Line breaks inside the strings of JSON are mended; all else stays as it was written.
    (OBJECT, '{"a": "x\ny"}', '{"a": "x\\ny"}'),
    (OBJECT, '{"a": "\t", "b": 1e999,\n"c": 2.50}', '{"a": "\\t", "b": 1e999,\n"c": 2.50}'),
    (ARRAY, '["\n\\"\n", "\r\x00"]', '["\\n\\"\\n", "\\r\\u0000"]'),
    (ARRAY, '["\n", 1' + "0" * 5000 + "]", '["\\n", 1' + "0" * 5000 + "]"),
    (ARRAY, '["\ud800"]', '["\\ud800"]'),
    (ARRAY, '["\\\n"]', '"[\\"\\\\\\n\\"]"'),
    # Python's spellings, where no string is allowed.
    (BOOLEAN, "True", "true"),
    (BOOLEAN, "False", "false"),
    (NULL, "None", "null"),
    ({"type": ["integer", "null"]}, "None", "null"),
    (INTEGER, "None", '"None"'),
    (BOOLEAN, "None", '"None"'),
    (NULLABLE, "None", '"None"'),
    ({"type": ["string", "boolean"]}, "True", '"True"'),
    (ABSENT, "None", '"None"'),
    (ABSENT, "True", '"True"'),
    # Nullable: null is the only thing that is not the string.
    (NULLABLE, "null", "null"),
    (NULLABLE, " null\n", "null"),
    (NULLABLE, "nullx", '"nullx"'),
    (NULLABLE, "nul", '"nul"'),
    (NULLABLE, "n ull", '"n ull"'),
    (NULLABLE, "null null", '"null null"'),
    (NULLABLE, "", '""'),
    (NULLABLE, " ", '" "'),
    (NULLABLE, "Alice", '"Alice"'),
    (NULLABLE, "5", '"5"'),
    (NULLABLE, "true", '"true"'),
    (NULLABLE, "{}", '"{}"'),
    ({"anyOf": [STRING, NULL]}, "null", "null"),
    ({"anyOf": [STRING, NULL]}, "x", '"x"'),
    ({"anyOf": [OBJECT, NULL]}, '{"a": 1}', '{"a": 1}'),
    ({"anyOf": [OBJECT, NULL]}, "null", "null"),
    # Several types.
    ({"type": ["integer", "string"]}, "5", "5"),
    ({"type": ["integer", "string"]}, "5.5", '"5.5"'),
    ({"type": ["integer", "string"]}, "5 apples", '"5 apples"'),
    ({"type": ["integer", "number"]}, "2.0", "2.0"),
    ({"type": ["string", "number"]}, "1E5", "1E5"),
    ({"type": ["string", "number"]}, "-2.5E+07 ", "-2.5E+07"),
    ({"type": ["string", "number"]}, "1E", '"1E"'),
    ({"oneOf": [INTEGER, BOOLEAN]}, "true", "true"),
    ({"oneOf": [INTEGER, BOOLEAN]}, "7", "7"),
    ({"anyOf": [STRING, ARRAY]}, '["a"]', '["a"]'),
    ({"anyOf": [STRING, ARRAY]}, "[draft] a", '"[draft] a"'),
    ({"anyOf": [STRING, OBJECT]}, "{x}", '"{x}"'),
    ({"anyOf": [STRING, {}]}, "5", "5"),
    ({"anyOf": [STRING, True]}, "5", "5"),
    ({"anyOf": []}, "5", "5"),
    ({"allOf": [{"type": ["string", "integer"]}, {"type": ["integer", "null"]}]}, "5", "5"),
    ({"allOf": [{"type": ["string", "integer"]}, {"type": ["integer", "null"]}]}, "null", '"null"'),
    ({"allOf": [NUMBER, INTEGER]}, "2.0", "2"),
    ({"allOf": [STRING, INTEGER]}, "5", "5"),  # contradicts itself: anything goes
    ({"type": "string", "anyOf": [{"minLength": 1}, {"pattern": "x"}]}, "5", '"5"'),
    # Enums and constants.
    ({"enum": ["a", 1, None]}, "1", "1"),
    ({"enum": ["a", 1, None]}, "null", "null"),
    ({"enum": ["a", 1, None]}, "2.5", '"2.5"'),
    ({"enum": ["1", 1]}, "1", '"1"'),
    ({"enum": ["null", None]}, "null", '"null"'),
    ({"enum": ["null", None]}, " null ", "null"),
    ({"enum": ["null", None]}, "null\n", "null"),
    ({"enum": [" 1", 1]}, " 1", '" 1"'),
    ({"enum": [" 1", 1]}, "1 ", "1"),
    ({"enum": ["true", True, "x"]}, "true", '"true"'),
    ({"enum": [True, False]}, "True", "true"),
    ({"enum": [1.5, 2]}, "1.5", "1.5"),
    ({"enum": [[1], {"a": 2}]}, "[1]", "[1]"),
    ({"enum": [[1], {"a": 2}]}, "[2]", "[2]"),  # values are the client's to check
    ({"enum": []}, "5", "5"),
    ({"const": 5}, "5", "5"),
    ({"const": None}, "null", "null"),
    # References.
    ({"$ref": "#/$defs/count"}, "5", "5"),
    ({"$ref": "#/$defs/text"}, "5", '"5"'),
    ({"$ref": "#/$defs/a~1b~0c"}, "5", '"5"'),
    ({"$ref": "#/$defs/x%20y%25"}, "5", '"5"'),
    ({"$ref": "#/$defs/x y%"}, "5", '"5"'),
    ({"$ref": "#/$defs/a~1b%7E0c"}, "5", '"5"'),
    ({"$ref": "#/$defs/tree"}, "null", "null"),
    ({"$ref": "#/$defs/tree"}, '{"next": null}', '{"next": null}'),
    ({"$ref": "#/$defs/tree"}, "5", '"5"'),
    ({"$ref": "#/$defs/loop"}, "5", "5"),
    ({"$ref": "#/$defs/ping"}, "x", '"x"'),
    ({"$ref": "#/$defs/ping", "type": "string"}, "5", '"5"'),
    ({"$ref": "#/$defs/none"}, "5", "5"),
    ({"$ref": "#/$defs/whole/type"}, "5", "5"),
    ({"$ref": "#"}, '{"a": 1}', '{"a": 1}'),
    ({"$ref": "#anchor"}, "5", "5"),
    ({"$ref": "https://example.com/schema"}, "5", "5"),
    ({"$ref": 5}, "5", "5"),
    ({"$ref": None}, "x", '"x"'),
    # No schema: what reads as JSON is that, all else is a string.
    (ABSENT, "5", "5"),
    (ABSENT, "5.50", "5.50"),
    (ABSENT, "true", "true"),
    (ABSENT, "null", "null"),
    (ABSENT, '{"a": 1}', '{"a": 1}'),
    (ABSENT, "hello", '"hello"'),
    (ABSENT, '"hello"', '"\\"hello\\""'),
    (ABSENT, "2024-12-25", '"2024-12-25"'),
    (ABSENT, "10 000", '"10 000"'),
    (ABSENT, "", '""'),
    ({}, "5", "5"),
    (True, "5", "5"),
    (False, "5", "5"),
    (None, "5", "5"),
    ("string", "5", "5"),
    ([STRING], "5", "5"),
    ({"type": "any"}, "5", "5"),
    ({"type": None}, "5", "5"),
    ({"type": []}, "5", "5"),
    ({"type": [5, "string"]}, "5", '"5"'),
    ({"description": "a date"}, "5", "5"),
    ({"anyOf": "string"}, "5", "5"),
    ({"enum": "abc"}, "5", "5"),
]


def _shown(value: Any) -> str:
    return "no schema" if value is ABSENT else str(value)[:40]


@pytest.mark.parametrize(("of", "text", "expected"), RULES, ids=_shown)
def test_rules(of, text, expected):
    assert arguments(of, text) == expected


# --- nesting ---


def _deeper(frames: int, text: str) -> str | None:
    return _deeper(frames - 1, text) if frames else as_json(text, of_tool({}).allowed("p"))


@pytest.mark.parametrize("frames", [0, 50, 500])
@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ('{"[": ', "}"), ('["]", \n[0], ', "]")])
def test_nesting_is_limited_however_deep_the_caller_is(begin, end, frames):
    for depth in (1, MOST_NESTED - 1, MOST_NESTED, MOST_NESTED + 1, 965, 100_000):
        text = begin * (depth - 1) + "[]" + end * (depth - 1)
        assert _deeper(frames, text) == (text if depth <= MOST_NESTED else None)


def test_brackets_in_strings_are_not_nested():
    text = '{"a": "' + '[{\\"' * 500 + '", "b": "\\\\"}'
    assert as_json(text, of_tool({}).allowed("p")) == text


# --- escapes ---


def test_escapes_do_not_depend_on_the_cuts():
    text = '\x00\x1f"\\\n\r\t\b\f\x7f\u2028🦀\ud83e\udd80\udfff/é'
    assert escaped(text) == "".join(map(escaped, text))
    assert json.loads(f'"{escaped(text)}"').encode("utf-16", "surrogatepass") == text.encode(
        "utf-16", "surrogatepass"
    )
    escaped(text).encode()


def test_a_name_that_json_has_to_escape():
    reply = same_however_cut(wire(("f", {'a"\\\ud800': "1", "é": "2"})))
    assert reply.calls[0].arguments == '{"a\\"\\\\\\ud800": 1, "é": 2}'
