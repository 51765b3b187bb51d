"""One reply with a long argument, and one run of a tool-call parser over it.

The reply writes a file and then runs a command, as a coding agent's does: the long argument belongs
to a call that is not the last one, whose JSON SGLang mends after the fact. The opening tag arrives
in one piece, as the tokenizer sends it (in-tree loses a call whose tag is cut), all else in pieces
of a fixed length.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.function_call import minimax_m2
from sglang.srt.function_call.core_types import ToolCallItem
from sglang.srt.function_call.function_call_parser import FunctionCallParser

from sglang_minimax.parsers import tool_detector
from sglang_minimax.parsers.markup import BLOCK_CLOSE, BLOCK_OPEN

IN_TREE, OURS = "in-tree", "ours"
PARSERS: dict[str, type] = {
    IN_TREE: minimax_m2.MinimaxM2Detector,
    OURS: tool_detector.MinimaxM2Detector,
}
RIGHT = "right"

# More closing braces than opening ones, `<`, both quotes, backslashes, line breaks.
_CODE = r"""
export function upToBrace(text, depth) {
  // "}" ends a block, '<' opens a tag
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "}" && depth < 2) return `<b class="x">${text.slice(0, i)}</b>\n`;
    if (text[i] === '\\') i += 1;
  }
  return null;
}
"""
_PROSE = "The quick brown fox jumps over the lazy dog, again and again; nobody knows why. "
CONTENTS = {"code": _CODE.lstrip() + "\n", "prose": _PROSE}

_FILE, _COMMAND = "write_file", "run"
_BEFORE_VALUE = len('{"content": "')


def content(name: str, characters: int) -> str:
    """So many characters of ASCII text. Code ends with a line break, as files do."""
    text = CONTENTS[name] * (characters // len(CONTENTS[name]) + 1)
    return text[: characters - 1] + ("\n" if name == "code" else ".")


@dataclass(frozen=True)
class Reply:
    """What the model writes to have `value` put into a file."""

    value: str

    def text(self) -> str:
        """The wire format, as the chat template renders it."""
        file, command = (
            f'<invoke name="{name}">\n<parameter name="{key}">{value}</parameter>\n</invoke>\n'
            for name, key, value in (
                (_FILE, "content", self.value),
                (_COMMAND, "command", "make test"),
            )
        )
        return f"{BLOCK_OPEN}\n{file}{command}{BLOCK_CLOSE}"

    def pieces(self, length: int) -> Iterator[str]:
        """The opening tag, then pieces of that length."""
        text = self.text()
        yield BLOCK_OPEN
        for start in range(len(BLOCK_OPEN), len(text), length):
            yield text[start : start + length]

    def arrived(self, characters: int) -> int:
        """How much of the value is among so many characters of the reply."""
        start = self.text().index(self.value)
        return min(max(characters - start, 0), len(self.value))

    def verdict(self, calls: list[tuple[str, str]]) -> str:
        """RIGHT if the calls (name, arguments) are those that were written, else what is wrong."""
        expected = [(_FILE, {"content": self.value}), (_COMMAND, {"command": "make test"})]
        if [name for name, _ in calls] != [name for name, _ in expected]:
            return "other calls"
        try:
            found = [json.loads(arguments) for _, arguments in calls]
        except ValueError:
            return "not JSON"
        return RIGHT if found == [each for _, each in expected] else "another value"


@dataclass(frozen=True)
class Run:
    """CPU seconds of one run, and what came out.

    seconds: of the whole reply. longest: of the longest increment.
    first_after: characters of the value that had arrived when its first text came out; None if
    none did. first_seconds: until then. stopped_at: characters of the value that had arrived when
    the budget was spent; None if it was not.
    """

    seconds: float
    longest: float
    first_after: int | None
    first_seconds: float | None
    verdict: str
    stopped_at: int | None = None


def tools() -> list[Tool]:
    """The two functions, each with one string parameter."""
    return [
        Tool.model_validate(
            {
                "type": "function",
                "function": {
                    "name": name,
                    "parameters": {
                        "type": "object",
                        "properties": {key: {"type": "string"}},
                        "required": [key],
                    },
                },
            }
        )
        for name, key in ((_FILE, "content"), (_COMMAND, "command"))
    ]


def parser(name: str) -> FunctionCallParser:
    """SGLang's parser of one reply with in-tree's detector or ours, whatever is registered."""
    with mock.patch.dict(FunctionCallParser.ToolCallParserEnum, {"minimax-m2": PARSERS[name]}):
        return FunctionCallParser(tools(), "minimax-m2")


def stream(name: str, reply: Reply, length: int, budget: float) -> Run:
    """Feed the reply in pieces until it ends or the budget (CPU seconds) is spent.

    The clock is read once a piece, which is in the figures, as is gathering what comes out.
    """
    found, gathered, longest, fed = parser(name), Gathered(), 0.0, 0
    first: tuple[int, float] | None = None
    began = before = time.process_time()
    for piece in reply.pieces(length):
        fed += len(piece)
        gathered.take(found.parse_stream_chunk(piece)[1])
        now = time.process_time()
        longest, before = max(longest, now - before), now
        if first is None and gathered.characters > _BEFORE_VALUE:
            first = (fed, now - began)
            before = time.process_time()
        if now - began > budget:
            break
    ended = now - began <= budget
    if ended:
        gathered.take(found.parse_stream_end()[1])
        now = time.process_time()
    return Run(
        seconds=now - began,
        longest=max(longest, now - before),
        first_after=None if first is None else reply.arrived(first[0]),
        first_seconds=None if first is None else first[1],
        verdict=reply.verdict(gathered.calls()) if ended else "",
        stopped_at=None if ended else reply.arrived(fed),
    )


def whole(name: str, reply: Reply) -> Run:
    """Parse the reply at once, as for a request that does not stream."""
    found, text = parser(name), reply.text()
    began = time.process_time()
    calls = found.parse_non_stream(text)[1]
    seconds = time.process_time() - began
    verdict = reply.verdict([(call.name or "", call.parameters) for call in calls])
    return Run(seconds, seconds, None, None, verdict)


class Gathered:
    """The calls of a streamed reply, put together as a client does."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._arguments: dict[int, list[str]] = {}
        #: Of JSON so far.
        self.characters = 0

    def take(self, items: list[ToolCallItem]) -> None:
        """More of the calls."""
        for item in items:
            if item.name:
                self._names[item.tool_index] = item.name
            self._arguments.setdefault(item.tool_index, []).append(item.parameters)
            self.characters += len(item.parameters)

    def calls(self) -> list[tuple[str, str]]:
        """Name and arguments of each, in order."""
        return [(self._names.get(n, ""), "".join(self._arguments[n])) for n in self._arguments]


def rounded(seconds: float) -> float:
    """To a tenth of a microsecond, which is finer than the clock's noise."""
    return round(seconds, 7)


def spread(values: list[float]) -> dict[str, Any]:
    """Median and range of some runs."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = (ordered[middle] + ordered[-middle - 1]) / 2
    found = {"median": median, "least": ordered[0], "most": ordered[-1]}
    return {name: rounded(value) for name, value in found.items()} | {"runs": len(ordered)}
