"""Bare strings and names as formats of xgrammar: the values and keys of a call that are not JSON.

A string never holds `</parameter>`, which ends it. Of `format`, `pattern` and limits of lengths one
is enforced, the first that can be:

* A `format` that xgrammar has a rule for, or that has one here.
* A `pattern` that begins with `^`, as far as it cannot match `<`; where it does not end with `$`,
  any text may follow. One that may begin anywhere, or looks around, is not enforced.
* Limits of lengths up to 64. Where they are counted, a `<` is taken with what follows it, up to
  three characters, and so much shorter a text fits; a longer beginning of `</parameter>` does not.

xgrammar's classes, no SGLang.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xgrammar.structural_tag import (
    AnyTextFormat,
    ConstStringFormat,
    Format,
    JSONSchemaFormat,
    OrFormat,
    RegexFormat,
    SequenceFormat,
)

from sglang_minimax.parsers.markup import PARAMETER_CLOSE
from sglang_minimax.parsers.patterns import anchored, may_match
from sglang_minimax.parsers.schema_parts import Schema

#: Any string.
TEXT = AnyTextFormat(excludes=[PARAMETER_CLOSE])

# Greater limits of lengths are not enforced: a token costs time in proportion (8 ms at 1000).
_LONGEST_COUNTED = 64

# The parser takes white space off the ends of a name.
_EDGE = r'[^\s"\x1c-\x1f]'
_REST_OF_NAME = rf'(?:[^"\n]{{0,62}}{_EDGE})?'
#: A name between quotes of up to 64 characters, none of them a quote.
ANY_NAME = RegexFormat(pattern=_EDGE + _REST_OF_NAME)

# The formats for which xgrammar has a rule, and a rule that has no `<`.
_FORMATS = (
    *("date", "time", "date-time", "duration", "uuid"),
    *("uri", "uri-reference", "uri-template", "hostname", "ipv4", "ipv6"),
)
# For these it has one with `<`, and so with closing tags; its addresses may have quotes.
_WORD, _LABEL = r"[a-zA-Z0-9!#$%&'*+/=?^_`{|}~\-]+", r"[a-zA-Z0-9]([a-zA-Z0-9\-]*[a-zA-Z0-9])?"
_POINTER = "(/([^<~/]|~[01])*)*"
_PATTERN_OF_FORMAT = {
    "email": rf"{_WORD}(\.{_WORD})*@{_LABEL}(\.{_LABEL})*",
    "json-pointer": _POINTER,
    "relative-json-pointer": f"(0|[1-9][0-9]*)(#|{_POINTER})",
}


def string(schema: Schema) -> Format:
    """A bare string as its schema, without `enum` and the like, allows it."""
    kind = str(schema.get("format"))
    if kind in _FORMATS:
        return JSONSchemaFormat(json_schema={"type": "string", "format": kind}, style="minimax_xml")
    if kind in _PATTERN_OF_FORMAT:
        return RegexFormat(pattern=_PATTERN_OF_FORMAT[kind])
    found = anchored(schema.get("pattern"))
    if found is not None and not may_match(found.pattern, "<"):
        return _matching(found.pattern, [] if found.is_whole else [TEXT])
    least, most = (_count(schema, key) for key in ("minLength", "maxLength"))
    return _counted(least or 0, most)


def name_like(pattern: Any) -> Format:
    """A name that matches a key of `patternProperties`; any where the pattern is not enforced."""
    found = anchored(pattern)
    if found is None or any(may_match(found.pattern, each) for each in '"\n'):
        return ANY_NAME
    return RegexFormat(pattern=found.pattern + ("" if found.is_whole else _REST_OF_NAME))


def sequence(parts: Sequence[Format]) -> Format:
    """One after the other."""
    return parts[0] if len(parts) == 1 else SequenceFormat(elements=list(parts))


def either(choices: Sequence[Format]) -> Format:
    """One of them; xgrammar refuses none at all."""
    return choices[0] if len(choices) == 1 else OrFormat(elements=list(choices))


def any_of(choices: list[Format]) -> Format:
    """One of some values. Any text includes what the others are."""
    return TEXT if TEXT in choices else either(choices)


def const(text: str) -> Format:
    """This text."""
    return ConstStringFormat(value=text)


def _matching(pattern: str, rest: list[Format]) -> Format:
    return sequence([RegexFormat(pattern=pattern) if pattern else const(""), *rest])


def _counted(least: int, most: int | None) -> Format:
    """Text of so many characters, which does not begin a closing tag where they are counted.

    Not by AnyTextFormat's `max_chars`: its mask allows bytes that it then does not accept, which
    ends the request.
    """
    if most is None:
        return _matching(f"{_PIECE}{{{least}}}", [TEXT]) if least else TEXT
    most = max(least, most)
    fitting = [(piece, most // length) for length, piece in _PIECES if least <= most // length]
    return either([RegexFormat(pattern=f"{piece}{{{least},{fit}}}") for piece, fit in fitting])


# Pieces of a text that neither begin `</parameter>` nor end within its beginning.
_PIECE = "(?:[^<]|<+(?:[^/<]|/[^p<]|/p[^a<]))"
# The same by their greatest length.
_PIECES = (
    (1, "[^<]"),
    (2, "(?:[^<]|<[^/<])"),
    (4, "(?:[^<]|<[^/<]|</[^p<]|</p[^a<])"),
)


def _count(schema: Schema, keyword: str) -> int | None:
    value = schema.get(keyword)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 <= value <= _LONGEST_COUNTED else None
