"""The format of forced and strict calls: what it accepts, and that our parser reads all of it.

The tokenizer is the bundled checkpoint's, the grammar xgrammar's; jsonschema judges arguments.
"""

from __future__ import annotations

import json
import random
import time
from functools import cache
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch
import xgrammar
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.constrained.base_grammar_backend import InvalidGrammarObject
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarBackend
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
from sglang.srt.entrypoints.openai.protocol import Function as ToolFunction
from sglang.srt.entrypoints.openai.protocol import Tool, ToolChoice, ToolChoiceFuncName
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.parser.reasoning_parser import ReasoningParser
from sglang.srt.parser.template_detection import (
    detect_reasoning_parser,
    detect_tool_call_parser,
    resolve_auto_parsers,
)
from sglang.srt.server_args import ServerArgs
from transformers import AutoTokenizer

from sglang_minimax import TINY_M2
from sglang_minimax.parsers import structural_tag, tool_detector
from sglang_minimax.parsers.reasoning_detector import MinimaxAppendThinkDetector, MinimaxDetector
from sglang_minimax.parsers.structural_tag import Function, forced, strict
from sglang_minimax.parsers.tool_calls import Arguments, CallBegins, CallEnds, Text, ToolCallParser
from sglang_minimax.parsers.tool_detector import MinimaxM2Detector

STRING = {"type": "string"}
INTEGER = {"type": "integer"}
TREE: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"enum": ["a", "b"]}, "kids": {"type": "array", "maxItems": 1}},
    "required": ["name"],
    "additionalProperties": False,
}
TREE["properties"]["kids"]["items"] = {"$ref": "#/$defs/Tree"}

#: Values: what is allowed and what is not, as the chat template would write them.
VALUES: list[tuple[dict[str, Any], list[Any], list[str]]] = [
    (STRING, ["", " x\n", "<b></c>\n</invoke>", "null", "{", "ü\U0001f642"], ["a</parameter>b"]),
    (INTEGER, [0, -12, 10**30], ["", "1.5", " 1", "1 ", "x", "null"]),
    ({"type": "number"}, [1.5, -2, 1e-7], ["", "abc", "1,5"]),
    ({"type": "boolean"}, [True, False], ["True", "yes"]),
    ({"enum": ["C", "F", None, 3]}, ["C", None, 3], [" C", "C ", "c", ""]),
    ({"const": "x y"}, ["x y"], ["x", ""]),
    ({"type": ["string", "null"]}, ["a", None, ""], []),
    ({"anyOf": [{"enum": ["a"]}, {"type": "null"}]}, ["a", None], ["b"]),
    ({"anyOf": [INTEGER, {"type": "null"}]}, [3, None], ["x", ""]),
    ({"oneOf": [{"const": 1}, {"const": "z"}]}, [1, "z"], ["2"]),
    ({"type": "array", "items": INTEGER}, [[], [1, 2]], ['["a"]', "1"]),
    (
        {"type": "object", "properties": {"a": STRING}, "required": ["a"]},
        [{"a": '<\n"}</parameter>'}],
        ["{}", '{"b": "x"}', "a"],
    ),
    ({"$ref": "#/$defs/Tree"}, [{"name": "a", "kids": [{"name": "b"}]}], ['{"name": "c"}', "{}"]),
    ({"allOf": [{"$ref": "#/$defs/Unit"}]}, ["C"], ["K"]),
    ({"type": "string", "pattern": "^[a-z]{2,3}$"}, ["ab", "abc"], ["a", "abcd", "AB"]),
    ({"type": "string", "format": "date"}, ["2024-02-03"], ["2024", "today"]),
    ({"type": "string", "format": "email"}, ["a.b@c.org"], ["a", "<a@c.org>"]),
    ({"type": "string", "format": "json-pointer"}, ["", "/a~1/0"], ["a", "/a</parameter>b"]),
    ({"type": "string", "format": "relative-json-pointer"}, ["1#", "0/a"], ["/a", "1/<"]),
    ({"type": "string", "format": "path"}, ["<a>/b.py"], ["a</parameter>b"]),
    ({"type": "string", "format": "path", "maxLength": 2}, ["ab"], ["abc", "</parameter>"]),
    ({"type": "string", "format": "x", "pattern": "^a+$"}, ["aa"], ["b"]),
    ({"allOf": [{"$ref": "#/$defs/Unit"}, {"$ref": "#/$defs/Note"}]}, ["C", "F"], ["K", ""]),
    ({"allOf": [{"allOf": [{"$ref": "#/$defs/Unit"}]}, {"allOf": [{}]}]}, ["C"], ["K"]),
    ({"type": "array", "items": {"$ref": "#/$defs/a~1b%20c"}}, [[1]], ['["x"]']),
    ({"type": "string", "minLength": 1}, ["a", "<!DOCTYPE html>", "\n"], [""]),
    ({"type": "string", "maxLength": 3}, ["", "abc", "<a"], ["abcd", "a<b>"]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "abc"], ["a", "abcd", "<a><"]),
    ({"type": "string", "minLength": 1, "maxLength": 4}, ["<a>", "abcd"], ["", "abcde", "a<b>c"]),
    ({"type": ["integer", "string"], "maxLength": 2}, [7, "ab"], ["abc"]),
    ({}, ["x", 3, [1], {"a": 1}, None], []),
]
#: What is not enforced, types that JSON schemas do not have, and an object that looks like one.
ODD: list[tuple[dict[str, Any], list[Any], list[str]]] = [
    ({"type": "string", "pattern": "^.+$"}, ["anything <at> all"], []),
    ({"type": "INTEGER"}, [3], ["x", "1.5"]),
    ({"type": "STRING"}, ["x"], ["a</parameter>b"]),
    ({"type": "float"}, [1.5, "x"], []),
    ({"type": "array", "items": {"type": "INTEGER"}}, [[3]], ['["a"]']),
    ({"type": "array", "items": {"type": "any"}}, [[3, "a"]], ["a"]),
    (
        {"type": "object", "properties": {"type": {"const": {"type": "X"}}}, "required": ["type"]},
        ['{"type": {"type":"X"}}'],
        ['{"type": {}}'],
    ),
]
DEFINITIONS = {
    "Tree": TREE,
    "Unit": {"enum": ["C", "F"]},
    "Note": {"description": "Of a unit."},
    "a/b c": {"type": "integer"},
}


