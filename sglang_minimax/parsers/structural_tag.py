"""The format of tool calls as a structural tag of xgrammar: what a forced or strict call may be.

xgrammar has a ready-made tag for MiniMax-M2 and a style for its parameters. Neither fits: the tag
begins with a thought that SGLang keeps out of grammars, and the style allows white space around
values, which belongs to them (`" x"` is no `enum` of `"x"`), and any text at all where a schema
gives no properties. So a call is built from the parts below, with white space as the chat template
writes it, and every value is one that `values.py` reads back as the schema's type.

A tool's declared schema holds for forced calls whether or not the tool is strict: it decides how
values are read, and SGLang's own JSON way does the same. Under `auto` it holds for strict tools;
other tools take any parameters there, each a name and a text.

Properties come in the order in which the schema has them, as with every grammar of xgrammar. What
cannot be said:

* A string never holds `</parameter>`: the tag ends it. Limits of its length up to 64 are enforced;
  with `<` it may be half as long. A `pattern` that could match `<` is not enforced, nor is `not`,
  `if` or anything else that xgrammar does not know.
* A parameter or tool whose name does not fit between quotes on one line is left out.
* A schema that xgrammar cannot compile is refused with status 400 by SGLang.

xgrammar's classes, no SGLang.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from xgrammar.structural_tag import (
    AnyTextFormat,
    ConstStringFormat,
    Format,
    JSONSchemaFormat,
    OptionalFormat,
    OrFormat,
    PlusFormat,
    RegexFormat,
    SequenceFormat,
    StarFormat,
    StructuralTag,
    TagFormat,
    TriggeredTagsFormat,
)

from sglang_minimax.parsers.markup import (
    BLOCK_CLOSE,
    BLOCK_OPEN,
    INVOKE_CLOSE,
    INVOKE_OPEN,
    PARAMETER_CLOSE,
    PARAMETER_OPEN,
    THINK_CLOSE,
)
from sglang_minimax.parsers.schema import DEEPEST
from sglang_minimax.parsers.tool_calls import LONGEST_NAME

# Enough for an object that is printed with indentation; without a limit a model can write blanks
# until it is cut off.
_MOST_WHITE_SPACE = 24
# Greater limits of lengths are not enforced: a token costs time in proportion (8 ms at 1000).
_LONGEST_COUNTED = 64

# Of one tool's schema; all that a person writes has fewer alternatives.
_MOST_STEPS = 1000
_WHOLE = "tool"

_TEXT = AnyTextFormat(excludes=[PARAMETER_CLOSE])
_END_OF_VALUE = PARAMETER_CLOSE + "\n"
_ANY_NAME = RegexFormat(pattern=r"[a-zA-Z_][a-zA-Z0-9_.\-]{0,63}")
# `</think>\n\n` precedes a reply; the published template has one more line break before a block.
_LINE_BREAKS = RegexFormat(pattern=r"\n{0,3}")

Schema = Mapping[str, Any]


class Function(NamedTuple):
    """A tool of a request. parameters: its JSON schema, or anything else for none."""

    name: str
    parameters: Any
    is_strict: bool = True


def forced(functions: Iterable[Function], *, only_one: bool, with_thought: bool) -> StructuralTag:
    """One block of calls and nothing else. only_one: of a single call.

    with_thought: the reply begins with the rest of a thought, which no one else looks after.
    """
    block = [_LINE_BREAKS, _const(BLOCK_OPEN + "\n"), _calls(functions, only_one)]
    return _tag([*_thought(with_thought), *block, _const(BLOCK_CLOSE)])


def strict(functions: Iterable[Function], *, only_one: bool, with_thought: bool) -> StructuralTag:
    """Any text, where each block has calls of strict tools as their schemas say."""
    block = TagFormat(begin=BLOCK_OPEN + "\n", content=_calls(functions, only_one), end=BLOCK_CLOSE)
    text = TriggeredTagsFormat(triggers=[BLOCK_OPEN], tags=[block], stop_after_first=only_one)
    return _tag([*_thought(with_thought), text])


def _tag(parts: Sequence[Format]) -> StructuralTag:
    return StructuralTag(format=_sequence(parts))


def _thought(wanted: bool) -> list[Format]:
    if not wanted:
        return []
    return [AnyTextFormat(excludes=[THINK_CLOSE, BLOCK_OPEN]), _const(THINK_CLOSE)]


# --- calls -----------------------------------------------------------------------------------


def _calls(functions: Iterable[Function], only_one: bool) -> Format:
    # Without any, xgrammar refuses the tag, and SGLang the request.
    choices = _either([_call(each) for each in functions if _is_name(each.name)])
    return choices if only_one else PlusFormat(content=choices)


def _call(function: Function) -> Format:
    parameters = _parameters(function.parameters) if function.is_strict else _ANY_PARAMETERS
    opening = _const(f'{INVOKE_OPEN}"{function.name}">\n')
    return _sequence([opening, *parameters, _const(INVOKE_CLOSE + "\n")])


def _parameters(schema: Any) -> list[Format]:
    root = _Root(schema if isinstance(schema, Mapping) else {})
    return _properties(_resolved(root.schema, root), root, 0)


def _properties(schema: Schema, root: _Root, depth: int) -> list[Format]:
    """The parameters of one call, one after the other."""
    for keyword in ("anyOf", "oneOf"):
        branches = [each for each in _list(schema, keyword) if isinstance(each, Mapping)]
        if branches and not root.is_too_much(depth):
            base = {key: value for key, value in schema.items() if key != keyword}
            merged = [_merged([base, _resolved(each, root)]) for each in branches]
            choices = [_properties(each, root, depth + 1) for each in merged]
            return [_either([_sequence(each) for each in choices])]
    required = _list(schema, "required")
    found: list[Format] = []
    for name, value in _mapping(schema, "properties").items():
        if not _is_name(name) or value is False:
            continue
        parameter = _named(_const(name), _value(value, root))
        found.append(parameter if name in required else OptionalFormat(content=parameter))
    more = schema.get("additionalProperties")
    if more is True or isinstance(more, Mapping):
        found.append(StarFormat(content=_named(_ANY_NAME, _value(more, root))))
    return found


def _named(name: Format, value: Format) -> Format:
    return _sequence(
        [_const(PARAMETER_OPEN + '"'), name, _const('">'), value, _const(_END_OF_VALUE)]
    )


def _is_name(name: Any) -> bool:
    """Whether the parser reads the name back from between quotes."""
    return (
        isinstance(name, str)
        and name == name.strip() != ""
        and not re.search(r'[\n\x00\ud800-\udfff]|">', name)
        and len(name) + len('"">') <= LONGEST_NAME
    )


# --- values ----------------------------------------------------------------------------------


def _value(schema: Any, root: _Root, depth: int = 0) -> Format:
    """One value: strings bare, everything else as JSON."""
    if not isinstance(schema, Mapping) or root.is_too_much(depth):
        return _TEXT
    schema = _resolved(schema, root)
    literals = [*_list(schema, "enum"), *([schema["const"]] if "const" in schema else [])]
    if literals:
        return _either([_const(_written(each)) for each in literals])
    for keyword in ("anyOf", "oneOf"):
        if choices := _list(schema, keyword):
            return _any_of([_value(each, root, depth + 1) for each in choices])
    types = _types(schema)
    if "string" not in types:
        return _json(schema, root)
    string = _string(schema)
    others = [each for each in types if each != "string"]
    return _any_of([string, _json({**schema, "type": others}, root)] if others else [string])


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _any_of(choices: list[Format]) -> Format:
    """Any text includes what the others are."""
    return _TEXT if _TEXT in choices else _either(choices)


def _json(schema: Schema, root: _Root) -> Format:
    return JSONSchemaFormat(
        json_schema=root.with_definitions(schema), max_whitespace_cnt=_MOST_WHITE_SPACE
    )


def _string(schema: Schema) -> Format:
    pattern = schema.get("pattern")
    if "format" in schema or (isinstance(pattern, str) and not _may_match_markup(pattern)):
        wanted = {key: schema[key] for key in ("pattern", "format") if key in schema}
        return JSONSchemaFormat(json_schema={"type": "string", **wanted}, style="minimax_xml")
    least, most = (_count(schema, key) for key in ("minLength", "maxLength"))
    return _counted(least or 0, most)


def _counted(least: int, most: int | None) -> Format:
    """Text of so many characters, which does not begin a closing tag where they are counted.

    Not by AnyTextFormat's `max_chars`: its mask allows bytes that it then does not accept, which
    ends the request.
    """
    # One character or two; so half as many fit.
    with_tags = "(?:[^<]|<[^/<])"
    if most is None:
        return _sequence([RegexFormat(pattern=f"{with_tags}{{{least}}}"), _TEXT])
    choices: list[Format] = [RegexFormat(pattern=f"[^<]{{{least},{max(least, most)}}}")]
    if least <= most // 2:
        choices.append(RegexFormat(pattern=f"{with_tags}{{{least},{most // 2}}}"))
    return _either(choices)


def _count(schema: Schema, keyword: str) -> int | None:
    value = schema.get(keyword)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 <= value <= _LONGEST_COUNTED else None


_CLASS = re.compile(r"\[(?:\\.|[^\]\\])*\]")


def _may_match_markup(pattern: str) -> bool:
    """Whether a regular expression may match `<`, which could begin a closing tag."""
    try:
        if any(re.match(each, "<") for each in _CLASS.findall(pattern)):
            return True
    except re.error:
        return True
    return bool(re.search(r"(?<!\\)\.|<|\\[DSWPux]", _CLASS.sub("", pattern)))


# --- schemas ---------------------------------------------------------------------------------

_KEYWORDS_OF = {
    "object": ("properties", "additionalProperties", "patternProperties"),
    "array": ("items", "prefixItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "multipleOf", "exclusiveMinimum", "exclusiveMaximum"),
}
_ALL = ("string", "number", "boolean", "null", "object", "array")


def _types(schema: Schema) -> Sequence[str]:
    """The types that the schema names, or that its other keywords are about."""
    named = schema.get("type")
    named = [named] if isinstance(named, str) else _list(schema, "type")
    if types := [each.lower() for each in named if isinstance(each, str)]:
        return types
    return [
        kind for kind, keywords in _KEYWORDS_OF.items() if any(key in schema for key in keywords)
    ] or _ALL


class _Root:
    """The whole schema of one tool, which its parts refer to."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._steps = 0

    def is_too_much(self, depth: int) -> bool:
        """Stops a schema that refers to itself more than once, which would take for ever."""
        self._steps += 1
        return depth > DEEPEST or self._steps > _MOST_STEPS

    def target(self, reference: Any) -> Schema:
        """What a JSON pointer names, an empty schema for any other reference."""
        found: Any = self.schema if str(reference).startswith("#") else None
        for part in str(reference)[1:].split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            found = found.get(key) if isinstance(found, Mapping) else None
        return found if isinstance(found, Mapping) else {}

    def with_definitions(self, part: Schema) -> dict[str, Any]:
        """The part as a schema of its own: what it refers to comes along, one level deeper."""
        moved = _rebased(part)
        return dict(part) if moved == part else {**moved, "$defs": {_WHOLE: _rebased(self.schema)}}


