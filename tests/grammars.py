"""Grammars of forced and strict calls, and the replies that the chat template would write.

The tokenizer is the bundled checkpoint's, the grammar xgrammar's.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import xgrammar
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarBackend
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
from sglang.srt.parser.reasoning_parser import ReasoningParser
from transformers import AutoTokenizer

from sglang_minimax import TINY_M2
from sglang_minimax.parsers.structural_tag import Function, forced
from sglang_minimax.parsers.tool_calls import Arguments, CallBegins, CallEnds, Text, ToolCallParser

STRING = {"type": "string"}
INTEGER = {"type": "integer"}
TREE: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"enum": ["a", "b"]}, "kids": {"type": "array", "maxItems": 1}},
    "required": ["name"],
    "additionalProperties": False,
}
TREE["properties"]["kids"]["items"] = {"$ref": "#/$defs/Tree"}

#: The end of a reply in the bundled tokenizer.
EOS = 3

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


TWO = {"type": "object", "properties": {"a": STRING, "b": INTEGER}, "required": ["a"]}


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(TINY_M2))


def matcher(tag: Any) -> Any:
    """A fresh matcher of a tag, and what it knows of the tokenizer."""
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer())
    compiled = xgrammar.GrammarCompiler(info, cache_enabled=False).compile_structural_tag(tag)
    return xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=False), info


def accepts(tag: Any, text: str) -> bool:
    """Whether `text` may be the whole reply."""
    found, _ = matcher(tag)
    return found.accept_string(text) and found.accept_token(tokenizer().eos_token_id)


def of(schema: Any, name: str = "f", **options: Any) -> Any:
    """The tag that forces one call of `name`."""
    return forced([Function(name, schema)], **{"only_one": True, "with_thought": False, **options})


def written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def invoke(values: dict[str, Any], name: str = "f") -> str:
    lines = [f'<parameter name="{key}">{written(each)}</parameter>' for key, each in values.items()]
    return "\n".join([f'<invoke name="{name}">', *lines, "</invoke>\n"])


def reply(*calls: str, before: str = "\n\n") -> str:
    return f"{before}<minimax:tool_call>\n{''.join(calls)}</minimax:tool_call>"


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


def backend(parser: str = "minimax", strict_thinking: bool = False) -> ReasonerGrammarBackend:
    """SGLang's grammars of a server with that reasoning parser."""
    vocabulary = len(tokenizer())
    inner = XGrammarGrammarBackend(tokenizer(), vocab_size=vocabulary, model_eos_token_ids=[EOS])
    return ReasonerGrammarBackend(
        inner, ReasoningParser(parser), tokenizer(), enable_strict_thinking=strict_thinking
    )
