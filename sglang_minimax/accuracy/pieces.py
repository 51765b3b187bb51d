"""The chunks of a streamed chat reply joined to one."""

from __future__ import annotations

from typing import Any


class Pieces:
    """Collects chunks of `openai`'s client. finish_reason and usage: None until they have come.

    A name that comes twice is joined as other text is, so it is no longer one of a tool.
    """

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict[str, str]] = {}
        self.finish_reason: str | None = None
        self.usage: Any = None

    def add(self, chunk: Any) -> None:
        """One more chunk."""
        self.usage = chunk.usage or self.usage
        for choice in chunk.choices:
            self.finish_reason = choice.finish_reason or self.finish_reason
            delta = choice.delta
            self._text.append(delta.content or "")
            self._reasoning.append(getattr(delta, "reasoning_content", None) or "")
            for piece in delta.tool_calls or ():
                call = self._calls.setdefault(piece.index, {"name": "", "arguments": ""})
                call["name"] += piece.function.name or ""
                call["arguments"] += piece.function.arguments or ""

    @property
    def text(self) -> str:
        """The content so far."""
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "".join(self._reasoning)

    def calls(self) -> list[dict[str, str]]:
        """The calls by their index: name, and arguments as the text that came."""
        return [call for _, call in sorted(self._calls.items())]
