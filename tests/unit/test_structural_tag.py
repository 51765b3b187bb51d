"""The format of forced and strict calls: what its grammar accepts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sglang_minimax.parsers.structural_tag import Function, forced, strict
from tests.grammars import (
    INTEGER,
    ODD,
    STRING,
    TWO,
    VALUES,
    accepts,
    calls_in,
    invoke,
    matcher,
    of,
    one_parameter,
    reply,
    tokenizer,
)


@pytest.mark.parametrize(("schema", "good", "bad"), VALUES + ODD, ids=lambda v: json.dumps(v)[:40])
def test_values(schema: dict[str, Any], good: list[Any], bad: list[str]) -> None:
    tag = of(one_parameter(schema))
    for value in good:
        assert accepts(tag, reply(invoke({"x": value}))), value
    for text in bad:
        assert not accepts(tag, reply(invoke({"x": text}))), text


def test_parameters() -> None:
    tag = of(TWO)
    assert accepts(tag, reply(invoke({"a": "x"})))
    assert accepts(tag, reply(invoke({"a": "x", "b": 1})))
    mistakes: list[dict[str, Any]] = [
        *({}, {"b": 1}, {"b": 1, "a": "x"}),
        *({"a": "x", "c": "y"}, {"a": "x", "b": "y"}),
    ]
    for wrong in mistakes:
        assert not accepts(tag, reply(invoke(wrong))), wrong


@pytest.mark.parametrize(
    "schema", [None, {}, {"type": "object", "properties": {}}, {"properties": {}}, "junk", []]
)
def test_no_parameters(schema: Any) -> None:
    assert accepts(of(schema), reply(invoke({})))
    assert not accepts(of(schema), reply(invoke({"a": "x"})))


def test_more_parameters_than_are_named() -> None:
    tag = of({**TWO, "additionalProperties": INTEGER})
    assert accepts(tag, reply(invoke({"a": "x", "c-1": 3, "d": 4})))
    assert not accepts(tag, reply(invoke({"a": "x", "c": "y"})))


@pytest.mark.parametrize(
    ("pattern", "may"),
    [
        *((r"^\\.+$", True), (r"^\\\\.+$", True), (r"^\.+$", False), (r"^\\\.$", False)),
        *((r"\074", True), (r"\x3c", True), (r"\u003c", True), (r"\<", True), (r"\S", True)),
        *((r"\[.]", True), (r"\[[.]", False), (r"[^a]", True), (r"[^a<]", False), (r"[^]", True)),
        *((r"^[\w.]+$", False), (r"[!-\]]", True), (r"^a\.b\d\s$", False), ("<", True)),
    ],
)
def test_patterns_that_may_match_markup(pattern: str, may: bool) -> None:
    """Those are not enforced, and the value still ends where its tag does."""
    whole = pattern if pattern.startswith("^") else f"^{pattern}$"
    tag = of(one_parameter({"type": "string", "pattern": whole}))
    assert accepts(tag, reply(invoke({"x": "something else"}))) is may
    assert not accepts(tag, reply(invoke({"x": "\\a</parameter>b"})))


def test_all_of_several_declarations() -> None:
    defs = {
        "A": {"properties": {"a": STRING}, "required": ["a"]},
        "B": {"allOf": [{"$ref": "#/$defs/C"}, {"properties": {"b": STRING}}]},
        "C": {"properties": {"c": INTEGER}, "required": ["c"]},
    }
    schema = {"allOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}], "$defs": defs}
    tag = of(schema)
    assert accepts(tag, reply(invoke({"a": "x", "c": 1, "b": "y"})))
    for wrong in ({"a": "x"}, {"c": 1}, {"a": "x", "c": "y"}):
        assert not accepts(tag, reply(invoke(wrong))), wrong


def size(tag: Any) -> int:
    return len(json.dumps(tag.model_dump(by_alias=True)))


def test_a_part_carries_what_it_refers_to() -> None:
    """With the whole schema in each of them, 400 are 16 times as many as 100."""

    def schema(count: int) -> dict[str, Any]:
        items = [{"type": "array", "items": {"$ref": f"#/$defs/D{i}"}} for i in range(count)]
        return {
            "properties": {f"p{i}": each for i, each in enumerate(items)},
            "$defs": {f"D{i}": {"type": "integer", "maximum": i} for i in range(count)},
        }

    assert size(of(schema(400))) < 4.5 * size(of(schema(100)))
    tag = of(schema(3))
    assert accepts(tag, reply(invoke({"p1": [1], "p2": [2]})))
    assert not accepts(tag, reply(invoke({"p1": [2]})))


@pytest.mark.parametrize(
    "value",
    [INTEGER, {"$ref": "#/$defs/A"}, {"anyOf": [{"allOf": [{"$ref": "#/$defs/A"}]}, INTEGER]}],
    ids=["plain", "reference", "alternatives"],
)
def test_many_parameters_all_hold(value: dict[str, Any]) -> None:
    names = [f"p{i}" for i in range(1100)]
    schema = {"properties": dict.fromkeys(names, value), "$defs": {"A": INTEGER}}
    tag = of(schema)
    assert accepts(tag, reply(invoke({"p0": 1, "p1099": 1})))
    assert not accepts(tag, reply(invoke({"p1099": "x"})))


def test_any_text_needs_no_alternatives() -> None:
    text = size(of(one_parameter(STRING)))
    for schema in ({"type": ["string", "null"]}, {"anyOf": [STRING, {"enum": ["a"]}]}, {}):
        assert size(of(one_parameter(schema))) == text


def test_references_to_the_whole_schema() -> None:
    kids = {"type": "array", "items": {"$ref": "#"}}
    ages = {"type": "array", "items": {"$ref": "#/properties/age"}}
    tag = of({"type": "object", "properties": {"age": INTEGER, "kids": kids, "ages": ages}})
    assert accepts(tag, reply(invoke({"kids": [{"age": 3, "kids": []}], "ages": [1]})))
    mistakes: list[dict[str, Any]] = [
        {"kids": [[]]},
        {"kids": [{"age": "x"}]},
        {"ages": ["x"]},
    ]
    for wrong in mistakes:
        assert not accepts(tag, reply(invoke(wrong))), wrong


def test_alternatives_of_parameters() -> None:
    either = [{"properties": {"b": INTEGER}, "required": ["b"]}, {"$ref": "#/$defs/C"}]
    defs = {"C": {"properties": {"c": STRING}, "required": ["c"]}}
    tag = of({"properties": {"a": STRING}, "required": ["a"], "anyOf": either, "$defs": defs})
    for good in ({"b": 1}, {"c": "y"}):
        assert accepts(tag, reply(invoke({"a": "x", **good})))
        assert not accepts(tag, reply(invoke(good)))
    assert not accepts(tag, reply(invoke({"a": "x"})))


@pytest.mark.parametrize("name", ["a-b", "a.b", 'a"b', "ü ß", "a>b", "x" * 253, "<invoke name="])
def test_names(name: str) -> None:
    text = reply(invoke({name: "v"}, name))
    assert accepts(of({"properties": {name: STRING}, "required": [name]}, name), text)
    assert calls_in(text, {name: {}}) == [(name, {name: "v"})]


@pytest.mark.parametrize("name", ["", " a", 'a">b', 'a" >b', "a\nb", "x" * 254])
def test_names_that_cannot_be_written(name: str) -> None:
    assert accepts(of({"properties": {name: STRING, "b": STRING}}), reply(invoke({"b": "x"})))
    with pytest.raises(RuntimeError, match="at least one element"):
        matcher(of({}, name))


def test_calls_and_the_text_around_them() -> None:
    functions = [Function("f", TWO), Function("g", None)]
    one, many = (forced(functions, only_one=o, with_thought=False) for o in (True, False))
    f, g = invoke({"a": "x"}), invoke({}, "g")
    for tag in (one, many):
        assert all(accepts(tag, reply(f, before="\n" * lines)) for lines in range(4))
        assert accepts(tag, reply(g))
        for wrong in (reply(), "", "text", "text" + reply(f), reply(f) + "text", reply(f) * 2):
            assert not accepts(tag, wrong), wrong
        assert not accepts(tag, reply(f, before="\n" * 4))
        assert not accepts(tag, reply(invoke({}, "h")))
    assert accepts(many, reply(f, g, f))
    assert not accepts(one, reply(f, g))


def test_strict_tools_among_others() -> None:
    functions = [Function("f", TWO), Function("g", {"properties": {"n": INTEGER}}, False)]
    one, many = (strict(functions, only_one=o, with_thought=False) for o in (True, False))
    f, g = invoke({"a": "x"}), invoke({"n": "three", "any": "thing"}, "g")
    for tag in (one, many):
        assert all(accepts(tag, text) for text in ("", "Hello!", "I call." + reply(f), reply(g)))
        for wrong in (reply(invoke({"b": 1})), "A <minimax:tool_call> is", reply()):
            assert not accepts(tag, wrong), wrong
    assert accepts(many, "One" + reply(f, g) + "\nTwo" + reply(g) + "!")
    assert not accepts(one, reply(f, g))
    assert not accepts(one, reply(f) + reply(f))


def test_a_thought_where_nobody_else_keeps_it() -> None:
    tag = of(TWO, with_thought=True)
    assert accepts(tag, "I <b>think</b>\n</think>" + reply(invoke({"a": "x"})))
    for wrong in ("", "I think", "I think <minimax:tool_call></think>"):
        assert not accepts(tag, wrong + reply(invoke({"a": "x"}))), wrong


def test_what_the_chat_template_writes() -> None:
    values = {"path": " a.py\n", "n": 3, "o": {"k": ["ü", 1.5]}, "u": None}
    call = {"type": "function", "function": {"name": "f", "arguments": values}}
    message = {"role": "assistant", "reasoning_content": "Hm.", "tool_calls": [call, call]}
    text = tokenizer().apply_chat_template(
        [{"role": "user", "content": "?"}, message], tokenize=False
    )
    after = text.split("</think>")[1].removesuffix("[e~[\n")
    # The published template has one more line break before the block, and is the same inside.
    assert after == reply(invoke(values), invoke(values))
    schema = {"properties": {"path": STRING, "n": INTEGER, "o": {"type": "object"}, "u": {}}}
    tag = of(schema, only_one=False)
    assert accepts(tag, after)
    assert accepts(tag, "\n" + after)
