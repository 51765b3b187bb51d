"""Parts of a JSON schema: lists, mappings and types where they are such; what a reference names.

Schemas come from clients: anything may be anywhere in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

Schema = Mapping[str, Any]

TYPES = ("string", "integer", "number", "boolean", "null", "object", "array")


def listed(schema: Schema, keyword: str) -> list[Any]:
    """The list that the keyword has, empty for anything else."""
    value = schema.get(keyword)
    return list(value) if isinstance(value, (list, tuple)) else []


def mapped(schema: Schema, keyword: str) -> Mapping[Any, Any]:
    """The mapping that the keyword has, empty for anything else."""
    value = schema.get(keyword)
    return value if isinstance(value, Mapping) else {}


def types_named(schema: Schema) -> list[str]:
    """The types of JSON that `type` names, in small letters; none where it may be anything."""
    value = schema.get("type")
    names = value if isinstance(value, (list, tuple)) else [value]
    small = [name.lower() for name in names if isinstance(name, str)]
    return [name for name in small if name in TYPES]


def target(schema: Schema, reference: Any) -> Any:
    """What a JSON pointer into the schema names, None for any other reference."""
    if not isinstance(reference, str) or not f"{reference}/".startswith("#/"):
        return None
    found: Any = schema
    for part in unquote(reference).split("/")[1:]:
        found = _within(found, part.replace("~1", "/").replace("~0", "~"))
    return found


def _within(found: Any, key: str) -> Any:
    if isinstance(found, Mapping):
        return found.get(key)
    if isinstance(found, (list, tuple)) and key.isascii() and key.isdigit() and len(key) < 10:
        return found[int(key)] if int(key) < len(found) else None
    return None
