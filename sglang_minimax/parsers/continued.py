"""The text of a message that a reply goes on with (`continue_final_message`). No SGLang."""

from __future__ import annotations

from typing import Any


def text_of(content: Any) -> str:
    """The text that SGLang puts at the end of the prompt, empty if there is none.

    content: a message's, a string, a list of parts (dicts or objects), or None. SGLang joins the
    texts of parts with spaces where the chat template takes strings, as MiniMax-M2's does.

    >>> text_of("a"), text_of([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
    ('a', 'a b')
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = (_field(part, "text") for part in content if _field(part, "type") in _TEXTS)
    return " ".join(text for text in texts if isinstance(text, str))


_TEXTS = ("text", "input_text")


def _field(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, dict) else getattr(part, name, None)
