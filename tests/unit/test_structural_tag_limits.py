"""What the grammar of a forced call allows where a schema is more than a list of types.

Each case has values that the schema allows, with some that it does not; jsonschema agrees.
"""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from sglang_minimax.parsers import tool_schema
from sglang_minimax.parsers.patterns import Anchored, anchored
from sglang_minimax.parsers.structural_tag import Function, forced, strict
from tests.grammars import (
    INTEGER,
    STRING,
    accepts,
    calls_in,
    invoke,
    of,
    one_parameter,
    reply,
)

OBJECT = {"type": "object", "properties": {"a": STRING, "b": STRING}}

#: A parameter's schema, values, and values that it does not allow.
PARAMETERS: list[tuple[Any, list[Any], list[Any]]] = [
    # A pattern is searched for.
    ({"type": "string", "pattern": "^/"}, ["/", "/etc/<b>", "/a\n"], ["", "etc/", "<"]),
    ({"type": "string", "pattern": "^[A-Z]"}, ["A", "Ab"], ["a"]),
    ({"type": "string", "pattern": "^https://"}, ["https://a.b"], ["http://a.b"]),
    ({"type": "string", "pattern": "^(a|b)$"}, ["a", "b"], ["ab", "c"]),
    ({"type": "string", "pattern": "^"}, ["", "x"], []),
    ({"type": "string", "pattern": "^$"}, [""], ["x"]),
    ({"type": "string", "pattern": "^a\\$"}, ["a$", "a$b"], ["a"]),
    # JSON inside: only what is for all of the string.
    ({**OBJECT, "properties": {"a": {**STRING, "pattern": "^/"}}}, [{"a": '/e"\n'}], []),
    ({**OBJECT, "properties": {"a": {**STRING, "pattern": "^[a-z]$"}}}, [{"a": "b"}], [{"a": "A"}]),
    ({**OBJECT, "properties": {"a": {**STRING, "pattern": "^[^a]+$"}}}, [{"a": 'b"'}], []),
    ({"type": "object", "patternProperties": {"^x_": INTEGER, "^[a-z]$": STRING},
      "additionalProperties": False}, [{"x_a": 1, "b": "x"}, {}], [{"x_a": "x"}, {"y_a": 1}]),
    # Keywords beside alternatives.
    ({**INTEGER, "anyOf": [{"minimum": 1}, {"maximum": -1}]}, [5, -5], [1.5, "x"]),
    ({**OBJECT, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, [{"a": "x"}], ["x", {}]),
    ({"type": "array", "items": INTEGER, "oneOf": [{"minItems": 1}]}, [[1]], [["x"], []]),
    ({**STRING, "anyOf": [{"enum": ["a"]}, {"enum": ["b"]}]}, ["a", "b"], ["c"]),
    ({**STRING, "anyOf": [{"enum": ["a"]}, True]}, ["a", "zzz"], []),
    ({**STRING, "anyOf": [{"enum": ["a"]}, False]}, ["a"], ["zzz"]),
    # Several schemas of the same.
    ({"allOf": [{"enum": ["a", "b"]}, {"enum": ["b", "c"]}]}, ["b"], ["a", "c"]),
    ({"allOf": [{"enum": [1, True, [1]]}, {"enum": [1.0, [1], 2]}]}, [1, [1]], [True, 2]),
    ({"allOf": [{"type": ["string", "number"]}, {"type": ["integer", "null"]}]}, [3], [None, "x"]),
    ({"allOf": [{**INTEGER, "minimum": 3}, {"minimum": 1}]}, [3], [2]),
    ({"allOf": [{**INTEGER, "maximum": 3}, {"maximum": 5}]}, [3], [4]),
    ({"allOf": [OBJECT, {"properties": {"a": {"enum": ["x"]}}, "required": ["a"]}]},
     [{"a": "x"}], [{"a": "y"}, {}]),
    ({"allOf": [{"anyOf": [{"enum": [1]}, {"enum": [2]}]}, {"anyOf": [{"enum": [2, 3]}]}]},
     [2], [1, 3]),
    ({"enum": ["a", 1], "type": "string"}, ["a"], ["1"]),
    ({"enum": ["a", "b"], "const": "b"}, ["b"], ["a"]),
    ({"enum": [1, 2.5], "type": "number"}, [1, 2.5], [2]),
    # Lengths, and text with markup.
    ({"type": "string", "minLength": 1}, ["x", "</p>", "<<EOF", "</b>"], [""]),
    ({"type": "string", "minLength": 3}, ["abc", "ab</p>"], ["ab"]),
    ({"type": "string", "maxLength": 64}, ["", "a</b>", "</p>" * 8, "x" * 64], ["x" * 65]),
    ({"type": "string", "maxLength": 65}, ["x" * 66], []),  # not enforced
    ({"type": "string", "maxLength": 0}, [""], ["x"]),
    ({"enum": ["grün", "ü"]}, ["grün"], ["gr"]),
    ({"enum": [["ü"]]}, [["ü"]], [["u"]]),
    ({"type": ["string", "unheard"]}, ["x"], []),
]  # fmt: skip


def is_valid(value: Any, schema: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


@pytest.mark.parametrize(("schema", "good", "bad"), PARAMETERS, ids=lambda v: json.dumps(v)[:60])
def test_values(schema: Any, good: list[Any], bad: list[Any]) -> None:
    whole = one_parameter(schema)
    tag = of(whole)
    for value in good:
        text = reply(invoke({"x": value}))
        assert accepts(tag, text), value
        assert calls_in(text, {"f": whole}) == [("f", {"x": value})]
        if "unheard" not in str(schema) and value != "x" * 66:
            assert is_valid(value, schema), value
    for value in bad:
        assert not accepts(tag, reply(invoke({"x": value}))), value
        assert not is_valid(value, schema), value


#: A tool's schema, arguments, and arguments that it does not allow.
TOOLS: list[tuple[Any, list[Any], list[Any]]] = [
    # What is named in several places.
    ({"allOf": [{"properties": {"a": INTEGER}}, {"properties": {"a": {"title": "x"}}}]},
     [{"a": 1}], [{"a": "x"}]),
    ({"properties": {"a": INTEGER}, "required": ["a"],
      "anyOf": [{"properties": {"a": {"minimum": 5}}}]}, [{"a": 5}], [{"a": 5.5}, {"a": 4}]),
    ({"properties": {"a": {"enum": ["r", "w"]}}, "anyOf": [{"properties": {"a": {"title": "d"}}}]},
     [{"a": "r"}], [{"a": "z"}]),
    ({"properties": {"a": INTEGER, "k": INTEGER},
      "allOf": [{"anyOf": [{"required": ["a"]}]}, {"anyOf": [{"required": ["k"]}]}]},
     [{"a": 1, "k": 1}], [{"k": 1}, {"a": 1}]),
    # References by the place in a list.
    ({"properties": {"a": {"anyOf": [STRING, INTEGER]}, "b": {"$ref": "#/properties/a/anyOf/1"}}},
     [{"b": 5}], [{"b": "x"}]),
    ({"properties": {"a": {"anyOf": [INTEGER]},
                     "b": {"type": "array", "items": {"$ref": "#/properties/a/anyOf/0"}}}},
     [{"b": [5]}], [{"b": ["x"]}]),
    ({"properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/no"}}}},
     [{"a": ["x", 1]}], []),
    # Parameters that are not named.
    ({"type": "object"}, [{}, {"y": 1}, {"a b": "x"}], []),
    ({"type": "object", "required": ["y"]}, [{"y": 1, "z": 2}], [{}]),
    ({"type": "object", "additionalProperties": True}, [{"y": 1}, {"größe": 2, "$filter": 3}], []),
    ({"properties": {"a": INTEGER}, "additionalProperties": True}, [{"a": 1, "b": "x"}], []),
    ({"properties": {"a": INTEGER}, "additionalProperties": False}, [{"a": 1}], [{"b": 1}]),
    ({"patternProperties": {"^x_": INTEGER}, "additionalProperties": False},
     [{"x_a": 1, "x_": 2}, {}], [{"x_a": "x"}, {"y": 1}]),
    ({"patternProperties": {"^[a-z]$": INTEGER, "^[A-Z]$": STRING}, "additionalProperties": False},
     [{"a": 1, "B": "x", "c": 2}], [{"a": "x"}, {"ab": 1}]),
    ({"patternProperties": {"_x": INTEGER}, "additionalProperties": False}, [{"a_x": 1}], []),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), TOOLS, ids=lambda v: json.dumps(v)[:60])
