"""Mistakes in what reads values and schemas."""

from __future__ import annotations

from tests.parsers.planting import (
    Mistake,
    keeps_long_numbers,
    limits_nesting,
    makes_little,
    reads_once,
    reply_becomes,
    streams,
    value_becomes,
)
from tests.parsers.replies import OPEN

IN_VALUES = (
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
        "        if key not in self._read:\n",
        "        if True:\n",
        reads_once,
    ),
    Mistake(
        "numbers have no capital E",
        "values",
        '"0123456789+-.eE"',
        '"0123456789+-.e"',
        value_becomes("m", "1E5", "1E5"),
    ),
    Mistake(
        "white space is taken off what may be an enum's string",
        "values",
        "    if text in allowed.strings:\n",
        "    if text.strip() in allowed.strings:\n",
        value_becomes("l", " null ", "null"),
    ),
    Mistake(
        "a bracket may always be of what is allowed",
        "values",
        "        return kind in self._types and self",
        "        return self",
        reply_becomes(
            f'{OPEN}<invoke name="f"><parameter name="u">{{', "", '{"u": "{', complete=False
        ),
    ),
    Mistake(
        "what follows a bracket is waited for",
        "values",
        "self._begins(_CONTAINER_SO_FAR, new)",
        "True",
        reply_becomes(
            f'{OPEN}<invoke name="f"><parameter name="any">[pack',
            "",
            '{"any": "[pack',
            complete=False,
        ),
    ),
    Mistake(
        "digits and points are a number",
        "values",
        "        return self._begins(_NUMBER_SO_FAR, new)\n",
        "        return True\n",
        reply_becomes(
            f'{OPEN}<invoke name="f"><parameter name="m">1.2.3', "", '{"m": "1.2.3', complete=False
        ),
    ),
    Mistake(
        "what is held back is joined with each piece",
        "values",
        "        self._pieces.append(new)\n",
        '        self._pieces = ["".join(self._pieces) + new]\n',
        makes_little,
    ),
    Mistake(
        "what is held back is joined at each piece",
        "values",
        "        self._pieces.append(new)\n",
        "        self._pieces.append(new)\n        self.text()\n",
        makes_little,
    ),
    Mistake(
        "patterns of names match from the beginning",
        "schema",
        "pattern.search(name)",
        "pattern.match(name)",
        value_becomes("some_text", "5", '"5"'),
    ),
    Mistake(
        "a digit in a name may be of any script",
        "schema",
        "re.compile(pattern, re.ASCII)",
        "re.compile(pattern)",
        value_becomes("n٣", "5", "5"),
    ),
)
