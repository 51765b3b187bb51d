"""SGLang asks us for the grammar of forced and strict calls, and finds our parsers by itself."""

from __future__ import annotations

import inspect
import json
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.constrained.base_grammar_backend import InvalidGrammarObject
from sglang.srt.constrained.grammar_manager import GrammarManager
from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    Tool,
    ToolChoice,
    ToolChoiceFuncName,
)
from sglang.srt.entrypoints.openai.protocol import Function as ToolFunction
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.parser.reasoning_parser import ReasoningParser
from sglang.srt.parser.template_detection import (
    detect_reasoning_parser,
    detect_tool_call_parser,
    resolve_auto_parsers,
)
from sglang.srt.sampling.sampling_params import SamplingParams
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
    for several in (reply(f, f), reply(f, g), reply(g, f, f)):
        assert accepts(tag, several) == (choice == "required" and parallel)
    # Forced calls follow the schema, whether or not their tool is strict.
    assert not accepts(tag, reply(invoke({"b": 1})))


@pytest.mark.parametrize("choice", ["required", NAMED, "auto"], ids=["required", "named", "auto"])
@pytest.mark.parametrize(
    ("reasoning_parser", "thinking_mode", "expected"),
    [("minimax", False, False), ("minimax", True, True), (None, False, True), (None, True, True)],
)
def test_who_has_the_thought(
    choice: Any,
    reasoning_parser: str | None,
    thinking_mode: bool,
    expected: bool,
    options: dict[str, Any],
) -> None:
    """The grammar where SGLang says so, or has no parser that would keep it from the grammar."""
    options["reasoning_parser"] = reasoning_parser
    parser = FunctionCallParser([tool("f", is_strict=True)], "minimax-m2")
    _, tag = parser.get_structure_constraint(choice, thinking_mode=thinking_mode)
    written = reply(invoke({"a": "x"}))
    assert accepts(tag, written) is not expected
    # Under "auto" the same characters may also be text.
    assert accepts(tag, "So.</think>" + written) is (expected or choice == "auto")


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


def test_without_a_grammar_backend_forced_calls_are_refused(options: dict[str, Any]) -> None:
    """With status 400, by SGLang: what it makes of our answer is a grammar, and it has none."""
    options["grammar_backend"] = "none"
    parser = FunctionCallParser([tool("f")], "minimax-m2")
    assert not parser.detector.supports_structural_tag()
    assert parser.detector.get_structural_tag(parser.tools, "required") is None
    forced = ChatCompletionRequest(
        model="m",
        messages=[{"role": "user", "content": "Hello!"}],
        tools=[tool("f")],
        tool_choice="required",
    )
    constraint = parser.get_structure_constraint("required")
    found = SamplingParams(**forced.to_sampling_params([], {}, constraint))
    assert found.json_schema is not None
    refusals: list[str] = []
    manager = GrammarManager.__new__(GrammarManager)
    manager.grammar_backend = None
    asked = SimpleNamespace(sampling_params=found, set_finish_with_abort=refusals.append)
    assert not manager.process_req_with_grammar(asked)
    (refusal,) = refusals
    assert "--grammar-backend none" in refusal
    status = inspect.signature(Req.set_finish_with_abort).parameters["status_code"]
    assert status.default == HTTPStatus.BAD_REQUEST


def compiled(value: dict[str, Any]) -> Any:
    """What SGLang makes of the grammar that forces a call with such a parameter."""
    key = json.dumps(of(one_parameter(value)).model_dump(by_alias=True))
    return backend()._init_value_dispatch(("structural_tag", key), True)


EMPTY = {"type": "integer", "minimum": 5, "maximum": 1}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (EMPTY, "minimum greater than maximum"),
        ({"type": "array", "items": EMPTY}, "minimum greater than maximum"),
        ({"type": "array", "minItems": 2, "maxItems": 1}, "minItems is greater than maxItems"),
        ({"enum": ["a\x00"]}, "NUL bytes"),
    ],
    ids=["range", "range_within", "items", "zero"],
)
def test_a_schema_that_xgrammar_cannot_compile(value: dict[str, Any], message: str) -> None:
    found = compiled(value)
    assert isinstance(found, InvalidGrammarObject)
    assert message in found.error_message


def test_a_reference_that_leads_nowhere_is_compiled() -> None:
    value = {"type": "array", "items": {"$ref": "#/nowhere"}}
    assert not isinstance(compiled(value), InvalidGrammarObject)
    for items in ([], [1, "a"]):
        assert accepts(of(one_parameter(value)), reply(invoke({"x": items})))
    assert not accepts(of(one_parameter(value)), reply(invoke({"x": {}})))


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
