"""The text of one parameter as JSON, while it arrives.

A string goes out as it comes in. Of any other type nothing goes out until the value is whole: half
a number is another number. Where a string is one type among others, it goes out from the moment
when its beginning can be none of the others: a number, a word, or a bracket and what follows it.

Rules, in this order, for the whole text:

1. Only a string is allowed: it is that string, whatever it spells.
2. It is one of the strings of an enum: that string.
3. Without the white space around it, it is JSON of an allowed type: that JSON, as it was written.
   `2.0` fits an integer, as `2`. Where no string is allowed, Python's `True`, `False` and `None`
   are taken as well; they can mean nothing else.
   It is none where objects and arrays are nested deeper than `MOST_NESTED`.
4. Otherwise it is a string, also where the schema allows none: nothing is dropped or guessed.

The chat template writes strings bare and everything else as JSON, which these rules turn around.
No SGLang here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from sglang_minimax.parsers.schema import (
    ARRAY,
    BOOLEAN,
    INTEGER,
    NULL,
    NUMBER,
    OBJECT,
    STRING,
    Allowed,
)

# Of objects and arrays in one another. What json.loads takes depends on the caller's stack, and
# what a value becomes must not.
MOST_NESTED = 200

_WHITE = " \t\r\n"
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_INTEGER = re.compile(r"(-?(?:0|[1-9][0-9]*))(?:\.0+)?")
_NUMERAL = frozenset("0123456789+-.eE" + _WHITE)
_WORDS = {"true": BOOLEAN, "false": BOOLEAN, "null": NULL}
_PYTHON = {"True": "true", "False": "false", "None": "null"}

# So much of a text is looked at before it is held back to its end.
_LOOKED_AT = 64
_BEGINNING_OF_NUMBER = r"-?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:(?<![.])[eE][+-]?[0-9]*)?)?"
_NUMBER_SO_FAR = re.compile(rf"{_BEGINNING_OF_NUMBER}[{_WHITE}]*")
_WORD_SO_FAR = "|".join(word[:end] for word in _WORDS for end in range(len(word), 0, -1))
_CONTAINER_SO_FAR = re.compile(
    rf"{{[{_WHITE}]*(?:[\"}}].*)?"
    rf"|\[[{_WHITE}]*(?:[\"{{\[\]].*|(?:{_WORD_SO_FAR}|{_BEGINNING_OF_NUMBER})[{_WHITE}]*(?:[,\]].*)?)?",
    re.DOTALL,
)

# What JSON does not allow inside a string, and lone surrogates, which UTF-8 does not know.
_UNSAFE = re.compile(r'[\x00-\x1f"\\\ud800-\udfff]')
_UNSAFE_IN_JSON = re.compile(r"[\x00-\x1f\ud800-\udfff]")
# A string of JSON, or the beginning of one: there is always a match, so no text is read twice.
_STRING = re.compile(r'"(?:[^"\\]|\\[^\x00-\x1f\ud800-\udfff])*+"?')
_BRACKET = re.compile(r"[\[\]{}]")
_SHORT = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}


def escaped(text: str) -> str:
    """The inside of a JSON string: a function of each character alone, so cuts do not matter."""
    return _UNSAFE.sub(lambda match: _escape(match.group()), text)


def _escape(character: str) -> str:
    return _SHORT.get(character) or f"\\u{ord(character):04x}"


def as_json(text: str, allowed: Allowed) -> str | None:
    """The whole text as JSON of an allowed type other than a string; None where it is none."""
    if text in allowed.strings:
        return None
    bare = text.strip(_WHITE)
    types = allowed.types
    if STRING not in types:
        bare = _PYTHON.get(bare, bare)
    if bare in _WORDS:
        return bare if _WORDS[bare] in types else None
    if bare[:1] in ("{", "["):
        kind = OBJECT if bare[0] == "{" else ARRAY
        return _container(bare) if kind in types else None
    if NUMBER in types and _NUMBER.fullmatch(bare):
        return bare
    if INTEGER in types and (whole := _INTEGER.fullmatch(bare)):
        return whole.group(1)
    return None


def _container(text: str) -> str | None:
    """An object or array as it was written, but for line breaks in its strings, which are mended.

    None if it is not JSON then.
    """
    mended = _STRING.sub(_mended, text) if _UNSAFE_IN_JSON.search(text) else text
    if _is_nested_too_deep(mended):
        return None
    try:
        # Numbers are not converted: they may have any number of digits.
        json.loads(mended, parse_int=str, parse_float=str, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return mended


def _is_nested_too_deep(text: str) -> bool:
    """Exact for JSON; what is none may be counted wrong, and is refused either way."""
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub("", text)):
        depth += 1 if bracket.group() in "[{" else -1
        if depth > MOST_NESTED:
            return True
    return False


def _mended(string: re.Match[str]) -> str:
    return _UNSAFE_IN_JSON.sub(lambda match: _escape(match.group()), string.group())


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


class Value:
    """One parameter's text, fed in pieces; returns JSON as soon as it is certain."""

    def __init__(self, allowed: Allowed) -> None:
        self._allowed = allowed
        self._undecided = None if allowed.types == {STRING} else _Undecided(allowed.types)
        self._opened = False

    def feed(self, text: str) -> str:
        """More of the text. Returns what of the JSON follows from it, "" for nothing yet."""
        if self._undecided is None:
            return self._string(text)
        if self._undecided.may_be_other_than_string(text):
            return ""
        held, self._undecided = self._undecided.text(), None
        return self._string(held)

    def end(self) -> str:
        """The text is complete. Returns the rest of the JSON."""
        text = ""
        if self._undecided is not None:
            text = self._undecided.text()
            if (found := as_json(text, self._allowed)) is not None:
                return found
        return self._string(text) + '"'

    def _string(self, text: str) -> str:
        opening = "" if self._opened else '"'
        self._opened = True
        return opening + escaped(text)


