"""What the suites of other engines ask of a MiniMax-M2 parser, restated as cases of our own.

Sources, by the key of each case:
  vllm      vLLM, tests/tool_parsers/test_minimax_m2_tool_parser.py
  engine    vLLM, tests/parser/engine/test_minimax_m2.py
  sglang    SGLang, tests of srt/function_call/minimax_m2.py (indices of calls; pull requests
            #23071, #23301, #24995, #27435 and #36691)
  gateway   SGLang's model gateway, tests of its Rust crate `tool_parser` (issue #1743 and others)
  dynamo    NVIDIA Dynamo, its reasoning parser `minimax_m2` and the XML tool parser's tests

Each case is run whole, in single characters and in the pieces that its source uses. Where an
engine wants something else than we do, the case is in DIFFERENT, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.parsers.replies import CLOSE, OPEN, Checked, every, parse, schema, think, wire

STRING = {"type": "string"}
TOOLS = {
    "bash": schema(command=STRING, description=STRING),
    "get_weather": schema(city=STRING, unit=STRING),
    "search": schema(q=STRING),
    "set": schema(count={"type": "integer"}, ratio={"type": "number"}, enabled={"type": "boolean"}),
    "profile": schema(nickname={"anyOf": [STRING, {"type": "null"}]}),
    "settings": schema(config={"anyOf": [{"type": "object"}, {"type": "null"}]}),
}
Values = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Case:
    """A reply in the pieces of its source, and what comes out."""

    source: str
    pieces: tuple[str, ...]
    calls: Values = field(default_factory=list)
    text: str = ""


def call(name: str, **values: str) -> str:
    """A call on one line."""
    inside = "".join(f'<parameter name="{k}">{v}</parameter>' for k, v in values.items())
    return f'<invoke name="{name}">{inside}</invoke>'


SAME = {
    "no call": Case("vllm", ("Hello ", "world"), text="Hello world"),
    "text before": Case(
        "vllm",
        ("Let me check. ", f"{OPEN}{call('get_weather', city='Seattle')}{CLOSE}"),
        [("get_weather", {"city": "Seattle"})],
        "Let me check. ",
    ),
    "an empty piece": Case("vllm", ("",)),
    "an element a piece": Case(
        "vllm",
        (
            *(OPEN, '<invoke name="get_weather">', '<parameter name="city">Seattle</parameter>'),
            f"</invoke>{CLOSE}",
        ),
        [("get_weather", {"city": "Seattle"})],
    ),
    "two calls in pieces": Case(
        "vllm",
        (OPEN, call("search", q="OpenAI"), call("search", q="Gemini"), CLOSE),
        [("search", {"q": "OpenAI"}), ("search", {"q": "Gemini"})],
    ),
    "two calls in one piece": Case(
        "vllm",
        (OPEN, call("search", q="1") + call("bash", command="2"), CLOSE),
        [("search", {"q": "1"}), ("bash", {"command": "2"})],
    ),
    "header first, all else after it": Case(
        "vllm",
        (
            f'{OPEN}<invoke name="get_weather">',
            '<parameter name="city">Rome</parameter><parameter name="unit">C</parameter>'
            f"</invoke>{CLOSE}",
            "",
        ),
        [("get_weather", {"city": "Rome", "unit": "C"})],
    ),
    "nullable with a string": Case(
        "vllm",
        (OPEN, call("profile", nickname="Alice"), CLOSE),
        [("profile", {"nickname": "Alice"})],
    ),
    "nullable with null": Case(
        "vllm", (OPEN, call("profile", nickname="null"), CLOSE), [("profile", {"nickname": None})]
    ),
    "nullable with an object": Case(
        "vllm",
        (OPEN, call("settings", config='{"theme": "dark", "size": 14}'), CLOSE),
        [("settings", {"config": {"theme": "dark", "size": 14}})],
    ),
    "split before the quote": Case(
        "engine",
        (
            OPEN,
            "<invoke name=",
            '"get_weather">',
            '<parameter name="city">X</parameter>',
            "</invoke>",
        ),
        [("get_weather", {"city": "X"})],
    ),
    "types": Case(
        "engine",
        (OPEN, call("set", count="3", ratio="0.5", enabled="true"), CLOSE),
        [("set", {"count": 3, "ratio": 0.5, "enabled": True})],
    ),
    "split inside of values": Case(
        "sglang",
        (
            f'{OPEN}<invoke name="bash"><parameter name="command">cat',
            ' | head -100</parameter><parameter name="description">Run',
            f" tests</parameter></invoke>{CLOSE}",
        ),
        [("bash", {"command": "cat | head -100", "description": "Run tests"})],
    ),
    "split in a tag": Case(
        "sglang",
        (
            f'{OPEN}<invoke name="bash"><parameter name="command">cat | head</parameter><',
            f'parameter name="description">Run</parameter></invoke>{CLOSE}',
        ),
        [("bash", {"command": "cat | head", "description": "Run"})],
    ),
    "split in the opening tag": Case(
        "sglang",
        ("<minimax:tool_", f"call>{call('bash', command='ls')}{CLOSE}"),
        [("bash", {"command": "ls"})],
    ),
    "two blocks": Case(
        "sglang",
        (f"{OPEN}{call('bash', command='A')}{CLOSE}{OPEN}{call('bash', command='B')}{CLOSE}",),
        [("bash", {"command": "A"}), ("bash", {"command": "B"})],
    ),
    "each call keeps its own values": Case(
        "sglang",
        (
            f"{OPEN}{call('bash', command='FIRST')}"
            f"{call('bash', command='SECOND', description='D')}{CLOSE}",
        ),
        [("bash", {"command": "FIRST"}), ("bash", {"command": "SECOND", "description": "D"})],
    ),
    "no parameters": Case("sglang", (f"{OPEN}{call('bash')}{CLOSE}",), [("bash", {})]),
    "no parameters, in pieces": Case(
        "gateway", (OPEN, '\n<invoke name="bash">', "\n</invoke>", f"\n{CLOSE}"), [("bash", {})]
    ),
    "the first of two of one name": Case(
        "sglang",
        (
            f'{OPEN}<invoke name="bash"><parameter name="command">FIRST</parameter>'
            f'<parameter name="command">SECOND</parameter></invoke>{CLOSE}',
        ),
        [("bash", {"command": "FIRST"})],
    ),
    "an unknown function is passed on": Case(
        "gateway",
        (wire(("get_weather", {"city": "T"}), ("unknown", {"city": "P"}), ("bash", {})),),
        [("get_weather", {"city": "T"}), ("unknown", {"city": "P"}), ("bash", {})],
    ),
    "a string that looks like a number": Case(
        "gateway", (wire(("search", {"q": "3"})),), [("search", {"q": "3"})]
    ),
    "no schema": Case(
        "gateway",
        (
            wire(
                (
                    "process",
                    {
                        "a": "42",
                        "b": "1.5",
                        "c": "true",
                        "d": "null",
                        "e": "a string",
                        "f": "[1, 2, x",
                    },
                )
            ),
        ),
        [
            (
                "process",
                {"a": 42, "b": 1.5, "c": True, "d": None, "e": "a string", "f": "[1, 2, x"},
            )
        ],
    ),
    "text on both sides": Case(
        "gateway",
        (f"I'll look. {wire(('bash', {}))} Here it is.",),
        [("bash", {})],
        "I'll look.  Here it is.",
    ),
    "markup in a value": Case(
        "gateway",
        (wire(("bash", {"command": '<html><body a="b">Hi</body></html>'})),),
        [("bash", {"command": '<html><body a="b">Hi</body></html>'})],
    ),
    "lines and emoji": Case(
        "gateway",
        (wire(("bash", {"command": "line1\nline2", "description": "你好 🌍\t"})),),
        [("bash", {"command": "line1\nline2", "description": "你好 🌍\t"})],
    ),
    "twenty parameters": Case(
        "gateway",
        (wire(("many", {f"p{n}": f"value{n}" for n in range(20)})),),
        [("many", {f"p{n}": f"value{n}" for n in range(20)})],
    ),
    "no name": Case(
        "gateway",
        (f'{OPEN}\n<invoke>\n<parameter name="city">M</parameter>\n</invoke>\n{CLOSE}',),
        text=f'{OPEN}\n<invoke>\n<parameter name="city">M</parameter>\n</invoke>\n{CLOSE}',
    ),
    "an object by anyOf": Case(
        "dynamo",
        (wire(("settings", {"config": '\n{"a": "b"}\n'})),),
        [("settings", {"config": {"a": "b"}})],
    ),
    "what does not fit is a string": Case(
        "dynamo",
        (wire(("set", {"count": "not_an_int", "ratio": "not_a_float"})),),
        [("set", {"count": "not_an_int", "ratio": "not_a_float"})],
    ),
}

DIFFERENT = {
    # vLLM gives "5" for a tool without a schema; we read JSON where nothing says otherwise, as
    # SGLang's gateway does.
    "no schema, a number": Case("vllm", (wire(("f", {"days": "5"})),), [("f", {"days": 5})]),
    # vLLM and SGLang drop a call of an unknown function (SGLang unless it is told to forward);
    # the model waits for an answer then, so we pass it on, and the client can say so.
    "an unknown function": Case(
        "engine",
        (wire(("img_gen", {"prompt": "cat"}), ("search", {"q": "news"})),),
        [("img_gen", {"prompt": "cat"}), ("search", {"q": "news"})],
    ),
    # The gateway takes the line break before a block for text; the chat template puts it there.
    # It drops the text behind the block; we keep it.
    "line breaks around a block": Case(
        "gateway", (f"Let me.\n{wire(('bash', {}))}\nDone.",), [("bash", {})], "Let me.\nDone."
    ),
    # The gateway keeps JSON without a schema as a string; the chat template writes objects so.
    "an object without a schema": Case(
        "gateway", (wire(("f", {"a": '{"b": [1]}'})),), [("f", {"a": {"b": [1]}})]
    ),
    # It also reads Python's words where a string is possible; then "None" could not be said.
    "Python's words without a schema": Case(
        "gateway", (wire(("f", {"a": "None", "b": "True"})),), [("f", {"a": "None", "b": "True"})]
    ),
    # It decodes XML's entities; the chat template does not encode any, and code is full of them.
    "entities": Case(
        "gateway",
        (wire(("bash", {"command": "a &amp;&amp; b &lt; c"})),),
        [("bash", {"command": "a &amp;&amp; b &lt; c"})],
    ),
    # vLLM ends a value that was not closed at `</invoke>`; an argument may hold that very text
    # (this file does), so for us it is part of the value, and the call was cut off.
    "a value that is not closed": Case(
        "engine",
        (
            f'{OPEN}<invoke name="get_weather"><parameter name="city">Rome</parameter>',
            f'<parameter name="unit">celsius</invoke>{CLOSE}',
        ),
        [("get_weather", {"city": "Rome", "unit": f"celsius</invoke>{CLOSE}"})],
    ),
    # The gateway gives a call that was cut off as text; a client that streams has part of it by
    # then. We report it with the arguments so far, as not complete.
    "a call that was cut off": Case(
        "gateway",
        (f'{OPEN}\n<invoke name="get_weather">\n<parameter name="city">Chicago</parameter>',),
        [("get_weather", {"city": "Chicago"})],
    ),
    # Dynamo makes false of what is no boolean; we invent nothing.
    "a boolean that is none": Case(
        "dynamo", (wire(("set", {"enabled": "maybe"})),), [("set", {"enabled": "maybe"})]
    ),
}
CUT_OFF = ("a value that is not closed", "a call that was cut off")


@pytest.mark.parametrize("name", [*SAME, *DIFFERENT])
def test_calls(name):
    case = (SAME | DIFFERENT)[name]
    reply = "".join(case.pieces)
    for cut in (case.pieces, [reply], every(reply, 1)):
        found = parse(cut, TOOLS)
        assert found.text == case.text
        if name not in CUT_OFF:
            assert found.values() == case.calls


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (CUT_OFF[0], f'{{"city": "Rome", "unit": "celsius</invoke>{CLOSE}'),
        (CUT_OFF[1], '{"city": "Chicago"'),
    ],
)
def test_calls_that_were_cut_off(name, arguments):
    (call,) = parse("".join(DIFFERENT[name].pieces), TOOLS).calls
    assert (call.arguments, call.complete) == (arguments, False)


def test_several_replies_do_not_share_a_state():
    """gateway: a parser is used for one call after another."""
    checked = Checked(TOOLS)
    for city in ("London", "Paris"):
        checked.feed(f"{OPEN}{call('get_weather', city=city)}{CLOSE}")
    assert [arguments for _, arguments in checked.finish().values()] == [
        {"city": "London"},
        {"city": "Paris"},
    ]


THINKING = {
    # source and what it asks: reply, reasoning, content
    "engine: no opening tag": ("reasoning</think>content", "reasoning", "content"),
    "engine: no closing tag": ("still reasoning", "still reasoning", ""),
    # vLLM 38212: M2.5 writes both tags.
    "vllm: both tags": ("<think>reasoning</think>content", "reasoning", "content"),
    "dynamo: a call after the end": (
        f"I should call.</think>{OPEN}{call('bash')}{CLOSE}",
        "I should call.",
        f"{OPEN}{call('bash')}{CLOSE}",
    ),
    "dynamo: a call ends the reasoning": (
        f"{OPEN}{call('bash')}{CLOSE}",
        "",
        f"{OPEN}{call('bash')}{CLOSE}",
    ),
    "dynamo: white space alone": ("\n\n", "\n\n", ""),
    # Dynamo also ends it at a call without a block; the tool parser would not find that one, so
    # for us it stays a thought.
    "dynamo, different: a call without a block": (
        f"I should.{call('bash')}",
        f"I should.{call('bash')}",
        "",
    ),
    # SGLang ends it at Qwen's token, which a thought may mention.
    "sglang, different: another model's token": (
        "a <tool_call> b</think>c",
        "a <tool_call> b",
        "c",
    ),
}


@pytest.mark.parametrize("name", THINKING)
def test_reasoning(name):
    reply, thoughts, content = THINKING[name]
    for cut in ([reply], every(reply, 1), every(reply, 5)):
        assert think(cut) == (thoughts, content)
