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
* Of `format`, `pattern` and limits of lengths one is enforced: the first that can be.
* An additional parameter may have the name of a declared one, and then any additional value.
* References and alternatives are followed up to 5,000 times for a tool; behind that any text goes.
* A parameter or tool whose name does not fit between quotes on one line is left out.
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
from sglang_minimax.parsers.schema_parts import Schema, listed, mapped
from sglang_minimax.parsers.tool_calls import LONGEST_NAME
from sglang_minimax.parsers.tool_schema import Root, merged, resolved, types_of

# Enough for an object that is printed with indentation; without a limit a model can write blanks
# until it is cut off.
_MOST_WHITE_SPACE = 24
# Greater limits of lengths are not enforced: a token costs time in proportion (8 ms at 1000).
_LONGEST_COUNTED = 64

_TEXT = AnyTextFormat(excludes=[PARAMETER_CLOSE])
_END_OF_VALUE = PARAMETER_CLOSE + "\n"
_ANY_NAME = RegexFormat(pattern=r"[a-zA-Z_][a-zA-Z0-9_.\-]{0,63}")
# `</think>\n\n` precedes a reply; the published template has one more line break before a block.
_LINE_BREAKS = RegexFormat(pattern=r"\n{0,3}")


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


def refused() -> StructuralTag:
    """What no grammar can be made of: SGLang refuses the request, as it should."""
    return StructuralTag(format=OrFormat(elements=[]))


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
    root = Root(schema if isinstance(schema, Mapping) else {})
    return _properties(resolved(root.schema, root), root, 0)


def _properties(schema: Schema, root: Root, depth: int) -> list[Format]:
    """The parameters of one call, one after the other."""
    for keyword in ("anyOf", "oneOf"):
        branches = [each for each in listed(schema, keyword) if isinstance(each, Mapping)]
        if branches and not root.is_too_much(depth):
            base = {key: value for key, value in schema.items() if key != keyword}
            wholes = [merged([base, resolved(each, root)]) for each in branches]
            choices = [_properties(each, root, depth + 1) for each in wholes]
            return [_either([_sequence(each) for each in choices])]
    required = {name for name in listed(schema, "required") if isinstance(name, str)}
    found: list[Format] = []
    for name, value in mapped(schema, "properties").items():
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
        and not re.search(r'[\n\x00\ud800-\udfff]|"\s*>', name)
        and len(name) + len('"">') <= LONGEST_NAME
    )


# --- values ----------------------------------------------------------------------------------


def _value(schema: Any, root: Root, depth: int = 0) -> Format:
    """One value: strings bare, everything else as JSON."""
    if not isinstance(schema, Mapping):
        return _TEXT
    schema = resolved(schema, root)
    literals = [*listed(schema, "enum"), *([schema["const"]] if "const" in schema else [])]
    if literals:
        return _either([_const(_written(each)) for each in literals])
    for keyword in ("anyOf", "oneOf"):
        if choices := listed(schema, keyword):
            if root.is_too_much(depth):
                return _TEXT
            return _any_of([_value(each, root, depth + 1) for each in choices])
    types = types_of(schema)
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


def _json(schema: Schema, root: Root) -> Format:
    return JSONSchemaFormat(
        json_schema=root.with_definitions(schema), max_whitespace_cnt=_MOST_WHITE_SPACE
    )


# The formats for which xgrammar has a rule, and a rule that has no `<`.
_FORMATS = (
    *("date", "time", "date-time", "duration", "uuid"),
    *("uri", "uri-reference", "uri-template", "hostname", "ipv4", "ipv6"),
)
# For these it has one with `<`, and so with closing tags; its addresses may have quotes.
_WORD, _LABEL = r"[a-zA-Z0-9!#$%&'*+/=?^_`{|}~\-]+", r"[a-zA-Z0-9]([a-zA-Z0-9\-]*[a-zA-Z0-9])?"
_POINTER = "(/([^<~/]|~[01])*)*"
_PATTERN_OF_FORMAT = {
    "email": rf"^{_WORD}(\.{_WORD})*@{_LABEL}(\.{_LABEL})*$",
    "json-pointer": f"^{_POINTER}$",
    "relative-json-pointer": f"^(0|[1-9][0-9]*)(#|{_POINTER})$",
}


def _string(schema: Schema) -> Format:
    kind, pattern = str(schema.get("format")), schema.get("pattern")
    if kind in _FORMATS:
        return _bare_string("format", kind)
    if kind in _PATTERN_OF_FORMAT:
        return _bare_string("pattern", _PATTERN_OF_FORMAT[kind])
    if isinstance(pattern, str) and not _may_match_markup(pattern):
        return _bare_string("pattern", pattern)
    least, most = (_count(schema, key) for key in ("minLength", "maxLength"))
    return _counted(least or 0, most)


def _bare_string(keyword: str, value: str) -> Format:
    return JSONSchemaFormat(json_schema={"type": "string", keyword: value}, style="minimax_xml")


def _counted(least: int, most: int | None) -> Format:
    """Text of so many characters, which does not begin a closing tag where they are counted.

    Not by AnyTextFormat's `max_chars`: its mask allows bytes that it then does not accept, which
    ends the request.
    """
    if most is None and not least:
        return _TEXT
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


# One after the other: what is escaped, a class of characters, or a character.
_PIECE = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|.", re.DOTALL)
# Classes, numbers of characters, and the character itself.
_ESCAPES_OF_MARKUP = re.compile(r"\\[DSWPpux0-9<]")


def _may_match_markup(pattern: str) -> bool:
    """Whether a regular expression may match `<`, which could begin a closing tag."""
    return any(_piece_may_match_markup(piece) for piece in _PIECE.findall(pattern))


def _piece_may_match_markup(piece: str) -> bool:
    if piece.startswith("\\"):
        return bool(_ESCAPES_OF_MARKUP.match(piece))
    if len(piece) == 1:
        return piece in ".<"
    try:
        return bool(re.match(piece, "<"))
    except re.error:
        return True


# --- formats ---------------------------------------------------------------------------------


def _const(text: str) -> Format:
    return ConstStringFormat(value=text)


def _sequence(parts: Sequence[Format]) -> Format:
    return parts[0] if len(parts) == 1 else SequenceFormat(elements=list(parts))


def _either(choices: Sequence[Format]) -> Format:
    return choices[0] if len(choices) == 1 else OrFormat(elements=list(choices))


_ANY_PARAMETERS = [StarFormat(content=_named(_ANY_NAME, _TEXT))]