def one_parameter(value: Any, **more: Any) -> dict[str, Any]:
    """A tool's schema with the required parameter x."""
    return {
        "type": "object",
        "properties": {"x": value},
        "required": ["x"],
        "additionalProperties": False,
        "$defs": DEFINITIONS,
        **more,
    }


# --- what the grammar accepts --------------------------------------------------------------


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(TINY_M2))


def matcher(tag: Any) -> Any:
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer())
    compiled = xgrammar.GrammarCompiler(info, cache_enabled=False).compile_structural_tag(tag)
    return xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=False), info


def accepts(tag: Any, text: str) -> bool:
    """Whether `text` may be the whole reply."""
    found, _ = matcher(tag)
    return found.accept_string(text) and found.accept_token(tokenizer().eos_token_id)


def of(schema: Any, name: str = "f", **options: Any) -> Any:
    return forced([Function(name, schema)], **{"only_one": True, "with_thought": False, **options})


def written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def invoke(values: dict[str, Any], name: str = "f") -> str:
    lines = [f'<parameter name="{key}">{written(each)}</parameter>' for key, each in values.items()]
    return "\n".join([f'<invoke name="{name}">', *lines, "</invoke>\n"])


def reply(*calls: str, before: str = "\n\n") -> str:
    return f"{before}<minimax:tool_call>\n{''.join(calls)}</minimax:tool_call>"


@pytest.mark.parametrize(("schema", "good", "bad"), VALUES + ODD, ids=lambda v: json.dumps(v)[:40])
def test_values(schema: dict[str, Any], good: list[Any], bad: list[str]) -> None:
    tag = of(one_parameter(schema))
    for value in good:
        assert accepts(tag, reply(invoke({"x": value}))), value
    for text in bad:
        assert not accepts(tag, reply(invoke({"x": text}))), text


TWO = {"type": "object", "properties": {"a": STRING, "b": INTEGER}, "required": ["a"]}


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


