"""Several schemas that hold together, as one: `$ref`, `allOf`, and what stands beside `anyOf`.

No SGLang, no xgrammar.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import Any

from sglang_minimax.parsers.schema_parts import Schema, listed, types_named
from sglang_minimax.parsers.tool_schema import SCHEMAS_BY_NAME, Root

# Ways in which two lists of alternatives may go together.
_MOST_PAIRS = 100


def resolved(schema: Schema, root: Root, depth: int = 0) -> Schema:
    """The schema without `$ref` and `allOf` at its top."""
    parts = [each for each in listed(schema, "allOf") if isinstance(each, Mapping)]
    if "$ref" in schema:
        parts.append(root.target(schema["$ref"]))
    if not parts:
        return schema
    if root.is_too_much(depth):
        return {}
    rest = {key: value for key, value in schema.items() if key not in ("$ref", "allOf")}
    return merged([*(resolved(each, root, depth + 1) for each in parts), rest], root, depth)


def merged(schemas: Iterable[Schema], root: Root, depth: int = 0) -> dict[str, Any]:
    """What all of them allow, as one; where two contradict each other the last one counts.

    Types or values that contradict each other leave an `enum` of nothing.
    """
    total: dict[str, Any] = {}
    for each in schemas:
        total = _both(total, each, root, depth)
    return total


def _both(one: Schema, other: Schema, root: Root, depth: int) -> dict[str, Any]:
    both = {**one, **other}
    for keyword in one.keys() & other.keys():
        values = one[keyword], other[keyword]
        if keyword in SCHEMAS_BY_NAME and all(isinstance(each, Mapping) for each in values):
            both[keyword] = _by_name(*values, root, depth)
        elif keyword in ("additionalProperties", "items"):
            both[keyword] = _part(*values, root, depth)
        elif keyword in _LISTS and all(isinstance(each, (list, tuple)) for each in values):
            both[keyword] = _LISTS[keyword](*values)
        elif keyword in _LIMITS and all(type(each) in (int, float) for each in values):
            both[keyword] = _LIMITS[keyword](values)
    types = types_named(one), types_named(other)
    if common := _common_types(*types):
        both["type"] = common
    elif all(types):
        both["enum"] = []
    return both


def _by_name(one: Schema, other: Schema, root: Root, depth: int) -> dict[str, Any]:
    common = {name: _part(one[name], other[name], root, depth) for name in one if name in other}
    return {**one, **other, **common}


def _part(one: Any, other: Any, root: Root, depth: int) -> Any:
    """What both schemas of the same part allow; a schema may be True or False."""
    if one is False or other is False:
        return False
    if not isinstance(one, Mapping) or not isinstance(other, Mapping) or one == other:
        return other if isinstance(other, Mapping) else one
    if root.is_too_much(depth):
        return other
    return merged([resolved(each, root, depth + 1) for each in (one, other)], root, depth + 1)


def _common_types(one: list[str], other: list[str]) -> list[str]:
    """Every integer is a number."""
    found = [each for each in one if each in other or (each == "integer" and "number" in other)]
    found += ["integer"] if "integer" in other and "number" in one else []
    return list(dict.fromkeys(found))


def _names(one: list[Any], other: list[Any]) -> list[str]:
    return list(dict.fromkeys(name for name in (*one, *other) if isinstance(name, str)))


def _common(one: list[Any], other: list[Any]) -> list[Any]:
    """Compared by key, as there may be thousands of them."""
    keys = {_key(each) for each in other}
    return [each for each in one if _key(each) in keys]


def _key(value: Any) -> tuple[str, Any]:
    """The same for equal values of JSON: 1 and 1.0, but not 1 and true."""
    if isinstance(value, (dict, list, tuple)):
        return "json", json.dumps(value, sort_keys=True)
    return "bool" if isinstance(value, bool) else "", value


def _pairs(one: list[Any], other: list[Any]) -> list[Any]:
    if len(one) * len(other) > _MOST_PAIRS:
        return other
    return [{"allOf": list(pair)} for pair in product(one, other)]


_LISTS: dict[str, Callable[[list[Any], list[Any]], list[Any]]] = {
    "required": _names,
    "enum": _common,
    "anyOf": _pairs,
    "oneOf": _pairs,
}
_LIMITS: dict[str, Callable[[tuple[Any, Any]], Any]] = {
    **dict.fromkeys(("minimum", "exclusiveMinimum", "minLength", "minItems"), max),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "maxLength", "maxItems"), min),
}
