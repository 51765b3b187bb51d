"""Cases of the tool-call suite, and what is true of the calls in a reply. Pure: no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_minimax.accuracy.errors import AccuracyError
from sglang_minimax.parsers.markup import BLOCK_CLOSE, BLOCK_OPEN, INVOKE_OPEN

Call = dict[str, Any]

#: What a reply's content holds where the server's parser has left a call in it.
MARKUP = (BLOCK_OPEN, BLOCK_CLOSE, INVOKE_OPEN)


@dataclass(frozen=True)
class Case:
    """What to ask, and the calls that are right, in order.

    expected: `{"name", "arguments"}`, the arguments as a JSON value. answer: what the content has
    to end in, None for anything.
    """

    id: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    expected: list[Call]
    category: str = ""
    answer: str | None = None


def load(path: Path) -> list[Case]:
    """The cases of a JSONL file. Raises AccuracyError with the first line that is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise AccuracyError(f"there is no file of cases {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise AccuracyError(f"the cases {path} cannot be read: {error}.") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise AccuracyError(f"{path} holds no case.")
    return [_case(str(i), line, f"line {n} of {path}") for i, (n, line) in enumerate(lines)]


def _case(identity: str, line: str, where: str) -> Case:
    try:
        row = json.loads(line)
    except ValueError:
        raise AccuracyError(f"{where} is no JSON; the cases are one object a line.") from None
    for name in ("messages", "tools", "expected"):
        found = row.get(name) if isinstance(row, dict) else None
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise AccuracyError(f"{where} has no {name!r}, a list of objects.")
    if not row["messages"]:
        raise AccuracyError(f"{where} has no message to ask.")
    offered = tool_schemas(row["tools"])
    if None in offered:
        raise AccuracyError(f"{where} has a tool without a name under 'function'.")
    for name, schema in offered.items():
        if why := _fault(schema):
            raise AccuracyError(f"{where} has parameters of {name} that are no JSON schema: {why}.")
    for call in row["expected"]:
        if call.get("name") not in offered or not isinstance(call.get("arguments"), dict):
            raise AccuracyError(
                f"{where} expects {call}; give the name of one of its tools and 'arguments', an "
                "object."
            )
    answer = row.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise AccuracyError(f"{where} has an 'answer' that is no text.")
    category = str(row.get("category", ""))
    return Case(identity, row["messages"], row["tools"], row["expected"], category, answer)


def _fault(schema: dict[str, Any]) -> str | None:
    """Why a value is no JSON schema, None if it is one."""
    import jsonschema

    try:
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        return str(error.message)
    return None


def tool_schemas(tools: Sequence[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """The schema of the arguments by the tool's name."""
    functions = [each.get("function") for each in tools]
    return {
        each.get("name"): each.get("parameters") or {}
        for each in (found if isinstance(found, dict) else {} for found in functions)
    }


def is_well_formed(case: Case, text: str, calls: Sequence[dict[str, str]]) -> bool:
    """Whether the calls can be carried out as they are.

    There is one where one is expected, each is of a tool that was offered, its arguments are JSON
    that fits the tool's schema, and no call is left as text in the content.
    """
    if case.expected and not calls:
        return False
    if any(mark in text for mark in MARKUP):
        return False
    schemas = tool_schemas(case.tools)
    return all(
        call["name"] in schemas and fits(call["arguments"], schemas[call["name"]]) for call in calls
    )


def fits(arguments: str, schema: dict[str, Any]) -> bool:
    """Whether a text is a JSON object that a JSON schema allows."""
    import jsonschema

    try:
        value = json.loads(arguments)
        jsonschema.validate(value, schema)
    except (ValueError, RecursionError, jsonschema.ValidationError):
        return False
    return isinstance(value, dict)


def is_correct(case: Case, text: str, calls: Sequence[dict[str, str]]) -> bool:
    """Whether the calls are the expected ones, in order, and the content ends as it has to."""
    if case.answer is not None and not text.rstrip().endswith(case.answer):
        return False
    try:
        found = [(call["name"], json.loads(call["arguments"])) for call in calls]
    except (ValueError, RecursionError):
        return False
    wanted = [(call["name"], call["arguments"]) for call in case.expected]
    return _canonical(found) == _canonical(wanted)


def _canonical(calls: list[tuple[str, Any]]) -> str:
    """Text that is the same for the same JSON: unlike in Python, 1 is not true, nor 1.0."""
    return json.dumps(calls, sort_keys=True)
