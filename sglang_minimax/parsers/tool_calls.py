"""Tool calls in a reply's text, found in one pass while it arrives.

    text <minimax:tool_call>
    <invoke name="F"><parameter name="P">value</parameter> ...</invoke> ...
    </minimax:tool_call> text

What comes out does not depend on how the text is cut. Each character is looked at a bounded number
of times, and what is held back is a beginning of a tag, white space, or a value that has a type
other than string. `docs/parsers.md` has the rules for replies that are not well-formed. No SGLang.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_minimax.parsers import schema
from sglang_minimax.parsers.markup import (
    BLOCK_CLOSE,
    BLOCK_OPEN,
    INVOKE_CLOSE,
    INVOKE_OPEN,
    PARAMETER_CLOSE,
    PARAMETER_OPEN,
    partial,
)
from sglang_minimax.parsers.values import Value, escaped

# A name that does not end within so many characters is not one; the tag is text then.
LONGEST_NAME = 256
_LINE = "\n"
_WHITE = re.compile(r"\s*")
# Behind `name=`. What ends a name is its quote with a `>` behind it, so it may hold both.
_NAME = re.compile(r"""[^\S\n]*(?:"([^\n]*?)"|'([^\n]*?)'|([^\s<>"']+))[^\S\n]*>""")
_BEGINNING_OF_NAME = re.compile(r"""[^\S\n]*(?:["'][^\n]*|[^\s<>"']*[^\S\n]*)""")


@dataclass(frozen=True, slots=True)
class Text:
    """Text that is not part of a call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """The call number `index` of the reply, counted from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of a call's arguments: with all before it, a beginning of valid JSON."""

    index: int
    json: str


@dataclass(frozen=True, slots=True)
class CallEnds:
    """complete: whether its closing tag was there; its arguments are valid JSON then."""

    index: int
    complete: bool


Event = Text | CallBegins | Arguments | CallEnds


class ToolCallParser:
    """The calls and the text of one reply."""

    def __init__(self, tools: Mapping[str, Any]) -> None:
        """tools: the JSON schema of its parameters for each function that the request declares."""
        self._tools = tools
        self._rest = ""
        self._at = 0
        self._events: list[Event] = []
        self._step: Callable[[], bool] = self._outside
        self._stray = _Stray()
        self._call: _Call | None = None
        self._calls = 0

    def feed(self, text: str) -> list[Event]:
        """More of the reply. Returns what follows from it."""
        self._rest = self._rest[self._at :] + text
        self._at = 0
        while self._step():
            pass
        return self._taken()

    def finish(self) -> list[Event]:
        """The reply has ended. Returns what was held back, and the end of a call that was cut off.

        A beginning of a tag is text outside of blocks, and behind other text inside of one. Else
        it is part of no call, and left out.
        """
        is_text = self._step == self._outside or self._stray.seen
        if self._call is not None and self._step == self._after_value:
            self._argument(self._call.end_value())
        elif is_text and self._step != self._in_value:
            tags = {self._invoke_name: INVOKE_OPEN, self._parameter_name: PARAMETER_OPEN}
            self._text(tags.get(self._step, "") + self._rest[self._at :])
        if self._call is not None:
            self._end_call(complete=False)
        self._rest, self._at, self._step = "", 0, self._outside
        return self._taken()

    # --- states: each takes text in and returns whether another step can be made ---

    def _outside(self) -> bool:
        found = self._rest.find(BLOCK_OPEN, self._at)
        if found < 0:
            self._text(
                self._all_but(partial(self._rest, _LINE + BLOCK_OPEN, BLOCK_OPEN, start=self._at))
            )
            return False
        before = self._upto(found)
        # The chat template puts a line break before a block.
        text = before.removesuffix(_LINE)
        self._text(text)
        self._at += len(BLOCK_OPEN)
        self._stray = _Stray(before[len(text) :] + BLOCK_OPEN)
        self._step = self._between_calls
        return True

    def _between_calls(self) -> bool:
        tag = self._next_tag(INVOKE_OPEN, BLOCK_OPEN, BLOCK_CLOSE)
        if tag == INVOKE_OPEN:
            self._step = self._invoke_name
        elif tag == BLOCK_OPEN:
            # What the one before opened was text, or a block without calls, or was not closed.
            self._stray = _Stray(BLOCK_OPEN)
        elif tag == BLOCK_CLOSE:
            if self._stray.is_literal:
                self._text(BLOCK_CLOSE)
            self._step = self._outside
        return tag is not None

    def _invoke_name(self) -> bool:
        return self._name(INVOKE_OPEN, self._begin_call, otherwise=self._between_calls)

    def _begin_call(self, name: str) -> None:
        self._stray = _Stray()
        self._call = _Call(schema.of_tool(self._tools.get(name)))
        self._events.append(CallBegins(self._calls, name))
        self._step = self._between_parameters

    def _between_parameters(self) -> bool:
        tag = self._next_tag(*AFTER_VALUE)
        if tag == PARAMETER_OPEN:
            self._step = self._parameter_name
        elif tag is not None:
            # A next call, or the end of the block, ends a call whose own end was forgotten.
            self._end_call(complete=True)
            self._step = {
                INVOKE_CLOSE: self._between_calls,
                INVOKE_OPEN: self._invoke_name,
                BLOCK_CLOSE: self._outside,
            }[tag]
        return tag is not None

    def _parameter_name(self) -> bool:
        return self._name(PARAMETER_OPEN, self._begin_value, otherwise=self._between_parameters)

    def _begin_value(self, name: str) -> None:
        assert self._call is not None
        self._argument(self._call.begin_value(name))
        self._step = self._in_value

    def _in_value(self) -> bool:
        found = self._rest.find(PARAMETER_CLOSE, self._at)
        if found < 0:
            self._value(self._all_but(partial(self._rest, PARAMETER_CLOSE, start=self._at)))
            return False
        self._value(self._upto(found))
        self._at += len(PARAMETER_CLOSE)
        self._stray = _Stray()
        self._step = self._after_value
        return True

    def _after_value(self) -> bool:
        """A closing tag is one where the call goes on behind it; else it belongs to the value."""
        self._at = self._stray.take_white(self._rest, self._at)
        if self._at == len(self._rest):
            return False
        if any(self._rest.startswith(tag, self._at) for tag in AFTER_VALUE):
            assert self._call is not None
            self._argument(self._call.end_value())
            self._step = self._between_parameters
        elif self._may_become(AFTER_VALUE):
            return False
        else:
            self._value(PARAMETER_CLOSE + self._stray.white())
            self._step = self._in_value
        return True

    # --- what states share ---

    def _next_tag(self, *tags: str) -> str | None:
        """Go behind the next of `tags`, which is returned, or as far as the text is certain."""
        while True:
            found = self._rest.find("<", self._at)
            self._text(self._stray.take(self._upto(found if found >= 0 else len(self._rest))))
            if found < 0:
                return None
            for tag in tags:
                if self._rest.startswith(tag, self._at):
                    self._at += len(tag)
                    return tag
            if self._may_become(tags):
                return None
            self._text(self._stray.take(self._upto(found + 1)))

    def _name(self, tag: str, begin: Callable[[str], None], otherwise: Callable[[], bool]) -> bool:
        """The name that an opening tag gives; where there is none, the tag was text."""
        window = self._rest[self._at : self._at + LONGEST_NAME]
        found = _NAME.match(window)
        if found is None and len(window) < LONGEST_NAME and _BEGINNING_OF_NAME.fullmatch(window):
            return False
        name = (found[found.lastindex or 0] if found else "").strip()
        if found and name:
            self._at += found.end()
            begin(name)
        else:
            self._text(self._stray.take(tag))
            self._step = otherwise
        return True

    def _may_become(self, tags: tuple[str, ...]) -> bool:
        """Whether all that is left begins one of `tags`."""
        left = len(self._rest) - self._at
        return any(left < len(tag) and tag.startswith(self._rest[self._at :]) for tag in tags)

    def _upto(self, end: int) -> str:
        text, self._at = self._rest[self._at : end], end
        return text

    def _all_but(self, held: int) -> str:
        return self._upto(len(self._rest) - held)

    def _text(self, text: str) -> None:
        if text:
            self._events.append(Text(text))

    def _value(self, text: str) -> None:
        assert self._call is not None
        if text:
            self._argument(self._call.feed_value(text))

    def _argument(self, json: str) -> None:
        if json:
            self._events.append(Arguments(self._calls, json))

    def _end_call(self, *, complete: bool) -> None:
        assert self._call is not None
        if complete:
            self._argument(self._call.end())
        self._events.append(CallEnds(self._calls, complete))
        self._calls += 1
        self._call = None
        self._stray = _Stray()

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events


#: What may follow a value; anywhere else a closing tag belongs to it.
AFTER_VALUE = (PARAMETER_OPEN, INVOKE_CLOSE, INVOKE_OPEN, BLOCK_CLOSE)


class _Stray:
    """Text inside a block that belongs to no call: white space is layout, all else is text.

    A block that begins with other text was none: its opening tag is text as well, and so is its
    closing tag if no call comes in between.
    """

    def __init__(self, opening: str = "") -> None:
        """opening: the block's opening tag, where nothing has followed it yet."""
        self._opening = opening
        self._white: list[str] = []
        self.seen = False
        self.is_literal = False

    def take(self, text: str) -> str:
        """More text. Returns what of it, and of what was held back, is text of the reply."""
        if not self.seen and (not text or text.isspace()):
            self._white.append(text)
            return ""
        if self.seen:
            return text
        self.seen = True
        self.is_literal = self.is_literal or bool(self._opening)
        opening, self._opening = self._opening, ""
        return opening + self.white() + text

    def take_white(self, text: str, start: int) -> int:
        """Hold back the white space at text[start:]; returns where it ends."""
        match = _WHITE.match(text, start)
        assert match is not None
        self._white.append(match.group())
        return match.end()

    def white(self) -> str:
        """The white space that was held back, which is not held back any longer."""
        white, self._white = "".join(self._white), []
        return white


class _Call:
    """The arguments of one call as JSON."""

    def __init__(self, parameters: schema.Parameters) -> None:
        self._parameters = parameters
        self._names: set[str] = set()
        self._before = ""  # what comes before the next of the value's JSON
        self._value: Value | None = None

    def begin_value(self, name: str) -> str:
        """A parameter begins; a second one of the same name is left out."""
        if name in self._names:
            self._value = None
            return ""
        self._before = ("{" if not self._names else ", ") + _quoted(name) + ": "
        self._names.add(name)
        self._value = Value(self._parameters.allowed(name))
        return self._after_key(self._value.feed(""))

    def feed_value(self, text: str) -> str:
        return "" if self._value is None else self._after_key(self._value.feed(text))

    def end_value(self) -> str:
        return "" if self._value is None else self._after_key(self._value.end())

    def end(self) -> str:
        return "}" if self._names else "{}"

    def _after_key(self, json: str) -> str:
        if not json:
            return ""
        key, self._before = self._before, ""
        return key + json


def _quoted(text: str) -> str:
    return f'"{escaped(text)}"'
