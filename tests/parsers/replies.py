"""Runs the parsers over a reply cut in pieces, and checks what must hold after each of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang_minimax.parsers import reasoning, tool_calls
from tests.parsers.json_prefix import JsonPrefix

OPEN, CLOSE = "<minimax:tool_call>", "</minimax:tool_call>"


@dataclass
class Call:
    """One call as it came out. complete: whether its closing tag was there, None while open."""

    name: str
    arguments: str = ""
    complete: bool | None = None


@dataclass
class Reply:
    """What came out of one reply."""

    text: str = ""
    calls: list[Call] = field(default_factory=list)

    def values(self) -> list[tuple[str, Any]]:
        """Name and arguments of each call; they must all be complete."""
        assert all(call.complete for call in self.calls), self.calls
        return [(call.name, json.loads(call.arguments)) for call in self.calls]


class Checked:
    """A tool-call parser whose every event is checked: order, numbers, and beginnings of JSON.

    module: `tool_calls`, or a copy of it with a mistake.
    """

    def __init__(self, tools: Mapping[str, Any] | None = None, module: Any = tool_calls) -> None:
        self.reply = Reply()
        self._parser = module.ToolCallParser(tools or {})
        self._json: JsonPrefix | None = None

    def feed(self, text: str) -> None:
        """More of the reply."""
        self._take(self._parser.feed(text))

    def finish(self) -> Reply:
        """The reply has ended."""
        self._take(self._parser.finish())
        assert self._json is None, "a call was begun and not ended"
        return self.reply

    def _take(self, events: Iterable[Any]) -> None:
        for event in events:
            # By name: a copy of the module has its own classes.
            getattr(self, "_" + type(event).__name__)(event)

    def _Text(self, event: Any) -> None:
        assert event.text, "an event without text"
        self.reply.text += event.text

    def _CallBegins(self, event: Any) -> None:
        assert self._json is None, "a call begins inside of another"
        assert event.index == len(self.reply.calls), "calls are not numbered as they come"
        self.reply.calls.append(Call(event.name))
        self._json = JsonPrefix()

    def _Arguments(self, event: Any) -> None:
        assert event.index == len(self.reply.calls) - 1, "arguments of another call"
        assert self._json is not None, "arguments of no call"
        assert event.json, "an event without arguments"
        self._json.feed(event.json)
        event.json.encode()  # no lone surrogate
        self.reply.calls[-1].arguments += event.json

    def _CallEnds(self, event: Any) -> None:
        assert event.index == len(self.reply.calls) - 1, "another call ends"
        assert self._json is not None, "no call ends"
        if event.complete:
            assert self._json.is_whole, f"not JSON: {self.reply.calls[-1].arguments!r}"
        self.reply.calls[-1].complete = event.complete
        self._json = None


def pieces(text: str, cuts: Iterable[int]) -> list[str]:
    """The text cut at these places."""
    places = [0, *sorted({each for each in cuts if 0 < each < len(text)}), len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(places)]


def every(text: str, size: int) -> list[str]:
    """The text cut in pieces of `size` characters."""
    return pieces(text, range(size, len(text), size))


def parse(
    text: str | Sequence[str], tools: Mapping[str, Any] | None = None, module: Any = tool_calls
) -> Reply:
    """The tool calls of a reply, given whole or in pieces."""
    checked = Checked(tools, module)
    for piece in [text] if isinstance(text, str) else text:
        checked.feed(piece)
    return checked.finish()


def think(
    text: str | Sequence[str], *, inside: bool = True, module: Any = reasoning
) -> tuple[str, str]:
    """The reasoning and the content of a reply."""
    parser = module.ReasoningParser(inside=inside)
    thoughts, content = "", ""
    for piece in [text] if isinstance(text, str) else text:
        parts = parser.feed(piece)
        assert not (parts.reasoning and content), "reasoning after content"
        thoughts, content = thoughts + parts.reasoning, content + parts.content
    parts = parser.finish()
    return thoughts + parts.reasoning, content + parts.content


def both(text: str | Sequence[str], tools: Mapping[str, Any] | None = None) -> tuple[str, Reply]:
    """Reasoning, then what the tool-call parser finds in the content, as SGLang runs the two."""
    first, second = reasoning.ReasoningParser(), Checked(tools)
    thoughts = ""
    for piece in [text] if isinstance(text, str) else text:
        parts = first.feed(piece)
        thoughts += parts.reasoning
        second.feed(parts.content)
    parts = first.finish()
    second.feed(parts.content)
    return thoughts + parts.reasoning, second.finish()


def same_however_cut(
    text: str, tools: Mapping[str, Any] | None = None, module: Any = tool_calls
) -> Reply:
    """The result, after a comparison of the whole with some regular cuts."""
    whole = parse(text, tools, module)
    for size in (1, 2, 3, 7):
        found = parse(every(text, size), tools, module)
        assert found == whole, f"in pieces of {size}: {found} and not {whole}"
    return whole


# --- schemas ---


def schema(**properties: Any) -> dict[str, Any]:
    """The JSON schema of a tool's parameters."""
    return {"type": "object", "properties": properties}


def wire(*calls: tuple[str, Mapping[str, str]]) -> str:
    """A block as the model writes it; the values are written as they are."""
    lines = [OPEN]
    for name, arguments in calls:
        lines.append(f'<invoke name="{name}">')
        lines += [f'<parameter name="{key}">{text}</parameter>' for key, text in arguments.items()]
        lines.append("</invoke>")
    return "\n".join([*lines, CLOSE])
