"""Parts of a JSON schema: lists and mappings where they are such, and what a reference names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

Schema = Mapping[str, Any]


def listed(schema: Schema, keyword: str) -> list[Any]:
    """The list that the keyword has, empty for anything else."""
    value = schema.get(keyword)
    return list(value) if isinstance(value, (list, tuple)) else []


def mapped(schema: Schema, keyword: str) -> Mapping[Any, Any]:
    """The mapping that the keyword has, empty for anything else."""
    value = schema.get(keyword)
    return value if isinstance(value, Mapping) else {}


def target(schema: Schema, reference: Any) -> Any:
    """What a JSON pointer into the schema names, None for any other reference."""
    if not isinstance(reference, str) or not f"{reference}/".startswith("#/"):
        return None
    found: Any = schema
    for part in unquote(reference).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
