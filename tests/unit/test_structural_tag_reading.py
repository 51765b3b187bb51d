"""Whatever the grammar of forced and strict calls allows, our parser reads; no schema raises.

jsonschema judges the arguments.
"""

from __future__ import annotations

import json
import random
import time
from typing import Any

import jsonschema
import pytest
import torch
import xgrammar
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_minimax.parsers import string_format
from sglang_minimax.parsers.structural_tag import Function, forced, strict
from tests.grammars import VALUES, accepts, calls_in, invoke, matcher, of, one_parameter, reply

ENDINGS = ("</parameter>\n", '"', "}", "]", "</invoke>\n", "</minimax:tool_call>")


def is_text(piece: bytes) -> bool:
    return piece.decode(errors="ignore").encode() == piece


def wandered(tag: Any, seed: int) -> str:
    """A reply made of random tokens that the grammar allows; it inclines to come to an end."""
    choose = random.Random(seed)
    found, info = matcher(tag)
    mask = xgrammar.allocate_token_bitmask(1, info.vocab_size)
    vocabulary = info.decoded_vocab
    text = b""
    for _ in range(12_000):
        ending = choose.choice(ENDINGS)
        if choose.random() < 0.4 and found.accept_string(ending):
            text += ending.encode()
            continue
        found.fill_next_token_bitmask(mask)
        bits = mask[0].unsqueeze(1) >> torch.arange(32, dtype=torch.int32) & 1
        tokens = bits.flatten().nonzero().flatten().tolist()
        # A model that writes half a character gets a replacement for each byte; not here.
        token = choose.choice([each for each in tokens if is_text(vocabulary[each])])
        assert found.accept_token(token)
        if found.is_terminated():
            return text.decode()
        text += vocabulary[token]
    raise AssertionError(f"no end: {text[-200:]!r}")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "value",
    [schema for schema, _, _ in VALUES],
    ids=lambda v: json.dumps(v)[:40],
)
def test_whatever_is_allowed_is_valid(value: dict[str, Any], seed: int) -> None:
    schema = one_parameter(value)
    ((name, arguments),) = calls_in(wandered(of(schema), seed), {"f": schema})
    assert name == "f"
    jsonschema.validate(arguments, schema)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_allowed_is_valid_together(seed: int) -> None:
    values = {f"p{i}": value for i, (value, good, _) in enumerate(VALUES) if good}
    schemas = {
        name: {**one_parameter({}), "properties": values, "required": sorted(values)[::step]}
        for name, step in (("f", 2), ("g", 3))
    }
    functions = [Function(name, schema) for name, schema in schemas.items()]
    found = calls_in(wandered(forced(functions, only_one=False, with_thought=False), seed), schemas)
    assert found
    for name, arguments in found:
        jsonschema.validate(arguments, schemas[name])


@pytest.mark.parametrize("kind", [*string_format._FORMATS, *string_format._PATTERN_OF_FORMAT])
def test_no_format_has_markup(kind: str) -> None:
    tag = of(one_parameter({"type": "string", "format": kind}))
    for seed in range(20):
        ((_, arguments),) = calls_in(wandered(tag, seed), {"f": {}})
        assert "<" not in str(arguments["x"])


def test_a_mistake_would_be_seen() -> None:
    """xgrammar's own style lets white space into values."""
    schema = one_parameter({"enum": ["C", "F"]})
    theirs = xgrammar.get_model_structural_tag(
        "minimax", tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}],
        tool_choice="required", reasoning=False,
    )  # fmt: skip
    text = "\n</think>\n\n\n" + reply(invoke({"x": " C"}))
    assert accepts(theirs, text)
    ((_, arguments),) = calls_in(reply(invoke({"x": " C"})), {"f": schema})
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(arguments, schema)


# --- any schema ------------------------------------------------------------------------------

A = {"anyOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/A"}]}


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"x": A}, "$defs": {"A": A}},
        {"anyOf": [{"$ref": "#"}, {"$ref": "#"}], "properties": {"x": {}}},
        {"allOf": [{"$ref": "#"}, {"$ref": "#"}], "required": ["x"]},
    ],
    ids=["value", "parameters", "all"],
)
def test_a_schema_that_refers_to_itself_ends(schema: dict[str, Any]) -> None:
    begin = time.process_time()
    of(schema)
    # Observed 0.03 s; two branches to a depth of 32 would take hours.
    assert time.process_time() - begin < 2


KEYWORDS = st.sampled_from(
    [
        *("type", "properties", "required", "anyOf", "oneOf", "allOf", "enum", "const", "$ref"),
        *("items", "pattern", "minLength", "maxLength", "format", "additionalProperties", "$defs"),
    ]
)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats()
    | st.sampled_from(["string", "object", "#", "#/$defs/x", "x", "(", "[", "a.*"]) | st.text()
)  # fmt: skip
JUNK = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYWORDS | st.text(), inner),
    max_leaves=25,
)


@settings(max_examples=300, deadline=None)
@given(JUNK)
def test_no_schema_raises(schema: Any) -> None:
    """SGLang takes an exception for a request for JSON, which our parser would be given."""
    for with_strict in (forced, strict):
        tag = with_strict([Function("f", schema)], only_one=False, with_thought=False)
        json.dumps(tag.model_dump(by_alias=True))
