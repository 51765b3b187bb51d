"""The classes behind SGLang's reasoning parsers `minimax` and `minimax-append-think`."""

from __future__ import annotations

from typing import Any

from sglang.srt.parser.reasoning_parser import BaseReasoningFormatDetector, StreamingParseResult

from sglang_minimax.parsers.continued import text_of
from sglang_minimax.parsers.markup import BLOCK_OPEN, THINK_CLOSE, THINK_OPEN
from sglang_minimax.parsers.reasoning import Parts, ReasoningParser

#: What ends a turn of MiniMax-M2.
TURN_CLOSE = "[e~["


class MinimaxDetector(BaseReasoningFormatDetector):
    """Reasoning of M2.x: a reply begins inside `<think>`."""

    # Of the base class, which does not declare them.
    _in_reasoning: bool
    _force_nonempty_content: bool
    stripped_think_start: bool

    def __init__(
        self,
        stream_reasoning: bool = True,
        force_reasoning: bool = True,
        continue_final_message: bool = False,
        previous_content: Any = "",
        force_nonempty_content: bool = False,
    ) -> None:
        super().__init__(
            THINK_OPEN,
            THINK_CLOSE,
            # For --enable-strict-thinking; requests with a grammar have it anyway.
            think_excluded_tokens=[BLOCK_OPEN, TURN_CLOSE],
            force_reasoning=force_reasoning,
            stream_reasoning=stream_reasoning,
            tool_start_token=BLOCK_OPEN,
            continue_final_message=continue_final_message,
            previous_content=text_of(previous_content),
            thinks_internally=True,
            reasoning_default="always",
            force_nonempty_content=force_nonempty_content,
        )
        self._parser = ReasoningParser(inside=self._in_reasoning)
        # Held back where reasoning is not streamed; else what may have to be the content as well.
        self._thoughts: list[str] = []

    def detect_and_parse(self, text: str) -> StreamingParseResult:
        """A whole reply."""
        parser = ReasoningParser(inside=self._in_reasoning)
        found = parser.feed(text) + parser.finish()
        return self._maybe_apply_force_nonempty_content(_reasoning_result(found))

    def parse_streaming_increment(self, new_text: str) -> StreamingParseResult:
        """More of a reply."""
        found = self._parser.feed(new_text)
        self._in_reasoning = self._parser.is_thinking
        if found.content:
            self._force_nonempty_content = False
        if self.stream_reasoning:
            if self._force_nonempty_content:
                self._thoughts.append(found.reasoning)
            return _reasoning_result(found)
        self._thoughts.append(found.reasoning)
        if self._in_reasoning or self._force_nonempty_content:
            return StreamingParseResult()
        return _reasoning_result(Parts(self._taken_thoughts(), found.content))

    def finish(self) -> StreamingParseResult:
        """The reply has ended."""
        rest = self._parser.finish()
        thoughts = self._taken_thoughts()
        if self._force_nonempty_content and not rest.content:
            # The thought is all there is, so it is the content. What has been streamed of it as
            # reasoning cannot be taken back and comes a second time, as in SGLang's base class:
            # who sets the option reads the content and counts on it.
            return StreamingParseResult(normal_text=thoughts + rest.reasoning)
        if self.stream_reasoning:
            return _reasoning_result(rest)
        return _reasoning_result(Parts(thoughts, "") + rest)

    def _taken_thoughts(self) -> str:
        thoughts, self._thoughts = "".join(self._thoughts), []
        return thoughts


class MinimaxAppendThinkDetector(MinimaxDetector):
    """Everything is content, with the `<think>` that the chat template has opened put before it.

    Not before the rest of a message: the reply goes on in the middle of it.
    """

    def detect_and_parse(self, text: str) -> StreamingParseResult:
        """A whole reply."""
        return StreamingParseResult(normal_text=self._opening() + text)

    def parse_streaming_increment(self, new_text: str) -> StreamingParseResult:
        """More of a reply."""
        return StreamingParseResult(normal_text=self._opening() + new_text)

    def finish(self) -> StreamingParseResult:
        """The reply has ended; nothing was held back."""
        return StreamingParseResult()

    def _opening(self) -> str:
        is_begun = self.stripped_think_start or self.previous_content
        opening = "" if is_begun else THINK_OPEN
        self.stripped_think_start = True
        return opening


def _reasoning_result(parts: Parts) -> StreamingParseResult:
    return StreamingParseResult(normal_text=parts.content, reasoning_text=parts.reasoning)