def test_arguments(schema: Any, good: list[Any], bad: list[Any]) -> None:
    tag = of(schema)
    for values in good:
        assert accepts(tag, reply(invoke(values))), values
        if "#/$defs/no" not in str(schema):
            assert is_valid(values, schema), values
    for values in bad:
        assert not accepts(tag, reply(invoke(values))), values
        assert not is_valid(values, schema), values


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("^a", Anchored("a", False)),
        ("^a$", Anchored("a", True)),
        (r"^a\$", Anchored(r"a\$", False)),
        ("^[$^]$", Anchored("[$^]", True)),
        ("^(a|b)", Anchored("(a|b)", False)),
        ("^(?:a)+?$", Anchored("(?:a)+?", True)),
        ("^", Anchored("", False)),
        *((each, None) for each in ("", "a", "a$", ".*", "^a|b$", "(^a)$", "^a$b", "^(?=a)b", 5)),
        *(
            (each, None)
            for each in (r"^\bfoo", r"^\p{L}", "^(?i)a", "^a++", "^[^é]$", r"^[^\u00e9]")
        ),
    ],
)
def test_anchors(pattern: Any, found: Anchored | None) -> None:
    assert anchored(pattern) == found
    accepts(of(one_parameter({"type": "string", "pattern": pattern})), "")  # compiles