@pytest.mark.parametrize("schema", [None, {}, {"type": "object"}, {"properties": {}}, "junk", []])
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
    tag = of(one_parameter({"type": "string", "pattern": pattern}))
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


@pytest.mark.parametrize("name", ["", " a", 'a">b', "a\nb", "x" * 254])
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


# --- what the grammar allows, our parser reads ----------------------------------------------


def calls_in(text: str, tools: dict[str, Any]) -> list[tuple[str, Any]]:
    """The calls of a reply that has nothing else, all complete."""
    parser = ToolCallParser(tools)
    names: list[str] = []
    arguments: list[str] = []
    for event in [*parser.feed(text), *parser.finish()]:
        if isinstance(event, CallBegins):
            names.append(event.name)
            arguments.append("")
        elif isinstance(event, Arguments):
            arguments[event.index] += event.json
        elif isinstance(event, CallEnds):
            assert event.complete
        else:
            assert isinstance(event, Text)
            assert not event.text.strip("\n")
    return [(name, json.loads(each)) for name, each in zip(names, arguments, strict=True)]


ENDINGS = ("</parameter>\n", '"', "}", "]", "</invoke>\n", "</minimax:tool_call>")


def is_text(piece: bytes) -> bool:
    return piece.decode(errors="ignore").encode() == piece


def wandered(tag: Any, seed: int) -> str:
    """A reply made of random tokens that the grammar allows; it inclines to come to an end."""
    choose = random.Random(seed)
    found, info = matcher(tag)
    mask = xgrammar.allocate_token_bitmask(1, info.vocab_size)
    vocabulary = info.decoded_vocab
    text = b""
    for _ in range(12_000):
        ending = choose.choice(ENDINGS)
        if choose.random() < 0.4 and found.accept_string(ending):
            text += ending.encode()
            continue
        found.fill_next_token_bitmask(mask)
        bits = mask[0].unsqueeze(1) >> torch.arange(32, dtype=torch.int32) & 1
        tokens = bits.flatten().nonzero().flatten().tolist()
        # A model that writes half a character gets a replacement for each byte; not here.
        token = choose.choice([each for each in tokens if is_text(vocabulary[each])])
        assert found.accept_token(token)
        if found.is_terminated():
            return text.decode()
        text += vocabulary[token]
    raise AssertionError(f"no end: {text[-200:]!r}")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "value",
    [schema for schema, _, _ in VALUES],
    ids=lambda v: json.dumps(v)[:40],
)
def test_whatever_is_allowed_is_valid(value: dict[str, Any], seed: int) -> None:
    schema = one_parameter(value)
    ((name, arguments),) = calls_in(wandered(of(schema), seed), {"f": schema})
    assert name == "f"
    jsonschema.validate(arguments, schema)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_allowed_is_valid_together(seed: int) -> None:
    values = {f"p{i}": value for i, (value, good, _) in enumerate(VALUES) if good}
    schemas = {
        name: {**one_parameter({}), "properties": values, "required": sorted(values)[::step]}
        for name, step in (("f", 2), ("g", 3))
    }
    functions = [Function(name, schema) for name, schema in schemas.items()]
    found = calls_in(wandered(forced(functions, only_one=False, with_thought=False), seed), schemas)
    assert found
    for name, arguments in found:
        jsonschema.validate(arguments, schemas[name])


@pytest.mark.parametrize("kind", [*structural_tag._FORMATS, *structural_tag._PATTERN_OF_FORMAT])
def test_no_format_has_markup(kind: str) -> None:
    tag = of(one_parameter({"type": "string", "format": kind}))
    for seed in range(20):
        ((_, arguments),) = calls_in(wandered(tag, seed), {"f": {}})
        assert "<" not in str(arguments["x"])


def test_a_mistake_would_be_seen() -> None:
    """xgrammar's own style lets white space into values."""
    schema = one_parameter({"enum": ["C", "F"]})
    theirs = xgrammar.get_model_structural_tag(
        "minimax", tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}],
        tool_choice="required", reasoning=False,
    )  # fmt: skip
    text = "\n</think>\n\n\n" + reply(invoke({"x": " C"}))
    assert accepts(theirs, text)
    ((_, arguments),) = calls_in(reply(invoke({"x": " C"})), {"f": schema})
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(arguments, schema)


