"""The format of tool calls as a structural tag of xgrammar: what a forced or strict call may be.

xgrammar has a ready-made tag for MiniMax-M2 and a style for its parameters. Neither fits: the tag
begins with a thought that SGLang keeps out of grammars, and the style allows white space around
values, which belongs to them (`" x"` is no `enum` of `"x"`), and any text at all where a schema
gives no properties. So a call is built from the parts below, with white space as the chat template
writes it, and every value is one that `values.py` reads back as the schema's type.

A tool's declared schema holds for forced calls whether or not the tool is strict: it decides how
values are read, and SGLang's own JSON way does the same. Under `auto` it holds for strict tools;
other tools take any parameters there, each a name and a text.

Parameters come in the order in which the schema has them, as with every grammar of xgrammar, and
those that it does not name come last: with `additionalProperties` or `patternProperties`, or where
the schema is of an object and says nothing more. What cannot be said:

* What `string_format.py` cannot say of strings; nor `not`, `if` and what else xgrammar has no rule
  for. In JSON a `pattern` is enforced where it is for all of a string without escapes.
* A string never holds `</parameter>`. JSON may, and where what follows it could follow a value, the
  parser ends the value there: the format has no way to say that it does not.
* JSON may be nested deeper than the parser reads it, which makes it a string.
* An additional parameter may have the name of a declared one, and then any additional value.
* References and alternatives are followed up to 5,000 times for a tool; behind that any text goes.
  A value needs copies of all definitions that it refers to. Where a tool's values come to more than
  1,000 of them, further ones are held to the outer part of their schema.
* A parameter or tool whose name does not fit between quotes on one line is left out, as is an item
  of an `enum` that the parser would not read back.
* A schema that xgrammar cannot compile, or that cannot be written down, is refused with status 400
  by SGLang.

xgrammar's classes, no SGLang.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from xgrammar.structural_tag import (
    AnyTextFormat,
    Format,
    JSONSchemaFormat,
    OptionalFormat,
    OrFormat,
    PlusFormat,
    RegexFormat,
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
from sglang_minimax.parsers.schema import type_of
from sglang_minimax.parsers.schema_merging import merged, resolved
from sglang_minimax.parsers.schema_parts import Schema, listed, mapped, types_named
from sglang_minimax.parsers.string_format import (
    ANY_NAME,
    TEXT,
    any_of,
    const,
    either,
    name_like,
    sequence,
    string,
)
from sglang_minimax.parsers.tool_calls import AFTER_VALUE, LONGEST_NAME
from sglang_minimax.parsers.tool_schema import Root, types_of

# Enough for an object that is printed with indentation; without a limit a model can write blanks
# until it is cut off.
_MOST_WHITE_SPACE = 24

_END_OF_VALUE = PARAMETER_CLOSE + "\n"
# `</think>\n\n` precedes a reply; the published template has one more line break before a block.
_LINE_BREAKS = RegexFormat(pattern=r"\n{0,3}")
# Where the parser ends a value.
_ENDS_A_VALUE = re.compile(rf"{PARAMETER_CLOSE}\s*(?:{'|'.join(AFTER_VALUE)}|$)")


class Function(NamedTuple):
    """A tool of a request. parameters: its JSON schema, or anything else for none."""

    name: str
    parameters: Any
    is_strict: bool = True


def forced(functions: Iterable[Function], *, only_one: bool, with_thought: bool) -> StructuralTag:
    """One block of calls and nothing else. only_one: of a single call.

    with_thought: the reply begins with the rest of a thought, which no one else looks after.
    """
    block = [_LINE_BREAKS, const(BLOCK_OPEN + "\n"), _calls(functions, only_one)]
    return _tag([*_thought(with_thought), *block, const(BLOCK_CLOSE)])


def strict(functions: Iterable[Function], *, only_one: bool, with_thought: bool) -> StructuralTag:
    """Any text, where each block has calls of strict tools as their schemas say."""
    block = TagFormat(begin=BLOCK_OPEN + "\n", content=_calls(functions, only_one), end=BLOCK_CLOSE)
    text = TriggeredTagsFormat(triggers=[BLOCK_OPEN], tags=[block], stop_after_first=only_one)
    return _tag([*_thought(with_thought), text])


def refused() -> StructuralTag:
    """What no grammar can be made of: SGLang refuses the request, as it should."""
    return StructuralTag(format=OrFormat(elements=[]))


def _tag(parts: Sequence[Format]) -> StructuralTag:
    return StructuralTag(format=sequence(parts))


def _thought(wanted: bool) -> list[Format]:
    if not wanted:
        return []
    return [AnyTextFormat(excludes=[THINK_CLOSE, BLOCK_OPEN]), const(THINK_CLOSE)]


# --- calls -----------------------------------------------------------------------------------


def _calls(functions: Iterable[Function], only_one: bool) -> Format:
    # Without any, xgrammar refuses the tag, and SGLang the request.
    choices = either([_call(each) for each in functions if _is_name(each.name)])
    return choices if only_one else PlusFormat(content=choices)


def _call(function: Function) -> Format:
    if function.is_strict:
        parameters = _parameters(function.parameters)
    else:
        parameters = [StarFormat(content=_named(ANY_NAME, TEXT))]
    opening = const(f'{INVOKE_OPEN}"{function.name}">\n')
    return sequence([opening, *parameters, const(INVOKE_CLOSE + "\n")])


def _parameters(schema: Any) -> list[Format]:
    root = Root(schema if isinstance(schema, Mapping) else {})
    return _properties(resolved(root.schema, root), root, 0)


def _properties(schema: Schema, root: Root, depth: int) -> list[Format]:
    """The parameters of one call, one after the other."""
    if (branches := _branches(schema, root, depth)) is not None:
        return [either([sequence(_properties(each, root, depth + 1)) for each in branches])]
    # A dict for its order: a tool may have thousands of names.
    required = dict.fromkeys(each for each in listed(schema, "required") if isinstance(each, str))
    declared = mapped(schema, "properties")
    found: list[Format] = []
    for name, value in declared.items():
        if _is_name(name) and value is not False:
            parameter = _named(const(name), _value(value, root))
            found.append(parameter if name in required else OptionalFormat(content=parameter))
    further = _further(schema)
    if further is not False:
        for name in required:
            if _is_name(name) and name not in declared:
                found.append(_named(const(name), _value(further, root)))
    return [*found, *_undeclared(schema, root)]


def _further(schema: Schema) -> Any:
    """The schema of parameters that are not named; False for none, None where it is not said."""
    further = schema.get("additionalProperties")
    return further if isinstance(further, (bool, Mapping)) else None


def _undeclared(schema: Schema, root: Root) -> list[Format]:
    """Any number of parameters that the schema does not name."""
    further, patterns = _further(schema), mapped(schema, "patternProperties")
    if further is None:
        # Strict tools list what they take; an object of which nothing is said may hold anything.
        further = "properties" not in schema and not patterns and types_named(schema) == ["object"]
    kinds = [
        _named(name_like(pattern), _value(value, root))
        for pattern, value in patterns.items()
        if value is not False
    ]
    if further is not False:
        kinds.append(_named(ANY_NAME, _value(further, root)))
    return [StarFormat(content=either(kinds))] if kinds else []


def _branches(schema: Schema, root: Root, depth: int) -> list[Schema] | None:
    """The schemas of which one holds, each with all that holds beside it; None without any."""
    for keyword in ("anyOf", "oneOf"):
        choices = [each for each in listed(schema, keyword) if each is not False]
        if choices and not root.is_too_much(depth):
            base = {key: value for key, value in schema.items() if key != keyword}
            schemas = [each if isinstance(each, Mapping) else {} for each in choices]
            whole: list[Schema] = [merged([base, resolved(each, root)], root) for each in schemas]
            return [each for each in whole if each.get("enum") != []] or whole
    return None


def _named(name: Format, value: Format) -> Format:
    return sequence([const(PARAMETER_OPEN + '"'), name, const('">'), value, const(_END_OF_VALUE)])


def _is_name(name: Any) -> bool:
    """Whether the parser reads the name back from between quotes."""
    return (
        isinstance(name, str)
        and name == name.strip() != ""
        and not re.search(r'[\n\x00\ud800-\udfff]|"\s*>', name)
        and len(name) + len('"">') <= LONGEST_NAME
    )


# --- values ----------------------------------------------------------------------------------


def _value(schema: Any, root: Root, depth: int = 0) -> Format:
    """One value: strings bare, everything else as JSON."""
    if not isinstance(schema, Mapping):
        return TEXT
    schema = resolved(schema, root)
    if literals := _literals(schema):
        return either([const(each) for each in map(_written, literals) if _is_read_back(each)])
    if (branches := _branches(schema, root, depth)) is not None:
        return any_of([_value(each, root, depth + 1) for each in branches])
    if listed(schema, "anyOf") or listed(schema, "oneOf"):  # too many
        return TEXT
    types = types_of(schema)
    if "string" not in types:
        return _json(schema, root)
    others = [each for each in types if each != "string"]
    bare = string(schema)
    return any_of([bare, _json({**schema, "type": others}, root)] if others else [bare])


def _literals(schema: Schema) -> list[Any]:
    """The only values that there are, of the types that the schema names."""
    values = [schema["const"]] if "const" in schema else listed(schema, "enum")
    types = set(types_named(schema))
    types |= {"integer"} if "number" in types else set()
    return [each for each in values if type_of(each) in types] or values


def _is_read_back(text: str) -> bool:
    """Whether the parser finds the end of the value where it is."""
    return not _ENDS_A_VALUE.search(text)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _json(schema: Schema, root: Root) -> Format:
    return JSONSchemaFormat(
        json_schema=root.with_definitions(schema), max_whitespace_cnt=_MOST_WHITE_SPACE
    )
