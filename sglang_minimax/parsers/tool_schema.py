"""A tool's schema, and parts of it as schemas of their own that xgrammar takes.

What refers to other parts of the schema is followed a limited number of times, since a schema may
refer to itself; and each value is a grammar of its own, which has to have a copy of all that it
refers to. No SGLang, no xgrammar.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sglang_minimax.parsers.patterns import anchored, may_match
from sglang_minimax.parsers.schema import DEEPEST
from sglang_minimax.parsers.schema_parts import TYPES, Schema, target, types_named

# References and alternatives of one tool that are followed; a program writes a thousand parameters
# with a few each.
_MOST_STEPS = 5_000
# Copies of definitions in all values of one tool: xgrammar needs half a second for so many.
_MOST_COPIES = 1_000

_KEYWORDS_OF = {
    "object": ("properties", "additionalProperties", "patternProperties"),
    "array": ("items", "prefixItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "multipleOf", "exclusiveMinimum", "exclusiveMaximum"),
}
# Every integer is a number.
_ALL = tuple(each for each in TYPES if each != "integer")
#: Keywords whose value has a schema for each name.
SCHEMAS_BY_NAME = ("properties", "patternProperties", "dependentSchemas")
_DEFINITIONS = ("$defs", "definitions")
_DATA = ("const", "enum", "default", "examples", "example")


def types_of(schema: Schema) -> Sequence[str]:
    """The types that the schema names, or those that the keywords of `_KEYWORDS_OF` speak of."""
    if types := types_named(schema):
        return types
    return [
        kind for kind, keywords in _KEYWORDS_OF.items() if any(key in schema for key in keywords)
    ] or _ALL


class Root:
    """The whole schema of one tool, which its parts refer to."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._steps = 0
        self._copies = 0
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
        """The part as a schema of its own: what it refers to comes along, and nothing else.

        Where that is too much for one tool, a reference says nothing.
        """
        moved, waiting = self._carried(part)
        definitions: dict[str, Any] = {}
        while waiting:
            reference = waiting.pop()
            name = self._names[reference]
            if name not in definitions:
                if self._copies + len(definitions) >= _MOST_COPIES:
                    return dict(_adapted(part, lambda _: None))
                if reference not in self._targets:
                    self._targets[reference] = self._carried(self._found(reference))
                definitions[name], more = self._targets[reference]
                waiting |= more
        self._copies += len(definitions)
        return {**moved, "$defs": definitions} if definitions else moved

    def _carried(self, schema: Any) -> tuple[Any, set[str]]:
        """The schema for use in another one, and the references in it that lead somewhere."""
        used: set[str] = set()

        def refer(reference: Any) -> str | None:
            if self._found(reference) is None:
                return None
            used.add(reference)
            return f"#/$defs/{self._names.setdefault(reference, str(len(self._names)))}"

        return _adapted(schema, refer), used


def _adapted(node: Any, refer: Callable[[Any], str | None]) -> Any:
    """A schema for use in another one, with the types and patterns as xgrammar takes them.

    refer: gives the new form of a reference, None to leave it out.
    """
    if isinstance(node, (list, tuple)):
        return [_adapted(each, refer) for each in node]
    if not isinstance(node, Mapping):
        return node
    adapted: dict[str, Any] = {}
    for key, value in node.items():
        if key == "type":
            if types := types_named(node):
                adapted[key] = types if len(types) > 1 else types[0]
        elif key == "$ref":
            if (reference := refer(value)) is not None:
                adapted[key] = reference
        elif key == "pattern":
            if _is_for_all_of_a_json_string(value):
                adapted[key] = value
        elif key in _DATA:
            if value != [] or key != "enum":
                adapted[key] = value
        elif key in SCHEMAS_BY_NAME and isinstance(value, Mapping):
            name = _whole if key == "patternProperties" else str
            adapted[key] = {name(each): _adapted(part, refer) for each, part in value.items()}
        elif key not in _DEFINITIONS:  # they come along where something refers to them
            adapted[key] = _adapted(value, refer)
    return adapted


def _is_for_all_of_a_json_string(pattern: Any) -> bool:
    """Whether xgrammar, for which a string has no escapes then, allows what the pattern does."""
    found = anchored(pattern)
    return (
        found is not None
        and found.is_whole
        and not any(may_match(found.pattern, each) for each in '"\\\n')
    )


def _whole(pattern: Any) -> str:
    """The pattern of a key, for all of the key; any where it cannot be said."""
    found = anchored(pattern)
    if found is None:
        return "^.*$"
    return f"^{found.pattern}{'' if found.is_whole else '.*'}$"
