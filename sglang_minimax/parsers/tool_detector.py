"""The class behind SGLang's tool-call parser `minimax-m2`.

SGLang makes one detector a reply. The text of a reply that is not streamed goes through the same
parser at once, so both ways give the same result.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import Any, Literal

from sglang.srt.entrypoints.openai.protocol import Tool, ToolChoice
from sglang.srt.function_call.base_format_detector import BaseFormatDetector
from sglang.srt.function_call.core_types import StreamingParseResult, ToolCallItem
from sglang.srt.runtime_context import get_context

from sglang_minimax.parsers.markup import BLOCK_CLOSE, BLOCK_OPEN
from sglang_minimax.parsers.tool_calls import (
    Arguments,
    CallBegins,
    CallEnds,
    Event,
    Text,
    ToolCallParser,
)

logger = logging.getLogger(__name__)


class MinimaxM2Detector(BaseFormatDetector):
    """Tool calls. `prev_tool_call_arr` stays empty: SGLang's repair after the fact has no place."""

    def __init__(self) -> None:
        super().__init__()
        self.bot_token = BLOCK_OPEN
        self.eot_token = BLOCK_CLOSE
        #: Calls whose closing tag never came, by their number in the reply; read by SGLang.
        self.incomplete_tool_call_indices: set[int] = set()
        self._parser: ToolCallParser | None = None
        self._names: frozenset[str] = frozenset()

    def has_tool_call(self, text: str) -> bool:
        """Whether the text may hold a call."""
        return BLOCK_OPEN in text

    def detect_and_parse(self, text: str, tools: list[Tool]) -> StreamingParseResult:
        """A whole reply: its text and its calls, each with all of its arguments."""
        parser = self._started(tools)
        found = self._gathered([*parser.feed(text), *parser.finish()])
        return found.result(whole=True)

    def parse_streaming_increment(self, new_text: str, tools: list[Tool]) -> StreamingParseResult:
        """More of a reply."""
        return self._gathered((self._parser or self._started(tools)).feed(new_text)).result()

    def finish(self, tools: list[Tool]) -> StreamingParseResult:
        """The reply has ended."""
        return self._gathered((self._parser or self._started(tools)).finish()).result()

    def get_structural_tag(
        self,
        tools: list[Tool] | None = None,
        tool_choice: ToolChoice | Literal["auto", "required"] = "auto",
        thinking_mode: bool = False,
        parallel_tool_calls: bool = True,
    ) -> Any:
        """Calls in the model's own format, as forced or strict tools have them; see the module.

        None where the grammar backend cannot have it; SGLang then forces calls as JSON. So it would
        after an exception, and our parser would be given that JSON.
        """
        if not self.supports_structural_tag():
            return None
        from sglang_minimax.parsers import structural_tag

        named = tool_choice.function.name if isinstance(tool_choice, ToolChoice) else None
        is_forced = named is not None or tool_choice == "required"
        functions = [
            structural_tag.Function(
                tool.function.name or "",
                tool.function.parameters,
                is_strict=is_forced or tool.function.strict,
            )
            for tool in tools or ()
            if named is None or tool.function.name == named
        ]
        build = structural_tag.forced if is_forced else structural_tag.strict
        try:
            tag = build(
                functions,
                only_one=named is not None or not parallel_tool_calls,
                # SGLang keeps the thought out of grammars where it has a parser for it. Without
                # one, a message to be continued must not be behind its thought: nobody tells us.
                with_thought=thinking_mode or not _setting("serving", "reasoning_parser"),
            )
            json.dumps(tag.model_dump(by_alias=True))  # as SGLang will
        except Exception as error:  # too deep, too long a number: the request must be refused
            logger.warning("The schemas of the tools have no grammar: %s", error)
            return structural_tag.refused()
        return tag

    def supports_structural_tag(self) -> bool:
        """Whether forced calls come in the model's own format; SGLang parses them accordingly."""
        return _setting("exec", "grammar_backend") in (None, "xgrammar")

    def structure_info(self) -> Any:
        """Of the tags of other grammar backends, which get none from us."""
        raise NotImplementedError

    def _started(self, tools: Iterable[Tool]) -> ToolCallParser:
        schemas = {
            tool.function.name: tool.function.parameters for tool in tools if tool.function.name
        }
        self._names = frozenset(schemas)
        self.incomplete_tool_call_indices.clear()
        self._parser = ToolCallParser(schemas)
        return self._parser

    def _gathered(self, events: Iterable[Event]) -> _Gathered:
        found = _Gathered()
        for event in events:
            if isinstance(event, Text):
                found.text.append(event.text)
            elif isinstance(event, CallBegins):
                self._warn_of_unknown(event.name)
                # Until it ends: an aborted stream never asks for the end.
                self.incomplete_tool_call_indices.add(event.index)
                found.calls.append((event.index, event.name, []))
            elif isinstance(event, CallEnds):
                if event.complete:
                    self.incomplete_tool_call_indices.discard(event.index)
            else:
                found.add(event)
        return found

    def _warn_of_unknown(self, name: str) -> None:
        if name not in self._names:
            logger.warning("The model calls %r, which the request does not declare", name)


class _Gathered:
    """What some events say; pieces of arguments are joined once."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.calls: list[tuple[int, str | None, list[str]]] = []

    def add(self, event: Arguments) -> None:
        """More arguments, of the call that has just begun or of one before."""
        if not self.calls or self.calls[-1][0] != event.index:
            self.calls.append((event.index, None, []))
        self.calls[-1][2].append(event.json)

    def result(self, *, whole: bool = False) -> StreamingParseResult:
        """As SGLang takes it. whole: name and arguments in one item, else the name comes first."""
        items = []
        for index, name, pieces in self.calls:
            arguments = "".join(pieces)
            if name is not None and not whole:
                items.append(ToolCallItem(tool_index=index, name=name, parameters=""))
                name = None
            if name is not None or arguments:
                items.append(ToolCallItem(tool_index=index, name=name, parameters=arguments))
        return StreamingParseResult(normal_text="".join(self.text), calls=items)


def _setting(namespace: str, name: str) -> Any:
    """A launch option, None outside of a server."""
    if not get_context().is_config_namespace_published(namespace):
        return None
    return get_context().config_leaf(name)
