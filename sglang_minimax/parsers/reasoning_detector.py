"""The classes behind SGLang's reasoning parsers `minimax` and `minimax-append-think`."""

from __future__ import annotations

from typing import Any

from sglang.srt.parser.reasoning_parser import BaseReasoningFormatDetector, StreamingParseResult

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
        # A message to be continued may have no content, or content in parts.
        previous = previous_content if isinstance(previous_content, str) else ""
        super().__init__(
            THINK_OPEN,
            THINK_CLOSE,
            # For --enable-strict-thinking; requests with a grammar have it anyway.
            think_excluded_tokens=[BLOCK_OPEN, TURN_CLOSE],
            force_reasoning=force_reasoning,
            stream_reasoning=stream_reasoning,
            tool_start_token=BLOCK_OPEN,
            continue_final_message=continue_final_message,
            previous_content=previous,
            thinks_internally=True,
            reasoning_default="always",
            force_nonempty_content=force_nonempty_content,
        )
        self._parser = ReasoningParser(inside=self._in_reasoning)
        self._thoughts = ""  # held back until the reasoning has ended, where it is not streamed

    def detect_and_parse(self, text: str) -> StreamingParseResult:
        """A whole reply."""
        parser = ReasoningParser(inside=self._in_reasoning)
        found = parser.feed(text) + parser.finish()
        return self._maybe_apply_force_nonempty_content(_reasoning_result(found))

    def parse_streaming_increment(self, new_text: str) -> StreamingParseResult:
        """More of a reply."""
        found = self._parser.feed(new_text)
        self._in_reasoning = self._parser.is_thinking
        if not self.stream_reasoning:
            self._thoughts += found.reasoning
            if self._parser.is_thinking:
                return StreamingParseResult()
            found, self._thoughts = Parts(self._thoughts, found.content), ""
        if self._force_nonempty_content:
            self._accumulated_reasoning += found.reasoning
            if found.content:
                self._force_nonempty_content = False
        return _reasoning_result(found)

    def finish(self) -> StreamingParseResult:
        """The reply has ended."""
        found = Parts(self._thoughts, "") + self._parser.finish()
        self._thoughts = ""
        if self._force_nonempty_content and not found.content:
            # What was streamed as reasoning is all there is: it is the content as well.
            return StreamingParseResult(normal_text=self._accumulated_reasoning + found.reasoning)
        return _reasoning_result(found)


class MinimaxAppendThinkDetector(MinimaxDetector):
    """Everything is content, with the `<think>` that the chat template has opened put before it."""

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
        opening = "" if self.stripped_think_start else THINK_OPEN
        self.stripped_think_start = True
        return opening


def _reasoning_result(parts: Parts) -> StreamingParseResult:
    return StreamingParseResult(normal_text=parts.content, reasoning_text=parts.reasoning)
