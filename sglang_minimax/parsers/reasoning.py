"""A reply's reasoning apart from its content, in one pass while it arrives.

The chat template opens `<think>` itself, so a reply begins inside. Reasoning ends at `</think>`, or
where a block of tool calls opens, whichever comes first; the block belongs to the content. Taken
off is what the chat template puts around the two, and nothing else: the line break after `<think>`
and the one before `</think>`, and the two behind it. So a reply that a client sends back renders to
the text that the model wrote, which the KV cache still has.

What comes out does not depend on how the text is cut. No SGLang.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sglang_minimax.parsers.markup import BLOCK_OPEN, THINK_CLOSE, THINK_OPEN, partial

_LINE = "\n"
_GAP = "\n\n"


class Parts(NamedTuple):
    """More of a reply's reasoning, and more of its content."""

    reasoning: str
    content: str

    def __add__(self, other: object) -> Parts:
        if not isinstance(other, Parts):
            return NotImplemented
        return Parts(self.reasoning + other.reasoning, self.content + other.content)


class ReasoningParser:
    """Takes one reply apart."""

    def __init__(self, *, inside: bool = True) -> None:
        """inside: whether the reply begins inside of the reasoning; it may open it itself."""
        self._inside = inside
        self._rest = ""
        self._white: list[str] = []  # at the beginning
        self._step: Callable[[], Parts | None] = self._beginning

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next is reasoning."""
        return self._inside

    def feed(self, text: str) -> Parts:
        """More of the reply. Returns what is certain of it."""
        self._rest += text
        total = Parts("", "")
        while self._rest:
            found = self._step()
            if found is None:
                break
            total += found
        return total

    def finish(self) -> Parts:
        """The reply has ended. Returns what was held back."""
        rest, self._rest = "".join(self._white) + self._rest, ""
        self._white = []
        # Nothing but a line break of the template, or an opening tag.
        if self._step == self._gap or (self._step == self._beginning and THINK_OPEN in rest):
            return Parts("", "")
        return Parts(rest, "") if self._inside else Parts("", rest)

    # --- states: each takes text in, and returns None where it needs more ---

    def _beginning(self) -> Parts | None:
        """Some releases open the reasoning once more."""
        bare = self._rest.lstrip()
        self._white.append(self._rest[: len(self._rest) - len(bare)])
        self._rest = bare
        opening = THINK_OPEN + _LINE
        if len(bare) < len(opening) and opening.startswith(bare):
            return None
        if bare.startswith(THINK_OPEN):
            self._inside = True
            self._rest = bare.removeprefix(THINK_OPEN).removeprefix(_LINE)
        else:
            self._rest = "".join(self._white) + bare
        self._white = []
        self._step = self._reasoning if self._inside else self._content
        return Parts("", "")

    def _reasoning(self) -> Parts | None:
        text = self._rest
        at, tag = min(
            ((at, tag) for tag in (THINK_CLOSE, BLOCK_OPEN) if (at := text.find(tag)) >= 0),
            default=(-1, ""),
        )
        if at < 0:
            tags = (THINK_CLOSE, BLOCK_OPEN)
            held = partial(text, *tags, *(_LINE + tag for tag in tags))
            if held == len(text):
                return None
            self._rest = text[len(text) - held :]
            return Parts(text[: len(text) - held], "")
        reasoning = text[:at].removesuffix(_LINE)
        self._inside = False
        if tag == THINK_CLOSE:
            self._rest, self._step = text[at + len(tag) :], self._gap
        else:
            self._rest, self._step = text[len(reasoning) :], self._content
        return Parts(reasoning, "")

    def _gap(self) -> Parts | None:
        if _GAP.startswith(self._rest) and self._rest != _GAP:
            return None
        lines = len(self._rest[: len(_GAP)]) - len(self._rest[: len(_GAP)].lstrip(_LINE))
        self._rest, self._step = self._rest[lines:], self._content
        return Parts("", "")

    def _content(self) -> Parts | None:
        text, self._rest = self._rest, ""
        return Parts("", text)
