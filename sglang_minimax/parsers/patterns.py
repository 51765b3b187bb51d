"""What a regular expression of a JSON schema asks for, as far as a grammar can say it.

A pattern is searched for, so `^/` is the beginning of a string and not all of it; a grammar takes
an expression for the whole. No SGLang, no xgrammar.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

# One after the other: what is escaped, a class of characters, or a character.
_PIECE = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|.", re.DOTALL)
# Classes, numbers of characters and references, of which it is not known what they match.
_WIDE_ESCAPES = "DSWPpux0123456789"
_SPACE = " \t\r\n\f\v"
# What xgrammar does not know: places between characters, names of groups and of classes.
_UNKNOWN = re.compile(r"\(\?(?!:)|[*+?}]\+")
_EXCLUDES_BEYOND_ASCII = re.compile(r"\[\^.*(?:[^\x00-\x7f]|\\[upPx])", re.DOTALL)
_UNKNOWN_ESCAPES = "bBkpPAZzGcQE"


class Anchored(NamedTuple):
    """A pattern from the beginning of a string on, without its anchors.

    is_whole: it ends where the string ends; else anything may follow.
    """

    pattern: str
    is_whole: bool


def anchored(pattern: Any) -> Anchored | None:
    """None where the pattern is none, may begin anywhere, or is beyond what grammars know."""
    if not isinstance(pattern, str):
        return None
    pieces = _PIECE.findall(pattern)
    if pieces[:1] != ["^"] or not _is_known(pieces):
        return None
    is_whole = pieces[-1] == "$"
    inner = pieces[1:-1] if is_whole else pieces[1:]
    if {"^", "$"} & set(inner) or _has_alternatives(inner):
        return None
    return Anchored("".join(inner), is_whole)


def may_match(pattern: str, character: str) -> bool:
    """Whether a string that matches may hold the character because the pattern says so."""
    return any(_piece_may_match(piece, character) for piece in _PIECE.findall(pattern))


def _is_known(pieces: list[str]) -> bool:
    if _UNKNOWN.search("".join(pieces)):
        return False
    return not any(
        (piece[0] == "\\" and piece[1:] in _UNKNOWN_ESCAPES) or _EXCLUDES_BEYOND_ASCII.match(piece)
        for piece in pieces
    )


def _has_alternatives(pieces: list[str]) -> bool:
    """Outside of all groups, where an anchor would belong to one of them."""
    depth = 0
    for piece in pieces:
        depth += {"(": 1, ")": -1}.get(piece, 0)
        if piece == "|" and depth == 0:
            return True
    return False


def _piece_may_match(piece: str, character: str) -> bool:
    if piece.startswith("\\"):
        return piece[1:] in _WIDE_ESCAPES or _escape_matches(piece[1:], character)
    if len(piece) == 1:
        return piece in (".", character)
    try:
        return bool(re.match(piece, character))
    except re.error:
        return True


def _escape_matches(escape: str, character: str) -> bool:
    if escape == "s":
        return character in _SPACE
    return {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v"}.get(escape, escape) == character