def _rebased(node: Any) -> Any:
    if isinstance(node, (list, tuple)):
        return [_rebased(each) for each in node]
    if not isinstance(node, Mapping):
        return node
    moved = {key: _rebased(value) for key, value in node.items()}
    reference = node.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = f"#/$defs/{_WHOLE}{reference[1:]}"
    return moved


def _resolved(schema: Schema, root: _Root) -> Schema:
    """The schema without `$ref` and `allOf` at its top."""
    for _ in range(DEEPEST):
        parts = [each for each in _list(schema, "allOf") if isinstance(each, Mapping)]
        if "$ref" in schema:
            parts.append(root.target(schema["$ref"]))
        if not parts:
            return schema
        rest = {key: value for key, value in schema.items() if key not in ("$ref", "allOf")}
        schema = _merged([*parts, rest])
    return {}


def _merged(schemas: Iterable[Schema]) -> dict[str, Any]:
    """All hold: properties and required names come together, for the rest the last one counts."""
    total: dict[str, Any] = {}
    for each in schemas:
        properties = {**_mapping(total, "properties"), **_mapping(each, "properties")}
        names = [*_list(total, "required"), *_list(each, "required")]
        required = list(dict.fromkeys(name for name in names if isinstance(name, str)))
        total.update(each)
        if properties:
            total["properties"] = properties
        if required:
            total["required"] = required
    return total


def _list(schema: Schema, keyword: str) -> list[Any]:
    value = schema.get(keyword)
    return list(value) if isinstance(value, (list, tuple)) else []


def _mapping(schema: Schema, keyword: str) -> Schema:
    value = schema.get(keyword)
    return value if isinstance(value, Mapping) else {}


# --- formats ---------------------------------------------------------------------------------


def _const(text: str) -> Format:
    return ConstStringFormat(value=text)


def _sequence(parts: Sequence[Format]) -> Format:
    return parts[0] if len(parts) == 1 else SequenceFormat(elements=list(parts))


def _either(choices: Sequence[Format]) -> Format:
    return choices[0] if len(choices) == 1 else OrFormat(elements=list(choices))


_ANY_PARAMETERS = [StarFormat(content=_named(_ANY_NAME, _TEXT))]