# --- any schema ------------------------------------------------------------------------------

A = {"anyOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/A"}]}


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"x": A}, "$defs": {"A": A}},
        {"anyOf": [{"$ref": "#"}, {"$ref": "#"}], "properties": {"x": {}}},
        {"allOf": [{"$ref": "#"}, {"$ref": "#"}], "required": ["x"]},
    ],
    ids=["value", "parameters", "all"],
)
def test_a_schema_that_refers_to_itself_ends(schema: dict[str, Any]) -> None:
    begin = time.process_time()
    of(schema)
    # Observed 0.03 s; two branches to a depth of 32 would take hours.
    assert time.process_time() - begin < 2


KEYWORDS = st.sampled_from(
    [
        *("type", "properties", "required", "anyOf", "oneOf", "allOf", "enum", "const", "$ref"),
        *("items", "pattern", "minLength", "maxLength", "format", "additionalProperties", "$defs"),
    ]
)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats()
    | st.sampled_from(["string", "object", "#", "#/$defs/x", "x", "(", "[", "a.*"]) | st.text()
)  # fmt: skip
JUNK = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYWORDS | st.text(), inner),
    max_leaves=25,
)


@settings(max_examples=300, deadline=None)
@given(JUNK)
def test_no_schema_raises(schema: Any) -> None:
    """SGLang takes an exception for a request for JSON, which our parser would be given."""
    for with_strict in (forced, strict):
        tag = with_strict([Function("f", schema)], only_one=False, with_thought=False)
        json.dumps(tag.model_dump(by_alias=True))


# --- the hook in SGLang ------------------------------------------------------------------------


def tool(name: str = "f", is_strict: bool = False, parameters: Any = TWO) -> Tool:
    return Tool(function=ToolFunction(name=name, strict=is_strict, parameters=parameters))


