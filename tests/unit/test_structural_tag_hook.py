"""SGLang asks us for the grammar of forced and strict calls, and finds our parsers by itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.constrained.base_grammar_backend import InvalidGrammarObject
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

from sglang_minimax import TINY_M2
from sglang_minimax.parsers import tool_detector
from sglang_minimax.parsers.reasoning_detector import MinimaxDetector
from sglang_minimax.parsers.tool_detector import MinimaxM2Detector
from tests.grammars import (
    INTEGER,
    TWO,
    accepts,
    backend,
    invoke,
    of,
    one_parameter,
    reply,
    tokenizer,
)


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
