"""Replies that say what a test wants: a grammar leaves the model no choice after its reasoning."""

from __future__ import annotations

import re
from typing import Any

from tests.server.test_chat import joined, whole

Reply = dict[str, Any]


def reply(client: Any, text: str, *, stream: bool, **options: Any) -> Reply:
    """The reply whose text after `</think>` is `text`, put together if it is streamed."""
    found = start(client, text, stream=stream, **options)
    return joined(found) if stream else whole(found)


def both(client: Any, text: str, **options: Any) -> Reply:
    """The same reply with and without streaming, which must not differ."""
    at_once = reply(client, text, stream=False, **options)
    assert reply(client, text, stream=True, **options) == at_once
    return at_once


def start(client: Any, text: str, **options: Any) -> Any:
    """What the client returns for such a request."""
    extra = {"regex": pattern(text), **options.pop("extra_body", {})}
    return client.chat.completions.create(
        model="tiny-m2",
        messages=[{"role": "user", "content": "Hello!"}],
        extra_body=extra,
        **{"temperature": 0, "max_tokens": 1000, **options},
    )


def pattern(text: str) -> str:
    """The regular expression of exactly this text, as the grammar backend reads it."""
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    if character == "\n":
        return "\\n"
    return character if character.isalnum() or character in " _<>\"'/:=" else re.escape(character)
