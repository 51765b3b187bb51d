"""A tool's schema taken apart: references followed, alternatives counted, types xgrammar knows.

What refers to other parts of the schema is followed a limited number of times, since a schema may
refer to itself. No SGLang, no xgrammar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sglang_minimax.parsers.schema import DEEPEST
from sglang_minimax.parsers.schema_parts import Schema, listed, mapped, target

# References and alternatives of one tool that are followed; a program writes a thousand parameters
# with a few each.
_MOST_STEPS = 5_000

_KEYWORDS_OF = {
    "object": ("properties", "additionalProperties", "patternProperties"),
    "array": ("items", "prefixItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "multipleOf", "exclusiveMinimum", "exclusiveMaximum"),
}
_ALL = ("string", "number", "boolean", "null", "object", "array")
_KNOWN = frozenset((*_ALL, "integer"))
# Keywords whose value has a schema for each name, and those whose value is data.
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "dependentSchemas")
_DEFINITIONS = ("$defs", "definitions")
_DATA = ("const", "enum", "default", "examples", "example")


def types_of(schema: Schema) -> Sequence[str]:
    """The types that the schema names, or that its other keywords are about."""
    if types := _known_types(schema.get("type")):
        return types
    return [
        kind for kind, keywords in _KEYWORDS_OF.items() if any(key in schema for key in keywords)
    ] or _ALL


def _known_types(named: Any) -> list[str]:
    """Types in small letters; none where one is unknown, which may be anything."""
    types = [str(each).lower() for each in (named if isinstance(named, (list, tuple)) else [named])]
    return types if _KNOWN.issuperset(types) else []


class Root:
    """The whole schema of one tool, which its parts refer to."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._steps = 0
        # By reference: its name in every part, its target, and what that refers to.
        self._names: dict[str, str] = {}
        self._targets: dict[str, tuple[Any, set[str]]] = {}

    def is_too_much(self, depth: int) -> bool:
        """Stops a schema that refers to itself more than once, which would take for ever.

        To be asked for each reference and each list of alternatives.
        """
        self._steps += 1
        return depth > DEEPEST or self._steps > _MOST_STEPS

    def target(self, reference: Any) -> Schema:
        """What a JSON pointer names, an empty schema for any other reference."""
        found = self._found(reference)
        return found if isinstance(found, Mapping) else {}

    def _found(self, reference: Any) -> Any:
        return target(self.schema, reference)

    def with_definitions(self, part: Schema) -> dict[str, Any]:
        """The part as a schema of its own: what it refers to comes along, and nothing else."""
        moved, waiting = self._moved(part)
        definitions: dict[str, Any] = {}
        while waiting:
            reference = waiting.pop()
            name = self._names[reference]
            if name not in definitions:
                if reference not in self._targets:
                    self._targets[reference] = self._moved(self._found(reference))
                definitions[name], more = self._targets[reference]
                waiting |= more
        return {**moved, "$defs": definitions} if definitions else moved

    def _moved(self, schema: Any) -> tuple[Any, set[str]]:
        """The schema for use in another one, and the references in it that lead somewhere."""
        used: set[str] = set()

        def refer(reference: Any) -> Any:
            if self._found(reference) is None:
                return reference
            used.add(reference)
            return f"#/$defs/{self._names.setdefault(reference, str(len(self._names)))}"

        return _moved(schema, refer), used


def _moved(node: Any, refer: Callable[[Any], Any]) -> Any:
    """A schema for use in another one, with the types that xgrammar knows.

    refer: gives the new form of a reference.
    """
    if isinstance(node, (list, tuple)):
        return [_moved(each, refer) for each in node]
    if not isinstance(node, Mapping):
        return node
    moved: dict[str, Any] = {}
    for key, value in node.items():
        if key == "type":
            if types := _known_types(value):
                moved[key] = types if len(types) > 1 else types[0]
        elif key == "$ref":
            moved[key] = refer(value)
        elif key in _DATA:
            moved[key] = value
        elif key in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
            moved[key] = {name: _moved(each, refer) for name, each in value.items()}
        elif key not in _DEFINITIONS:  # they come along where something refers to them
            moved[key] = _moved(value, refer)
    return moved


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
    return merged([*(resolved(each, root, depth + 1) for each in parts), rest])


def merged(schemas: Iterable[Schema]) -> dict[str, Any]:
    """All hold: properties and required names come together, for the rest the last one counts."""
    total: dict[str, Any] = {}
    for each in schemas:
        properties = {**mapped(total, "properties"), **mapped(each, "properties")}
        names = [*listed(total, "required"), *listed(each, "required")]
        required = list(dict.fromkeys(name for name in names if isinstance(name, str)))
        total.update(each)
        if properties:
            total["properties"] = properties
        if required:
            total["required"] = required
    return total