class _Undecided:
    """Text that may yet be something else than a string. Looks at every character once."""

    def __init__(self, types: frozenset[str]) -> None:
        self._types = types
        self._pieces: list[str] = []
        self._bare = ""  # without leading white space, as far as it is looked at
        self._test: Callable[[str], bool] | None = None

    def text(self) -> str:
        return "".join(self._pieces)

    def may_be_other_than_string(self, new: str) -> bool:
        """Take `new` in; whether the text, as it begins, may be JSON of another allowed type."""
        self._pieces.append(new)
        if STRING not in self._types:
            return True
        if self._test is None:
            new = new.lstrip(_WHITE)
            if not new:
                return True
            self._test = self._test_for(new[0])
        return self._test(new)

    def _test_for(self, first: str) -> Callable[[str], bool]:
        if first in "{[":
            return self._container
        if first in "-0123456789":
            return self._numeral
        return self._word

    def _container(self, new: str) -> bool:
        kind = OBJECT if (self._bare or new)[0] == "{" else ARRAY
        return kind in self._types and self._begins(_CONTAINER_SO_FAR, new)

    def _numeral(self, new: str) -> bool:
        if not {INTEGER, NUMBER} & self._types or not _NUMERAL.issuperset(new):
            return False
        return self._begins(_NUMBER_SO_FAR, new)

    def _begins(self, pattern: re.Pattern[str], new: str) -> bool:
        """Whether the text, as far as it is looked at, is a beginning of what is asked for."""
        if len(self._bare) >= _LOOKED_AT:
            return True
        self._bare += new[:_LOOKED_AT]
        return pattern.fullmatch(self._bare) is not None

    def _word(self, new: str) -> bool:
        text = self._bare + new
        bare = text.rstrip(_WHITE)
        # White space ends the word, and one character of it is enough to tell.
        self._bare = text[: len(bare) + 1]
        return any(word.startswith(bare) for word, kind in _WORDS.items() if kind in self._types)
