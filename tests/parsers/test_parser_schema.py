"""Where a tool's schema describes a parameter, and what is said of it there."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from sglang_minimax.parsers.schema import ALL, of_tool
from tests.parsers.replies import parse, schema, wire

STRING, INTEGER, BOOLEAN = ({"type": each} for each in ("string", "integer", "boolean"))
NULLABLE = {"type": ["string", "null"]}

NO_SCHEMA: list[Any] = [None, [], "object", 5, True, {}, {"type": "object"}]
NO_SCHEMA += [{"properties": None}, {"properties": []}]


@pytest.mark.parametrize("parameters", NO_SCHEMA, ids=str)
def test_a_tool_without_a_schema(parameters):
    reply = parse(wire(("f", {"a": "5", "b": "x"})), {"f": parameters})
    assert reply.values() == [("f", {"a": 5, "b": "x"})]


@pytest.mark.parametrize(
    "parameters",
    [
        {"additionalProperties": STRING},
        {"properties": {"q": INTEGER}, "additionalProperties": STRING},
        {"allOf": [{"properties": {"p": STRING}}]},
        {"$ref": "#/$defs/all", "$defs": {"all": {"properties": {"p": STRING}}}},
        {"$ref": "#", "properties": {"p": STRING}},
        {"allOf": [{"$ref": "#"}, {"$ref": "#"}], "properties": {"p": STRING}},
        {"allOf": [{"properties": {"p": NULLABLE}}, {"properties": {"p": STRING}}]},
        # Branches: those that describe it count.
        {"anyOf": [{"properties": {"p": STRING}, "required": ["p"]}]},
        {"oneOf": [{"properties": {"q": INTEGER}}, {"properties": {"p": STRING}}]},
        {"oneOf": [{"properties": {"p": False}}, {"properties": {"p": STRING}}]},
        {"anyOf": [{"properties": {"p": STRING}}, {"properties": {"p": BOOLEAN}}]},
        {
            "anyOf": [{"oneOf": [{"$ref": "#/$defs/p"}]}],
            "$defs": {"p": {"properties": {"p": STRING}}},
        },
        {"allOf": [{"anyOf": [{"additionalProperties": STRING}]}], "properties": {"q": INTEGER}},
        {"anyOf": [{"$ref": "#"}, {"properties": {"p": STRING}}]},
        {"properties": {"p": STRING}, "anyOf": [{"properties": {"p": {}}}, {}, None]},
        {"properties": {"p": NULLABLE}, "oneOf": [{"properties": {"p": {"enum": ["5"]}}}]},
        # Names by pattern.
        {"patternProperties": {"^p": STRING}},
        {"patternProperties": {"^[a-z_][a-z0-9_]*$": STRING}, "additionalProperties": INTEGER},
        {"patternProperties": {"^q": INTEGER, "": STRING}},
        {"patternProperties": {"^q": INTEGER}, "additionalProperties": STRING},
        {"patternProperties": {".": NULLABLE}, "properties": {"p": STRING}},
    ],
    ids=str,
)
def test_where_a_parameter_may_be_described(parameters):
    before = copy.deepcopy(parameters)
    assert parse(wire(("f", {"p": "5"})), {"f": parameters}).values() == [("f", {"p": "5"})]
    assert parameters == before


@pytest.mark.parametrize(
    "pattern",
    ["^(p+)+$", "p{1,3}", "p|q", "(", "[z-a]", "*", "p*p*", "a" * 201, "^(?=p)", r"\bp", 5],
)
def test_a_pattern_that_is_not_read_may_match(pattern):
    """It leaves all open, and is not run: some take for ever."""
    parameters = {"patternProperties": {pattern: STRING}, "additionalProperties": STRING}
    assert of_tool(parameters).allowed("p" * 250).types == ALL
    both = {"anyOf": [{"patternProperties": {pattern: STRING}}, {"properties": {"p": STRING}}]}
    assert of_tool(both).allowed("p").types == ALL


def test_patterns_beyond_a_number_are_not_read():
    """A request must not stop the server: to compile 10 000 takes seconds."""
    patterns = {f"^q{n}": INTEGER for n in range(99)}
    parameters = {
        "patternProperties": {**patterns, "^p": STRING, **{f"r{n}": {} for n in range(9)}}
    }
    assert of_tool(parameters).allowed("p").types == {"string"}
    parameters = {"patternProperties": {**patterns, "^q99": INTEGER, "^p": STRING}}
    assert of_tool(parameters).allowed("p").types == ALL


def test_branches_that_double_at_each_step_are_read_once():
    choices: dict[str, Any] = {
        str(n): {"anyOf": [{"$ref": f"#/$defs/{n + 1}"}] * 2} for n in range(29)
    }
    choices["29"] = {"properties": {"p": STRING}}
    parameters = {"$defs": choices, "oneOf": [{"$ref": "#/$defs/20"}] * 2}
    assert of_tool(parameters).allowed("p").types == {"string"}
    choices["29"] = {"$ref": "#"}
    assert of_tool(parameters).allowed("p").types == ALL


@pytest.mark.parametrize("further", [True, False, None, "x"])
def test_additional_properties_that_are_no_schema(further):
    parameters = schema(q=STRING) | {"additionalProperties": further}
    assert parse(wire(("f", {"p": "5"})), {"f": parameters}).values() == [("f", {"p": 5})]


def test_the_same_name_of_another_tool_is_another_parameter():
    tools = {"f": schema(p=STRING), "g": schema(p=INTEGER)}
    reply = parse(wire(("f", {"p": "5"}), ("g", {"p": "5"}), ("h", {"p": "5"})), tools)
    assert reply.values() == [("f", {"p": "5"}), ("g", {"p": 5}), ("h", {"p": 5})]


def test_a_schema_nested_deeper_than_anybody_reads_leaves_all_open():
    deep: Any = STRING
    for _ in range(5000):
        deep = {"anyOf": [deep]}
    assert of_tool({"properties": {"p": deep}}).allowed("p").types == ALL


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        # Searched for: only anchors hold it to the beginning or the end.
        ("b", "abc", True),
        ("b+c", "abbc", True),
        ("[0-9]$", "a1", True),
        ("^b", "abc", False),
        ("b$", "abc", False),
        # Digits and letters are ASCII, as in ECMA's expressions.
        (r"^\d+$", "12", True),
        (r"^\d+$", "٣", False),
        (r"^\w+$", "a_1", True),
        (r"^\w+$", "é", False),
        (r"[\d]", "a٣", False),
        (r"[^\w]", "é", True),
        ("^.$", "é", True),
    ],
)
def test_which_names_a_pattern_matches(pattern, name, matches):
    """One that matches describes the parameter, so what further ones are says nothing."""
    parameters = {"patternProperties": {pattern: STRING}, "additionalProperties": INTEGER}
    expected = {"string"} if matches else {"integer"}
    assert of_tool(parameters).allowed(name).types == expected
