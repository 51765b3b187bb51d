"""Whether a text is a beginning of valid JSON, told while it arrives; shares nothing with ours."""

from __future__ import annotations

import re

_LITERALS = ("true", "false", "null")
_WHOLE_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
_PART_OF_NUMBER = re.compile(r"-?|-?(?:0|[1-9]\d*)(?:\.\d*|(?:\.\d+)?[eE][+-]?\d*)?", re.ASCII)
_WHITE = " \t\r\n"
_IN_TOKEN = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzE")


class JsonPrefix:
    """A pushdown automaton. `feed` raises AssertionError where the text cannot become JSON."""

    def __init__(self) -> None:
        self._last = ""
        self._open: list[str] = []  # "{" and "["
        self._expects = "value"  # or: key, key or }, value or ], colon, more, string, escape, hex
        self._string_is_key = False
        self._hex = 0
        self._token = ""

    def feed(self, text: str) -> None:
        """More of the text."""
        for at, character in enumerate(text):
            assert self._takes(character), f"not a beginning of JSON: {self._shown(text[: at + 1])}"
        assert not self._token or self._may_go_on(), f"no beginning of JSON: {self._shown(text)}"
        self._last = (self._last + text)[-80:]

    @property
    def is_whole(self) -> bool:
        """Whether the text so far is one JSON value."""
        return not self._open and self._expects == "more" and (not self._token or self._is_token())

    def _shown(self, text: str) -> str:
        return repr((self._last + text)[-80:])

    def _may_go_on(self) -> bool:
        literal = any(each.startswith(self._token) for each in _LITERALS)
        return literal or bool(_PART_OF_NUMBER.fullmatch(self._token))

    def _is_token(self) -> bool:
        return self._token in _LITERALS or bool(_WHOLE_NUMBER.fullmatch(self._token))

    def _takes(self, character: str) -> bool:
        if self._expects in ("string", "escape", "hex"):
            return self._in_string(character)
        if self._token:
            if character in _IN_TOKEN:
                self._token += character
                return True
            if not self._is_token():
                return False
            self._token = ""
        if character in _WHITE:
            return True
        return self._structure(character)

    def _in_string(self, character: str) -> bool:
        if self._expects == "hex":
            self._hex -= 1
            self._expects = "hex" if self._hex else "string"
            return character in "0123456789abcdefABCDEF"
        if self._expects == "escape":
            self._expects, self._hex = ("hex", 4) if character == "u" else ("string", 0)
            return character in '"\\/bfnrtu'
        if character == "\\":
            self._expects = "escape"
        elif character == '"':
            self._expects = "colon" if self._string_is_key else "more"
        return character >= " " and not "\ud800" <= character <= "\udfff"

    def _structure(self, character: str) -> bool:
        expects = self._expects
        inside = self._open[-1] if self._open else ""
        if character == "," and expects == "more" and inside:
            self._expects = "key" if inside == "{" else "value"
        elif character == ":" and expects == "colon":
            self._expects = "value"
        elif character in "}]":
            if not inside or inside + character not in ("{}", "[]"):
                return False
            if expects not in ("more", f"key or {character}", f"value or {character}"):
                return False
            self._open.pop()
            self._expects = "more"
        elif character == '"' and expects.startswith(("key", "value")):
            self._string_is_key = expects.startswith("key")
            self._expects = "string"
        elif expects.startswith("value"):
            if character in "{[":
                self._open.append(character)
                self._expects = "key or }" if character == "{" else "value or ]"
            else:
                self._token, self._expects = character, "more"
                return character in _IN_TOKEN
        else:
            return False
        return True
