"""Which JSON types a tool's schema allows each parameter, so that its text can be read as one.

Only what decides between types is looked at: `type`, `enum`, `const`, `anyOf`, `oneOf`, `allOf`
and `$ref` within the schema. Everything else, and every schema that is not one, leaves all types
open. No SGLang here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

STRING = "string"
INTEGER = "integer"
NUMBER = "number"
BOOLEAN = "boolean"
NULL = "null"
OBJECT = "object"
ARRAY = "array"
ALL = frozenset((STRING, INTEGER, NUMBER, BOOLEAN, NULL, OBJECT, ARRAY))

# A schema may refer to itself; no type is decided that deep.
DEEPEST = 32


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
        self._parts = list(self._applying(schema, 0, set()))
        self._known: dict[str, Allowed] = {}
        # By identity: each part of the schema is read once, however often others refer to it.
        self._read: dict[int, Allowed] = {}

    def allowed(self, name: str) -> Allowed:
        """ANYTHING where the schema does not say."""
        if name not in self._known:
            self._known[name] = _together([self._allowed(each, 0) for each in self._about(name)])
        return self._known[name]

    def _applying(self, schema: Any, depth: int, seen: set[int]) -> Iterator[Mapping[str, Any]]:
        """This schema of all the parameters, and those that it says hold as well."""
        if not isinstance(schema, Mapping) or depth > DEEPEST or id(schema) in seen:
            return
        seen.add(id(schema))
        if "$ref" in schema:
            yield from self._applying(self._target(schema["$ref"]), depth + 1, seen)
        for part in _list(schema, "allOf"):
            yield from self._applying(part, depth + 1, seen)
        yield schema

    def _about(self, name: str) -> Iterator[Any]:
        """Every schema that says something about the parameter `name`."""
        for schema in self._parts:
            properties = schema.get("properties")
            if isinstance(properties, Mapping) and name in properties:
                yield properties[name]
            elif isinstance(schema.get("additionalProperties"), Mapping):
                yield schema["additionalProperties"]

    def _allowed(self, schema: Any, depth: int) -> Allowed:
        if not isinstance(schema, Mapping) or depth > DEEPEST:
            return ANYTHING
        if id(schema) not in self._read:
            self._read[id(schema)] = ANYTHING  # to itself, while it is being read
            self._read[id(schema)] = self._of(schema, depth)
        return self._read[id(schema)]

    def _of(self, schema: Mapping[str, Any], depth: int) -> Allowed:
        found = []
        if "$ref" in schema:
            found.append(self._allowed(self._target(schema["$ref"]), depth + 1))
        if types := _types(schema.get("type")):
            found.append(Allowed(types))
        values = [*_list(schema, "enum"), *([schema["const"]] if "const" in schema else [])]
        if values:
            found.append(_of_values(values))
        for keyword in ("anyOf", "oneOf"):
            if choices := [self._allowed(each, depth + 1) for each in _list(schema, keyword)]:
                found.append(_either(choices))
        found += [self._allowed(each, depth + 1) for each in _list(schema, "allOf")]
        return _together(found)

    def _target(self, reference: Any) -> Any:
        """What a JSON pointer into this schema names, None for any other reference."""
        if not isinstance(reference, str) or not f"{reference}/".startswith("#/"):
            return None
        found: Any = self._schema
        for part in reference.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            found = found.get(key) if isinstance(found, Mapping) else None
        return found


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


def _list(schema: Mapping[str, Any], keyword: str) -> list[Any]:
    value = schema.get(keyword)
    return list(value) if isinstance(value, (list, tuple)) else []


def _types(value: Any) -> frozenset[str]:
    named = value if isinstance(value, (list, tuple)) else [value]
    return ALL & {each.lower() for each in named if isinstance(each, str)}


def _of_values(values: list[Any]) -> Allowed:
    strings = frozenset(each for each in values if isinstance(each, str))
    return Allowed(frozenset(_type_of(each) for each in values), strings)


def _type_of(value: Any) -> str:
    if value is None:
        return NULL
    for kind, name in ((bool, BOOLEAN), (int, INTEGER), (float, NUMBER), (str, STRING)):
        if isinstance(value, kind):
            return name
    return ARRAY if isinstance(value, (list, tuple)) else OBJECT
