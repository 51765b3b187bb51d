"""The class behind SGLang's tool-call parser `minimax-m2`.

SGLang makes one detector a reply. The text of a reply that is not streamed goes through the same
parser at once, so both ways give the same result.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Literal

from sglang.srt.entrypoints.openai.protocol import Tool, ToolChoice
from sglang.srt.function_call.base_format_detector import BaseFormatDetector
from sglang.srt.function_call.core_types import StreamingParseResult, ToolCallItem
from sglang.srt.runtime_context import get_context

from sglang_minimax.parsers.markup import BLOCK_CLOSE, BLOCK_OPEN
from sglang_minimax.parsers.tool_calls import CallBegins, CallEnds, Event, Text, ToolCallParser

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
        result = self._result([*parser.feed(text), *parser.finish()])
        whole: dict[int, ToolCallItem] = {}
        for item in result.calls:
            if item.tool_index in whole:
                whole[item.tool_index].parameters += item.parameters
            else:
                whole[item.tool_index] = item
        return StreamingParseResult(normal_text=result.normal_text, calls=list(whole.values()))

    def parse_streaming_increment(self, new_text: str, tools: list[Tool]) -> StreamingParseResult:
        """More of a reply."""
        return self._result((self._parser or self._started(tools)).feed(new_text))

    def finish(self, tools: list[Tool]) -> StreamingParseResult:
        """The reply has ended."""
        return self._result((self._parser or self._started(tools)).finish())

    def get_structural_tag(
        self,
        tools: list[Tool] | None = None,
        tool_choice: ToolChoice | Literal["auto", "required"] = "auto",
        thinking_mode: bool = False,
        parallel_tool_calls: bool = True,
    ) -> Any:
        """Calls in the model's own format, as forced or strict tools have them; see the module.

        None where the grammar backend cannot have it; SGLang then forces calls as JSON.
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
        return build(
            functions,
            only_one=named is not None or not parallel_tool_calls,
            # SGLang keeps the thought out of grammars where it has a parser for it.
            with_thought=thinking_mode or not _setting("serving", "reasoning_parser"),
        )

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

    def _result(self, events: Iterable[Event]) -> StreamingParseResult:
        text: list[str] = []
        calls: list[ToolCallItem] = []
        for event in events:
            if isinstance(event, Text):
                text.append(event.text)
            elif isinstance(event, CallBegins):
                calls.append(self._call(event))
            elif isinstance(event, CallEnds):
                if not event.complete:
                    self.incomplete_tool_call_indices.add(event.index)
            elif calls and calls[-1].tool_index == event.index and not calls[-1].name:
                calls[-1].parameters += event.json
            else:
                calls.append(ToolCallItem(tool_index=event.index, parameters=event.json))
        return StreamingParseResult(normal_text="".join(text), calls=calls)

    def _call(self, event: CallBegins) -> ToolCallItem:
        if event.name not in self._names:
            logger.warning("The model calls %r, which the request does not declare", event.name)
        return ToolCallItem(tool_index=event.index, name=event.name, parameters="")


def _setting(namespace: str, name: str) -> Any:
    """A launch option, None outside of a server."""
    if not get_context().is_config_namespace_published(namespace):
        return None
    return get_context().config_leaf(name)
