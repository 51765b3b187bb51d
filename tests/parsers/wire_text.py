"""What replies are made of: strings that look like something else, and templates that write them.

The strategies leave out only what `docs/parsers.md` names as impossible to tell apart.

Of the two templates only tiny-m2's is one that a checkpoint has. The other is an imitation, written
by hand after a description of the format (raw strings, everything else as JSON, one line for each
call). It has not been compared with the template of any published checkpoint: what it adds is a
second layout, and no proof about theirs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from sglang_minimax import TINY_M2

OPEN, CLOSE = "<minimax:tool_call>", "</minimax:tool_call>"
TAGS = (
    *(OPEN, CLOSE, '<invoke name="f">', "<invoke name=", "</invoke>"),
    *('<parameter name="s">', '<parameter name="n">', "<parameter name=", "</parameter>"),
    *("<think>", "</think>"),
)
LOOKS_LIKE_ELSE = (
    *("None", "null", "nil", "True", "true", "123", "-0", "2.0", "1e999", "inf", "NaN", "", "}"),
    *("{", "]", '{"a": 1}', "[]", '"', "\\", "\\n", "\n", "\r\n", "\t", " ", "<", "</", ">", "'"),
    *("<tool_call>", "]~b]", "\x00", "\x1f", "\x7f", "\ud800", "\udfff", "🦀", "é", "\u2028"),
)
PARTS_OF_TAGS = tuple(tag[:end] for tag in TAGS for end in (1, 2, len(tag) // 2, len(tag) - 1))

# --- the templates ---

TINY = (TINY_M2 / "chat_template.jinja").read_text()
# Not the template of the published checkpoints: see above.
IMITATION = """
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{- ']~b]ai\\n' -}}
    {%- if message.content -%}{{- message.content -}}{%- endif -%}
    {%- if message.tool_calls -%}
      {{- '\\n<minimax:tool_call>\\n' -}}
      {%- for call in message.tool_calls -%}
        {{- '<invoke name="' ~ call.function.name ~ '">' -}}
        {%- for k, v in call.function.arguments.items() -%}
          {{- '<parameter name="' ~ k ~ '">' -}}
          {{- v | tojson(ensure_ascii=False) if v is not string else v -}}
          {{- '</parameter>' -}}
        {%- endfor -%}
        {{- '</invoke>\\n' -}}
      {%- endfor -%}
      {{- '</minimax:tool_call>' -}}
    {%- endif -%}
    {{- '[e~[\\n' -}}
  {%- endif -%}
{%- endfor -%}
"""
TEMPLATES = {"tiny-m2": TINY, "imitation": IMITATION}

Calls = list[tuple[str, dict[str, Any]]]


def message(content: str, calls: Calls, reasoning: str | None = None) -> dict[str, Any]:
    """A reply as a client sends it back."""
    functions = [{"function": {"name": name, "arguments": given}} for name, given in calls]
    sent: dict[str, Any] = {"role": "assistant", "content": content}
    if functions:
        sent["tool_calls"] = functions
    if reasoning is not None:
        sent["reasoning_content"] = reasoning
    return sent


def render(template: str, reply: Mapping[str, Any]) -> str:
    """What the model has to write so that this reply comes out: the text of its turn."""
    messages = [{"role": "user", "content": "?"}, dict(reply)]
    rendered, _ = render_jinja_template([messages], chat_template=TEMPLATES[template])
    turn = rendered[0].split("]~b]ai\n", 1)[1]
    assert turn.endswith("[e~[\n")
    return turn.removesuffix("[e~[\n")


# --- strings ---

_ENDS_EARLY = re.compile(
    r"</parameter>\s*(?:<parameter name=|</invoke>|<invoke name=|</minimax:tool_call>)"
)


def pieced(*more: str) -> st.SearchStrategy[str]:
    """Any text, above all of things that look like something else."""
    special = st.sampled_from((*more, *LOOKS_LIKE_ELSE, *TAGS, *PARTS_OF_TAGS))
    any_character = st.characters(exclude_categories=()).map(str)
    return st.one_of(special, st.lists(st.one_of(special, any_character), max_size=8).map("".join))


def spells_json(text: str) -> bool:
    """Whether a string reads as JSON of another type. Python's reader also takes NaN and such."""
    try:
        return not isinstance(json.loads(text.strip(" \t\r\n"), strict=False), str)
    except (ValueError, RecursionError):
        return False


def ends_early(value: Any) -> bool:
    """Whether the value as it is written holds what the end of a parameter looks like."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return bool(_ENDS_EARLY.search(text))


TEXTS = pieced().filter(lambda text: OPEN not in text and "</think>" not in text)
STRINGS = pieced().filter(lambda text: not ends_early(text))
NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, pieced()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(pieced(), inner, max_size=3)
    ),
    max_leaves=6,
)
LISTS = st.lists(JSON_VALUES, max_size=3)
OBJECTS = st.dictionaries(pieced(), JSON_VALUES, max_size=3)
