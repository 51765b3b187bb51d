"""Which JSON types a tool's schema allows each parameter, so that its text can be read as one.

Only what decides between types is looked at: `type`, `enum`, `const`, `anyOf`, `oneOf`, `allOf`
and `$ref` within the schema. Everything else, and every schema that is not one, leaves all types
open.

A parameter is described by `properties`, `patternProperties` and, where neither has its name,
`additionalProperties`: at the root, in what it refers to, in its `allOf`, and in the branches of
its `anyOf` and `oneOf`. A branch that does not describe a parameter says nothing about it; it may
be what any of the others allow. Patterns come from a client, and some take for ever to match. So
only simple ones are read: literals, classes and one repetition, and not more than a hundred. Any
other may match every name, and leaves all types open. No SGLang here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_minimax.parsers.schema_parts import TYPES, listed, mapped, target, types_named

STRING, INTEGER, NUMBER, BOOLEAN, NULL, OBJECT, ARRAY = TYPES
ALL = frozenset(TYPES)

# A schema may refer to itself; no type is decided that deep.
DEEPEST = 32

# One repetition at most: with a name's length the time grows no faster than its square.
_LONGEST_PATTERN = 200
_MOST_PATTERNS = 100  # of one tool; to compile one takes a while
_ATOM = r"(?:[\w /:@-]|\.|\\[dw.-]|\[\^?(?:[\w .-]|\\[dw.-])+\])"
_SIMPLE = re.compile(rf"\^?{_ATOM}*+(?:[*+]{_ATOM}*+)?\$?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a parameter may be: JSON types, and the strings of an enum whatever else they spell."""

    types: frozenset[str] = ALL
    strings: frozenset[str] = frozenset()

    def __and__(self, other: Allowed) -> Allowed:
        """Both hold. Where that leaves nothing, the schema contradicts itself: anything goes."""
        types = self.types & other.types
        # Every integer is a number.
        for mine, its in ((self, other), (other, self)):
            if INTEGER in mine.types and NUMBER in its.types:
                types |= {INTEGER}
        return Allowed(types or ALL, self.strings | other.strings)

    def __or__(self, other: Allowed) -> Allowed:
        return Allowed(self.types | other.types, self.strings | other.strings)


ANYTHING = Allowed()


def of_tool(parameters: Any) -> Parameters:
    """The parameters of a tool, from its schema as the request has it (a mapping, or anything)."""
    return Parameters(parameters if isinstance(parameters, Mapping) else {})


class Parameters:
    """Answers what each parameter of one tool may be; names are looked up once."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        self._known: dict[str, Allowed] = {}
        self._patterns: dict[Any, re.Pattern[str] | None] = {}
        # By identity and depth: what a part means there, however many others refer to it.
        self._read: dict[tuple[int, int], Allowed] = {}

    def allowed(self, name: str) -> Allowed:
        """ANYTHING where the schema does not say."""
        if name not in self._known:
            said = self._about(name, self._schema, 0, {})
            self._known[name] = ANYTHING if said is None else said
        return self._known[name]

    def _about(
        self, name: str, schema: Any, depth: int, seen: dict[int, Allowed | None]
    ) -> Allowed | None:
        """What a schema of all the parameters says about one of them; None for nothing.

        seen: what was found so far, by identity, so that every part is read once.
        """
        if not isinstance(schema, Mapping) or depth > DEEPEST:
            return None
        if id(schema) not in seen:
            seen[id(schema)] = None  # to itself
            found = [self._allowed(each, 0) for each in self._describing(schema, name)]
            for choices in self._alternatives(schema):
                said = [self._about(name, each, depth + 1, seen) for each in choices]
                if describing := [each for each in said if each is not None]:
                    found.append(_either(describing))
            seen[id(schema)] = _together(found) if found else None
        return seen[id(schema)]

    def _describing(self, schema: Mapping[str, Any], name: str) -> Iterator[Any]:
        """The schemas of the parameter `name` that this schema of all the parameters has."""
        described = False
        properties = mapped(schema, "properties")
        if name in properties:
            described = True
            if properties[name] is not False:  # not a parameter at all
                yield properties[name]
        for text, value in mapped(schema, "patternProperties").items():
            pattern = self._pattern(text)
            if pattern is None or pattern.search(name):
                described = True
                yield {} if pattern is None else value
        if not described and isinstance(schema.get("additionalProperties"), Mapping):
            yield schema["additionalProperties"]

    def _pattern(self, text: Any) -> re.Pattern[str] | None:
        if text not in self._patterns:
            is_read = len(self._patterns) < _MOST_PATTERNS
            self._patterns[text] = _compiled(text) if is_read else None
        return self._patterns[text]

    def _alternatives(self, schema: Mapping[str, Any]) -> Iterator[list[Any]]:
        """Further schemas of all the parameters: of each list, one of them holds."""
        if "$ref" in schema:
            yield [target(self._schema, schema["$ref"])]
        yield from ([each] for each in listed(schema, "allOf"))
        yield from (listed(schema, keyword) for keyword in ("anyOf", "oneOf"))

    def _allowed(self, schema: Any, depth: int) -> Allowed:
        if not isinstance(schema, Mapping) or depth > DEEPEST:
            return ANYTHING
        key = id(schema), depth
        if key not in self._read:
            self._read[key] = self._of(schema, depth)
        return self._read[key]

    def _of(self, schema: Mapping[str, Any], depth: int) -> Allowed:
        found = []
        if "$ref" in schema:
            found.append(self._allowed(target(self._schema, schema["$ref"]), depth + 1))
        if types := types_named(schema):
            found.append(Allowed(frozenset(types)))
        values = [*listed(schema, "enum"), *([schema["const"]] if "const" in schema else [])]
        if values:
            found.append(_of_values(values))
        for keyword in ("anyOf", "oneOf"):
            if choices := [self._allowed(each, depth + 1) for each in listed(schema, keyword)]:
                found.append(_either(choices))
        found += [self._allowed(each, depth + 1) for each in listed(schema, "allOf")]
        return _together(found)


def _compiled(pattern: Any) -> re.Pattern[str] | None:
    """None for a pattern that is not read."""
    if not isinstance(pattern, str) or len(pattern) > _LONGEST_PATTERN:
        return None
    if not _SIMPLE.fullmatch(pattern):
        return None
    try:
        return re.compile(pattern, re.ASCII)
    except re.error:
        return None


def _together(found: list[Allowed]) -> Allowed:
    total = ANYTHING
    for each in found:
        total = total & each
    return total


def _either(found: list[Allowed]) -> Allowed:
    total = found[0]
    for each in found[1:]:
        total = total | each
    return total


def _of_values(values: list[Any]) -> Allowed:
    strings = frozenset(each for each in values if isinstance(each, str))
    return Allowed(frozenset(type_of(each) for each in values), strings)


def type_of(value: Any) -> str:
    """The JSON type of a value as Python has it."""
    if value is None:
        return NULL
    for kind, name in ((bool, BOOLEAN), (int, INTEGER), (float, NUMBER), (str, STRING)):
        if isinstance(value, kind):
            return name
    return ARRAY if isinstance(value, (list, tuple)) else OBJECT