NAMED = ToolChoice(function=ToolChoiceFuncName(name="f"))


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Launch options as the detector reads them."""
    found: dict[str, Any] = {"grammar_backend": "xgrammar", "reasoning_parser": "minimax"}
    monkeypatch.setattr(tool_detector, "_setting", lambda namespace, name: found[name])
    return found


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls_are_native(choice: Any, parallel: bool, options: dict[str, Any]) -> None:
    parser = FunctionCallParser([tool("f"), tool("g")], "minimax-m2")
    kind, tag = parser.get_structure_constraint(choice, parallel_tool_calls=parallel)
    assert kind == "structural_tag"
    assert parser.owns_tool_format()
    f, g = invoke({"a": "x"}), invoke({"a": "x"}, "g")
    assert accepts(tag, reply(f))
    assert accepts(tag, reply(g)) == (choice == "required")
    assert accepts(tag, reply(f, f)) == (choice == "required" and parallel)
    options["reasoning_parser"] = None
    _, tag = parser.get_structure_constraint(choice)
    assert accepts(tag, "So.</think>" + reply(f))


def test_strict_tools_are_native(options: dict[str, Any]) -> None:
    loose = FunctionCallParser([tool("f")], "minimax-m2")
    assert loose.get_structure_constraint("auto") is None
    parser = FunctionCallParser([tool("f", is_strict=True), tool("g")], "minimax-m2")
    kind, tag = parser.get_structure_constraint("auto")
    assert kind == "structural_tag"
    assert not accepts(tag, reply(invoke({"b": 1})))
    assert accepts(tag, "Well." + reply(invoke({"b": 1}, "g")))


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = INTEGER
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "value",
    [nested(20_000), {"enum": [10**5000]}, {"type": "array", "items": {"const": 10**5000}}],
    ids=["deep", "digits", "digits_within"],
)
@pytest.mark.parametrize("choice", ["required", NAMED, "auto"], ids=["required", "named", "auto"])
def test_a_schema_that_cannot_be_written_is_refused(
    choice: Any, value: Any, options: dict[str, Any]
) -> None:
    """Not forced as JSON, which our parser would not read."""
    function = ToolFunction.model_construct(
        name="f", strict=True, parameters={"properties": {"x": value}}
    )
    parser = FunctionCallParser([Tool.model_construct(function=function)], "minimax-m2")
    kind, tag = parser.get_structure_constraint(choice)
    assert kind == "structural_tag"
    key = json.dumps(tag.model_dump(by_alias=True))
    found = backend()._init_value_dispatch(("structural_tag", key), True)
    assert isinstance(found, InvalidGrammarObject)
    assert "at least one element" in found.error_message


@pytest.mark.parametrize("depth", [30, 100])
def test_a_deep_schema_holds(depth: int) -> None:
    good, bad = (json.loads("[" * depth + each + "]" * depth) for each in ("1", '"a"'))
    tag = of(one_parameter(nested(depth)))
    assert accepts(tag, reply(invoke({"x": good})))
    assert not accepts(tag, reply(invoke({"x": bad})))


@pytest.mark.parametrize("backend", ["llguidance", "outlines", "none"])
def test_other_grammar_backends_have_json(backend: str, options: dict[str, Any]) -> None:
    """Grammar and parser agree: neither is native."""
    options["grammar_backend"] = backend
    parser = FunctionCallParser([tool("f", is_strict=True)], "minimax-m2")
    assert not parser.owns_tool_format()
    for choice in ("required", NAMED):
        kind, schema = parser.get_structure_constraint(choice)
        assert (kind, schema["type"]) == ("json_schema", "array")
    assert parser.get_structure_constraint("auto") is None


def test_auto_detection_finds_ours() -> None:
    published = "{{ '<think>' }} ]~b]ai {{ '<minimax:tool_call>' }}"
    for template in (published, (TINY_M2 / "chat_template.jinja").read_text()):
        tools = detect_tool_call_parser(template, tokenizer())
        reasoning = detect_reasoning_parser(template, tokenizer())
        assert FunctionCallParser.ToolCallParserEnum[str(tools)] is MinimaxM2Detector
        assert ReasoningParser.DetectorMap[str(reasoning)] is MinimaxDetector


def test_auto_detection_of_a_launch() -> None:
    arguments = ServerArgs(
        model_path=str(TINY_M2), tool_call_parser="auto", reasoning_parser="auto"
    )
    resolve_auto_parsers(arguments)
    found = resolving_view(arguments)
    assert (found.tool_call_parser, found.reasoning_parser) == ("minimax-m2", "minimax")


# --- thoughts ----------------------------------------------------------------------------------


def backend(parser: str = "minimax", strict_thinking: bool = False) -> ReasonerGrammarBackend:
    vocabulary = len(tokenizer())
    inner = XGrammarGrammarBackend(tokenizer(), vocab_size=vocabulary, model_eos_token_ids=[EOS])
    return ReasonerGrammarBackend(
        inner, ReasoningParser(parser), tokenizer(), enable_strict_thinking=strict_thinking
    )


def token(text: str) -> int:
    (found,) = tokenizer().encode(text, add_special_tokens=False)
    return int(found)


EOS = 3
BLOCK, CLOSE, LETTER = "<minimax:tool_call>", "</think>", "a"


def grammar(of_backend: ReasonerGrammarBackend, tag: Any = None, reasoning: bool = True) -> Any:
    key = json.dumps((tag or of(TWO)).model_dump(by_alias=True))
    return of_backend._init_value_dispatch(("structural_tag", key), reasoning)


def allowed(of_grammar: Any, *tokens: int, row: int = 0) -> list[bool]:
    mask = of_grammar.allocate_vocab_mask(len(tokenizer()), row + 1, "cpu")
    of_grammar.fill_vocab_mask(mask, row)
    assert torch.all(mask[:row] == -1)  # other rows are other requests
    return [bool(int(mask[row, each // 32]) >> each % 32 & 1) for each in tokens]


def jumps() -> tuple[int, ...]:
    assert tokenizer().eos_token_id == EOS
    return token(BLOCK), EOS, token(CLOSE), token(LETTER)


@pytest.mark.parametrize("parser", ["minimax", "minimax-append-think"])
def test_a_thought_cannot_jump(parser: str) -> None:
    assert issubclass(MinimaxAppendThinkDetector, MinimaxDetector)
    found = grammar(backend(parser))
    for each in (found, found.copy()):
        assert allowed(each, *jumps(), row=2) == [False, False, True, True]
    found.accept_token(token(LETTER))
    found.accept_token(token(CLOSE))
    # Behind the thought the grammar has the word.
    assert allowed(found, *jumps()) == [True, False, False, False]
    found.rollback(1)
    assert allowed(found, *jumps()) == [False, False, True, True]
    found.rollback(1)
    assert allowed(found.copy(), *jumps()) == [False, False, True, True]


def test_a_request_that_does_not_think_has_its_grammar_at_once() -> None:
    assert allowed(grammar(backend(), reasoning=False), *jumps()) == [True, False, False, False]


def test_from_the_cache_as_when_new() -> None:
    of_backend = backend()
    of_backend.set_cache(("structural_tag", "k"), grammar(of_backend).copy())
    found, hit = of_backend.get_cached_or_future_value(("structural_tag", "k"), True)
    assert hit
    assert allowed(found, *jumps()) == [False, False, True, True]


def test_other_requests_and_parsers_are_left_alone() -> None:
    assert backend().init_strict_reasoning_grammar(True) is None
    other = ReasonerGrammarBackend(
        backend().grammar_backend, ReasoningParser("deepseek-r1"), tokenizer()
    )
    assert allowed(grammar(other), *jumps()) == [True, True, True, True]  # they may jump


def test_without_the_patch_a_thought_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    make = ReasonerGrammarBackend._make_grammar_object
    monkeypatch.setattr(ReasonerGrammarBackend, "_make_grammar_object", make.__wrapped__)
    assert allowed(grammar(backend()), *jumps()) == [True, True, True, True]


def test_strict_thinking_masks_the_same() -> None:
    strict_backend = backend(strict_thinking=True)
    alone = strict_backend.init_strict_reasoning_grammar(True)
    for each in (alone, grammar(strict_backend)):
        assert allowed(each, *jumps()) == [False, False, True, True]


def test_a_thinking_budget_is_kept_only_where_a_request_has_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_backend = backend()
    of_backend.max_think_tokens = 1  # SGLANG_MAX_THINK_TOKENS, which is for strict thinking
    found = grammar(of_backend)
    for _ in range(3):
        found.accept_token(token(LETTER))
    assert allowed(found, *jumps()) == [False, False, True, True]


@pytest.mark.parametrize(
    ("options", "thinks"),
    [
        ({"content": "So.</think>"}, False),
        ({"content": "So.\n</think>\n\nIt is", "name": "minimax-append-think"}, False),
        ({"content": "So"}, True),
        ({"content": None}, True),
        ({"content": [{"type": "text", "text": "</think>"}]}, True),
        ({"content": "So.</think>", "role": "user"}, True),
        ({"content": "So.</think>", "continued": False}, True),
        ({"content": "So.</think>", "name": "deepseek-r1"}, True),
        ({"content": "So.</think>", "name": None}, True),
    ],
    ids=str,
)
def test_a_continued_answer_does_not_think(options: dict[str, Any], thinks: bool) -> None:
    from sglang_minimax.patches.thinking_grammar import begin_behind_a_finished_thought

    def process(self: Any, request: Any, is_multimodal: bool, *, output_constrained: bool) -> Any:
        return SimpleNamespace(require_reasoning=True)

    message = SimpleNamespace(role=options.get("role", "assistant"), content=options["content"])
    request = SimpleNamespace(
        continue_final_message=options.get("continued", True), messages=[message]
    )
    handler = SimpleNamespace(reasoning_parser=options.get("name", "minimax"))
    wrapped = begin_behind_a_finished_thought(process)
    assert wrapped(handler, request, False, output_constrained=True).require_reasoning is thinks


def test_a_tag_of_several_tokens_is_not_kept_from_thoughts() -> None:
    from sglang_minimax.patches.thinking_grammar import ends_of_a_reply

    class Spelling:
        eos_token_id = 9
        additional_stop_token_ids = (11,)

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [1, 2, 3]

    assert ends_of_a_reply(Spelling()) == [9, 11]
    assert ends_of_a_reply(tokenizer()) == [token(BLOCK), EOS]
