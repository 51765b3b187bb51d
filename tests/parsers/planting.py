"""Plants a mistake in a copy of the parsers, and the quick checks that must notice it.

A mistake is a replacement of text that must occur exactly once, so a line that moves fails instead
of planting nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import sglang_minimax.parsers
from tests.parsers.allocations import traced
from tests.parsers.replies import (
    CLOSE,
    OPEN,
    Call,
    Reply,
    every,
    parse,
    pieces,
    schema,
    think,
    wire,
)

FOLDER = Path(sglang_minimax.parsers.__file__).parent
PACKAGE = "planted_parsers"
MODULES = ("markup", "schema_parts", "schema", "values", "tool_calls", "reasoning")
Parsers = SimpleNamespace  # with `tool_calls` and `reasoning`


@contextmanager
def planted(file: str, right: str, wrong: str) -> Iterator[Parsers]:
    """A copy of the modules in which `right`, in `file`, is `wrong`."""
    sys.modules[PACKAGE] = ModuleType(PACKAGE)
    found = {}
    try:
        for name in MODULES:
            text = (FOLDER / f"{name}.py").read_text()
            if name == file:
                assert text.count(right) == 1, f"{right!r} is not once in {name}.py"
                text = text.replace(right, wrong)
            text = text.replace("sglang_minimax.parsers", PACKAGE)
            found[name] = sys.modules[f"{PACKAGE}.{name}"] = ModuleType(f"{PACKAGE}.{name}")
            exec(compile(text, f"{PACKAGE}/{name}.py", "exec"), found[name].__dict__)
        yield Parsers(tool_calls=found["tool_calls"], reasoning=found["reasoning"])
    finally:
        for name in (PACKAGE, *(f"{PACKAGE}.{each}" for each in MODULES)):
            sys.modules.pop(name, None)


# --- the checks ---

TOOLS = {
    "f": schema(
        s={"type": "string"},
        n={"type": "number"},
        i={"type": "integer"},
        o={"type": "object"},
        u={"type": ["string", "null"]},
        e={"enum": ["1", 1]},
        w={"type": ["string", "boolean"]},
        m={"type": ["string", "number"]},
        l={"enum": ["null", None]},
        b={"type": "boolean"},
        r={"$ref": "#/$defs/a%20text"},
    )
    | {
        "$defs": {"a text": {"type": "string"}},
        "anyOf": [{"properties": {"x": {"type": "string"}}}, {"properties": {"y": {}}}],
        "patternProperties": {
            "^p_": {"type": "string"},
            "_text": {"type": "string"},
            r"^n\d$": {"type": "string"},
        },
    }
}


def agrees(parsers: Parsers, text: str, expected: Reply) -> None:
    """However it is cut: in two at each place, and in single characters."""
    cuts = [[text], every(text, 1), every(text, 2), *(pieces(text, [n]) for n in range(len(text)))]
    for cut in cuts:
        found = parse(cut, TOOLS, parsers.tool_calls)
        assert found == expected, f"{cut}: {found} and not {expected}"


def value_becomes(name: str, text: str, expected: str) -> Callable[[Parsers], None]:
    def check(parsers: Parsers) -> None:
        call = Call("f", f'{{"{name}": {expected}}}', complete=True)
        agrees(parsers, wire(("f", {name: text})), Reply("", [call]))

    return check


def reply_becomes(
    text: str, left: str, *calls: str, complete: bool = True, name: str = "f"
) -> Callable[[Parsers], None]:
    def check(parsers: Parsers) -> None:
        agrees(parsers, text, Reply(left, [Call(name, each, complete) for each in calls]))

    return check


def thoughts_become(text: str, thoughts: str, content: str) -> Callable[[Parsers], None]:
    def check(parsers: Parsers) -> None:
        for cut in ([text], every(text, 1), *(pieces(text, [n]) for n in range(len(text)))):
            found = think(cut, module=parsers.reasoning)
            assert found == (thoughts, content), f"{cut}: {found}"

    return check


def keeps_little(parsers: Parsers) -> None:
    parser = parsers.tool_calls.ToolCallParser(TOOLS)
    for piece in every("text " * 200 + wire(("f", {"s": "value " * 200})), 4):
        parser.feed(piece)
        assert len(parser._rest) <= 300, f"{len(parser._rest)} characters are kept"


def makes_little(parsers: Parsers) -> None:
    """Of 64 KB in small pieces: no step makes a string of what was held back before."""
    for begin, piece in (('<parameter name="n">', "1" * 16), ("", " " * 16)):
        parser = parsers.tool_calls.ToolCallParser(TOOLS)
        parser.feed(f'{OPEN}<invoke name="f">{begin}')
        steps, _ = traced(parser.feed, [piece] * 4096)
        assert max(steps) < 16 * 1024, f"a step makes {max(steps)} bytes"


def ends_once(parsers: Parsers) -> None:
    for text in ("a\n<minimax:tool", f"{OPEN}a <inv", f'{OPEN}a<invoke name="f'):
        parser = parsers.tool_calls.ToolCallParser(TOOLS)
        parser.feed(text)
        parser.finish()
        assert parser.finish() == [], f"{text!r} ends twice"


def thinks_once(parsers: Parsers) -> None:
    parser = parsers.reasoning.ReasoningParser()
    parser.feed(" \n")
    assert parser.finish() == (" \n", "")
    assert parser.finish() == ("", ""), "white space comes out twice"


def streams(parsers: Parsers) -> None:
    parser = parsers.tool_calls.ToolCallParser(TOOLS)
    parser.feed(f'{OPEN}<invoke name="f"><parameter name="s">')
    events = [event for each in "abc" for event in parser.feed(each)]
    assert [event.json for event in events] == ["a", "b", "c"], "a string does not stream"


def keeps_order(parsers: Parsers) -> None:
    names = [f"p{n}" for n in range(50)]
    (call,) = parse(wire(("f", dict.fromkeys(names, "x"))), TOOLS, parsers.tool_calls).calls
    assert list(json.loads(call.arguments)) == names, "keys are in another order"


def reads_once(parsers: Parsers) -> None:
    count = 0

    class Counted(dict):
        def __contains__(self, key):
            nonlocal count
            count += 1
            assert count < 10_000, "a schema is read again and again"
            return super().__contains__(key)

    both = {str(n): Counted(anyOf=[{"$ref": f"#/$defs/{n + 1}"}] * 2) for n in range(30)}
    tool = {"$defs": both, "properties": {"s": {"$ref": "#/$defs/0"}}}
    parse(wire(("f", {"s": "x"})), {"f": tool}, parsers.tool_calls)


def limits_nesting(parsers: Parsers) -> None:
    """What is nested as deep as the limit is JSON, and what is nested deeper is not."""
    within, beyond = ("[" * depth + "]" * depth for depth in (200, 201))
    for text, expected in ((within, within), (beyond, f'"{beyond}"')):
        (call,) = parse(wire(("f", {"l": text})), LISTS, parsers.tool_calls).calls
        assert call.arguments == f'{{"l": {expected}}}', "nesting is not limited"


def keeps_long_numbers(parsers: Parsers) -> None:
    given = '{"a": 1' + "0" * 5000 + "}"
    (call,) = parse(wire(("f", {"o": given})), TOOLS, parsers.tool_calls).calls
    assert call.arguments == f'{{"o": {given}}}', "a long number is a string"


LISTS = {"f": schema(l={"type": "array"})}
CALL = wire(("f", {}))
TEXT = reply_becomes(f"a < b\n\n{CALL}\nc <minimax:x", "a < b\n\nc <minimax:x", "{}")
TWO_BLOCKS = reply_becomes(f"a{CALL}b{CALL}c", "abc", "{}", "{}")
CLOSING = value_becomes("s", "a</parameter>b", '"a</parameter>b"')
ENDS = reply_becomes("a\n<minimax:tool", "a\n<minimax:tool")
CUT_TEXT = reply_becomes(f"{CALL.removesuffix(CLOSE)}a <inv", "\na <inv", "{}")
CUT = reply_becomes(f'{OPEN}<invoke name="f"><parameter name="n">12', "", "", complete=False)
JUMP = thoughts_become(f"a\n{OPEN}b</think>c", "a", f"\n{OPEN}b</think>c")
THINK = thoughts_become("<think>\na <tool_call>\n</think>\n\nb", "a <tool_call>", "b")
THOUGHT_ENDS = thoughts_become("a\n</thin", "a\n</thin", "")


@dataclass(frozen=True)
class Mistake:
    """`right` in a module replaced by `wrong`, and the check that fails then."""

    name: str
    file: str
    right: str
    wrong: str
    check: Callable[[Parsers], None]
