"""Mistakes planted in the parsers, each of which a quick run of the checks must notice."""

from __future__ import annotations

import re

import pytest

from tests.parsers.planting import (
    CALL,
    CLOSING,
    CUT,
    CUT_TEXT,
    ENDS,
    JUMP,
    TEXT,
    THINK,
    THOUGHT_ENDS,
    TWO_BLOCKS,
    Mistake,
    keeps_little,
    keeps_long_numbers,
    keeps_order,
    limits_nesting,
    planted,
    reads_once,
    reply_becomes,
    streams,
    thoughts_become,
    value_becomes,
)
from tests.parsers.replies import CLOSE, OPEN

MISTAKES = (
    Mistake(
        "beginnings of tags are not held back",
        "markup",
        "            return len(text) - at\n",
        "            return 0\n",
        TEXT,
    ),
    Mistake(
        "one character too few is held back",
        "markup",
        "max(map(len, tags)) - 1\n",
        "max(map(len, tags)) - 2\n",
        TEXT,
    ),
    Mistake(
        "the line break before a block is not held back",
        "tool_calls",
        "partial(self._rest, _LINE + BLOCK_OPEN, BLOCK_OPEN, start=self._at)",
        "partial(self._rest, BLOCK_OPEN, start=self._at)",
        TEXT,
    ),
    Mistake(
        "all line breaks before a block are taken off",
        "tool_calls",
        "before.removesuffix(_LINE)",
        "before.rstrip(_LINE)",
        TEXT,
    ),
    Mistake(
        "what is held back is not flushed",
        "tool_calls",
        '            self._text(tags.get(self._step, "") + self._rest[self._at :])\n',
        "            pass\n",
        ENDS,
    ),
    Mistake(
        "a closing tag ends a value whatever follows",
        "tool_calls",
        "        if any(self._rest.startswith(tag, self._at) for tag in _AFTER_VALUE):",
        "        if True:",
        CLOSING,
    ),
    Mistake(
        "what follows a closing tag is not waited for",
        "tool_calls",
        "        elif self._may_become(_AFTER_VALUE):\n            return False\n",
        "",
        value_becomes("s", "a", '"a"'),
    ),
    Mistake(
        "the white space behind such a tag is lost",
        "tool_calls",
        "self._value(PARAMETER_CLOSE + self._stray.white())",
        "self._value(PARAMETER_CLOSE)",
        value_becomes("s", "a</parameter> \n b", '"a</parameter> \\n b"'),
    ),
    Mistake(
        "values are stripped",
        "tool_calls",
        "            self._argument(self._call.feed_value(text))",
        "            self._argument(self._call.feed_value(text.strip()))",
        value_becomes("s", "\n a\n", '"\\n a\\n"'),
    ),
    Mistake(
        "a call is closed by counting braces",
        "tool_calls",
        "            self._argument(self._call.end())\n",
        """            sent = "".join(each.json for each in self._events if hasattr(each, "json"))
            self._argument("" if "}" in sent else self._call.end())
""",
        value_becomes("s", "}", '"}"'),
    ),
    Mistake(
        "a call without arguments has none at all",
        "tool_calls",
        'return "}" if self._names else "{}"',
        'return "}" if self._names else ""',
        TWO_BLOCKS,
    ),
    Mistake(
        "a second block is not looked for",
        "tool_calls",
        "        found = self._rest.find(BLOCK_OPEN, self._at)\n",
        "        found = -1 if self._calls else self._rest.find(BLOCK_OPEN, self._at)\n",
        TWO_BLOCKS,
    ),
    Mistake(
        "the text behind a block is lost",
        "tool_calls",
        "        if text:\n            self._events.append(Text(text))\n",
        "        if text and not self._calls:\n            self._events.append(Text(text))\n",
        TWO_BLOCKS,
    ),
    Mistake(
        "a call that was cut off is complete",
        "tool_calls",
        "self._end_call(complete=False)",
        "self._end_call(complete=True)",
        CUT,
    ),
    Mistake(
        "a number that was cut off is passed on",
        "tool_calls",
        " and self._step == self._after_value:\n",
        " and self._step in (self._after_value, self._in_value):\n",
        CUT,
    ),
    Mistake(
        "the last of two parameters of one name",
        "tool_calls",
        "        if name in self._names:\n",
        "        if False:\n",
        reply_becomes(
            f'{OPEN}<invoke name="f"><parameter name="s">a</parameter>'
            f'<parameter name="s">b</parameter></invoke>{CLOSE}',
            "",
            '{"s": "a"}',
        ),
    ),
    Mistake(
        "calls keep the number of the first",
        "tool_calls",
        "        self._calls += 1\n",
        "        self._calls += 0\n",
        TWO_BLOCKS,
    ),
    Mistake(
        "the buffer is never shortened",
        "tool_calls",
        "        self._rest = self._rest[self._at :] + text\n        self._at = 0\n",
        "        self._rest += text\n",
        keeps_little,
    ),
    Mistake(
        "a block that began with text keeps its tag to itself",
        "tool_calls",
        "        return opening + self.white() + text\n",
        "        return self.white() + text\n",
        reply_becomes(f"a\n{OPEN} b {CLOSE}", f"a\n{OPEN} b {CLOSE}"),
    ),
    Mistake(
        "white space between elements is text",
        "tool_calls",
        "        if not self.seen and (not text or text.isspace()):",
        "        if not text:",
        value_becomes("s", "a", '"a"'),
    ),
    Mistake(
        "names have to be in double quotes",
        "tool_calls",
        """|([^\\s<>"']+))""",
        ")",
        reply_becomes(f"{OPEN}<invoke name=f></invoke>{CLOSE}", "", "{}"),
    ),
    Mistake(
        "names without quotes run to the first >",
        "tool_calls",
        """|([^\\s<>"']+))""",
        "|([^>]+))",
        reply_becomes(f"{OPEN}<invoke name={CALL}", f"{OPEN}<invoke name=", "{}"),
    ),
    Mistake(
        "a name ends only where > follows its quote at once",
        "tool_calls",
        """|([^\\s<>"']+))[^\\S\\n]*>""",
        """|([^\\s<>"']+))>""",
        reply_becomes(
            f'{OPEN}<invoke name="f" ><parameter name="s">', "", '{"s": "', complete=False
        ),
    ),
    Mistake(
        "a name ends at its first quote",
        "tool_calls",
        '"([^\\n]*?)"',
        '"([^\\n"]*)"',
        reply_becomes(f'{OPEN}<invoke name="a"b"></invoke>{CLOSE}', "", "{}", name='a"b'),
    ),
    Mistake(
        "a beginning of a tag behind text in a block is dropped",
        "tool_calls",
        "        is_text = self._step == self._outside or self._stray.seen\n",
        "        is_text = self._step == self._outside or self._stray.is_literal\n",
        CUT_TEXT,
    ),
    Mistake(
        "what is held back of a value is text",
        "tool_calls",
        "        elif is_text and self._step != self._in_value:\n",
        "        elif is_text:\n",
        reply_becomes(
            f'{OPEN}<invoke name="f">a <parameter name="s">b</par',
            "a ",
            '{"s": "b',
            complete=False,
        ),
    ),
    Mistake(
        "keys by a set",
        "tool_calls",
        'self._before = ("{" if not self._names else ", ") + _quoted(name) + ": "',
        """self._before = ("{" if not self._names else ", ") + _quoted(
            next(iter({name, *self._names}))
        ) + ": \"""",
        keeps_order,
    ),
    Mistake(
        "None is null",
        "values",
        "        self._allowed = allowed\n",
        "        self._allowed = allowed = Allowed(allowed.types - {STRING} or allowed.types)\n",
        value_becomes("u", "None", '"None"'),
    ),
    Mistake(
        "a string that spells null is null",
        "values",
        "None if allowed.types == {STRING} else _Undecided(allowed.types)",
        "_Undecided(allowed.types | {NULL})\n"
        "        self._allowed = Allowed(allowed.types | {NULL}, allowed.strings)",
        value_becomes("s", "null", '"null"'),
    ),
    Mistake(
        "nullable is null",
        "values",
        '        text = ""\n        if self._undecided is not None:\n',
        "        text = \"\"\n        if NULL in self._allowed.types:\n            return 'null'\n"
        "        if self._undecided is not None:\n",
        value_becomes("u", "Alice", '"Alice"'),
    ),
    Mistake(
        "a string waits for its end",
        "values",
        "        if STRING not in self._types:\n            return True\n",
        "        return True\n",
        reply_becomes(
            f'{OPEN}<invoke name="f"><parameter name="u">ab', "", '{"u": "ab', complete=False
        ),
    ),
    Mistake(
        "strings do not stream",
        "values",
        "        if self._undecided is None:\n            return self._string(text)\n        if",
        """        if self._undecided is None:
            self._held = getattr(self, "_held", "") + text
            return ""
        if""",
        streams,
    ),
    Mistake(
        "pieces are escaped as if each were a string",
        "values",
        'opening = "" if self._opened else \'"\'',
        "opening = '\"'",
        value_becomes("s", "ab", '"ab"'),
    ),
    Mistake(
        "surrogates are passed on",
        "values",
        "_UNSAFE = re.compile(r'[\\x00-\\x1f\"\\\\\\ud800-\\udfff]')",
        "_UNSAFE = re.compile(r'[\\x00-\\x1f\"\\\\]')",
        value_becomes("s", "\ud800", '"\\ud800"'),
    ),
    Mistake(
        "quotes are not escaped",
        "values",
        "_UNSAFE = re.compile(r'[\\x00-\\x1f\"\\\\\\ud800-\\udfff]')",
        "_UNSAFE = re.compile(r'[\\x00-\\x1f\\\\\\ud800-\\udfff]')",
        value_becomes("s", 'a"b', '"a\\"b"'),
    ),
    Mistake(
        "a number goes through Python's",
        "values",
        "    if NUMBER in types and _NUMBER.fullmatch(bare):\n        return bare\n",
        "    if NUMBER in types:\n        return str(int(float(bare)))\n",
        value_becomes("n", "inf", '"inf"'),
    ),
    Mistake(
        "a long number goes through Python's",
        "values",
        "parse_int=str, parse_float=str, ",
        "",
        keeps_long_numbers,
    ),
    Mistake(
        "an integer is cut off at its point",
        "values",
        r"(?:\.0+)?",
        r"(?:\.[0-9]+)?",
        value_becomes("i", "2.5", '"2.5"'),
    ),
    Mistake(
        "NaN is JSON",
        "values",
        ", parse_constant=_refuse",
        "",
        value_becomes("o", '{"a": NaN}', '"{\\"a\\": NaN}"'),
    ),
    Mistake(
        "line breaks in JSON are not mended",
        "values",
        "_STRING.sub(_mended, text) if _UNSAFE_IN_JSON.search(text) else text",
        "text",
        value_becomes("o", '{"a": "\n"}', '{"a": "\\n"}'),
    ),
    Mistake(
        "an enum's string is read as JSON",
        "values",
        "    if text in allowed.strings:\n        return None\n",
        "",
        value_becomes("e", "1", '"1"'),
    ),
    Mistake(
        "white space in a word is overlooked",
        "values",
        "        self._bare = text[: len(bare) + 1]\n",
        "        self._bare = bare\n",
        reply_becomes(
            f'{OPEN}<invoke name="f"><parameter name="w">t r', "", '{"w": "t r', complete=False
        ),
    ),
    Mistake(
        "nesting is as deep as the stack allows",
        "values",
        "    if _is_nested_too_deep(mended):\n        return None\n",
        "",
        limits_nesting,
    ),
    Mistake(
        "brackets in strings are nesting",
        "values",
        '_STRING.sub("", text)',
        "text",
        value_becomes("o", '{"a": "' + "[" * 201 + '"}', '{"a": "' + "[" * 201 + '"}'),
    ),
    Mistake(
        "branches of the root say nothing",
        "schema",
        'for keyword in ("anyOf", "oneOf"))\n',
        "for keyword in ())\n",
        value_becomes("x", "null", '"null"'),
    ),
    Mistake(
        "a branch that does not describe a parameter leaves it open",
        "schema",
        "[each for each in said if each is not None]",
        "[each or ANYTHING for each in said]",
        value_becomes("x", "5", '"5"'),
    ),
    Mistake(
        "patterns of names say nothing",
        "schema",
        'mapped(schema, "patternProperties").items()',
        "()",
        value_becomes("p_a", "5", '"5"'),
    ),
    Mistake(
        "escapes in references are not read",
        "schema_parts",
        "unquote(reference)",
        "reference",
        value_becomes("r", "5", '"5"'),
    ),
    Mistake(
        "references are followed again and again",
        "schema",
        "        if id(schema) not in self._read:\n",
        "        if True:\n",
        reads_once,
    ),
    Mistake(
        "reasoning ends at another model's token",
        "reasoning",
        "(at, tag) for tag in (THINK_CLOSE, BLOCK_OPEN) if",
        '(at, tag) for tag in (THINK_CLOSE, BLOCK_OPEN, "<tool_call>") if',
        THINK,
    ),
    Mistake(
        "</think> is preferred to an earlier block",
        "reasoning",
        "at, tag = min(",
        "at, tag = max(",
        JUMP,
    ),
    Mistake(
        "reasoning does not end at a block",
        "reasoning",
        "(at, tag) for tag in (THINK_CLOSE, BLOCK_OPEN) if",
        "(at, tag) for tag in (THINK_CLOSE,) if",
        JUMP,
    ),
    Mistake(
        "the line break before </think> is not held back",
        "reasoning",
        "partial(text, *tags, *(_LINE + tag for tag in tags))",
        "partial(text, *tags)",
        THINK,
    ),
    Mistake(
        "reasoning is stripped",
        "reasoning",
        "text[:at].removesuffix(_LINE)",
        "text[:at].strip()",
        thoughts_become(" a \n\n</think>b", " a \n", "b"),
    ),
    Mistake(
        "<think> stays",
        "reasoning",
        "        if bare.startswith(THINK_OPEN):\n",
        "        if False:\n",
        THINK,
    ),
    Mistake(
        "only one line break is taken off behind </think>",
        "reasoning",
        '_GAP = "\\n\\n"',
        '_GAP = "\\n"',
        THINK,
    ),
    Mistake(
        "held-back reasoning is not flushed",
        "reasoning",
        'return Parts(rest, "") if self._inside else Parts("", rest)',
        'return Parts("", "")',
        THOUGHT_ENDS,
    ),
)
CHECKS = {id(mistake.check): mistake for mistake in MISTAKES}


def test_each_mistake_has_a_name():
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda each: re.sub(r"\W+", "_", each.name))
def test_a_planted_mistake_is_noticed(mistake):
    with (
        planted(mistake.file, mistake.right, mistake.wrong) as parsers,
        pytest.raises((AssertionError, ValueError, OverflowError)),
    ):
        mistake.check(parsers)


@pytest.mark.parametrize(
    "mistake", CHECKS.values(), ids=lambda each: re.sub(r"\W+", "_", each.name)
)
def test_the_source_as_it_is_passes(mistake):
    with planted("", "", "") as parsers:
        mistake.check(parsers)