@pytest.mark.parametrize("most", [24, 40, 64])
@pytest.mark.parametrize("before", ["", "<", "<<", "</", "</p", "</parameter", "x"])
def test_a_counted_string_ends_at_its_tag(before: str, most: int) -> None:
    for schema in ({"maxLength": most}, {"minLength": 1}, {"minLength": 2, "maxLength": most}):
        tag = of(one_parameter({"type": "string", **schema}))
        assert not accepts(tag, reply(invoke({"x": f"{before}</parameter>y"})))


def test_an_item_that_the_parser_would_cut_is_left_out() -> None:
    end = "a</parameter>\n</invoke>"
    schema = one_parameter({"enum": [end, "a</parameter>b", "c"]})
    assert not accepts(of(schema), reply(invoke({"x": end})))
    text = reply(invoke({"x": "a</parameter>b"}))
    assert accepts(of(schema), text)
    assert calls_in(text, {"f": schema}) == [("f", {"x": "a</parameter>b"})]


@pytest.mark.parametrize("name", ["$filter", "größe", "a b", "@type", "1st", "x[y]", "x" * 64])
def test_any_parameter_of_a_tool_that_is_not_strict(name: str) -> None:
    functions = [Function("s", {}), Function("n", None, is_strict=False)]
    tag = strict(functions, only_one=False, with_thought=False)
    text = reply(invoke({name: "v"}, "n"))
    assert accepts(tag, text)
    assert calls_in(text, {}) == [("n", {name: "v"})]
    assert not accepts(tag, reply(invoke({name: "v"}, "s")))


def test_white_space_in_json_comes_to_an_end() -> None:
    tag = of(one_parameter({"type": "array", "items": INTEGER}))
    assert accepts(tag, reply(invoke({"x": "[1," + " " * 24 + "2]"})))
    assert not accepts(tag, reply(invoke({"x": "[1," + " " * 25 + "2]"})))


def test_data_is_not_taken_for_a_schema() -> None:
    data = {"type": "no", "$ref": "#/no", "pattern": "x"}
    schema = {"type": "object", "properties": {"a": {"enum": [data]}}, "default": data}
    adapted = tool_schema.Root({}).with_definitions({**schema, "examples": [data]})
    assert adapted == {**schema, "examples": [data]}


def test_thousands_of_names_and_values_are_looked_at_once() -> None:
    """The grammar is made in the process of all requests."""

    class Counted(str):
        seen = 0

        def __eq__(self, other: object) -> bool:
            Counted.seen += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    names = [Counted(f"n{i}") for i in range(500)]
    parts: list[dict[str, Any]] = [
        {"properties": {f"n{i}": {"enum": names} for i in range(500)}, "required": names},
        {"properties": {"n0": {"enum": names[250:]}}, "required": names[250:]},
    ]
    forced([Function("f", {"allOf": parts})], only_one=True, with_thought=False)
    assert Counted.seen < 20_000  # 500 * 500 / 2 for each comparison of all with all


def chained(count: int) -> dict[str, Any]:
    """So many parameters and definitions, of which each refers to the next two."""
    parts = {
        f"D{i}": {
            "type": "object",
            "properties": {
                "x": {"$ref": f"#/$defs/D{(i + 1) % count}"},
                "y": {"$ref": f"#/$defs/D{(i + 2) % count}"},
            },
        }
        for i in range(count)
    }
    properties = {f"p{i}": {"$ref": f"#/$defs/D{i}"} for i in range(count)}
    return {"properties": properties, "$defs": parts, "additionalProperties": False}


def test_copies_of_definitions_come_to_an_end() -> None:
    """Each value is a grammar with copies of its own; their sum is what compiling costs."""
    schema = chained(80)
    tag = forced([Function("f", schema)], only_one=True, with_thought=False)
    text = json.dumps(tag.model_dump(by_alias=True))
    assert 900 < text.count('"type": "object"') < 1100
    assert accepts(tag, reply(invoke({"p0": {"x": {"y": {}}}, "p79": {"x": {}}})))
    assert not accepts(tag, reply(invoke({"p0": {"x": {"y": 1}}})))  # still has its definitions
    assert not accepts(tag, reply(invoke({"p79": "x"})))  # an object, whatever is in it
