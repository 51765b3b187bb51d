"""What SGLang's chat handler does to a reply besides parsing it, where it would lose something."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

from sglang_minimax.parsers.markup import THINK_CLOSE
from sglang_minimax.patches.parsers import REASONING_NAMES, TOOL_CALL_NAME


def keep_the_reason_of_a_cut(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `OpenAIServingChat._process_tool_calls(text, tools, finish_reason, ...)`.

    Without streaming SGLang says `tool_calls` for every reply that holds a call, also where the
    reply ended inside of it; with streaming it does not. A client must not run such a call.
    """

    @functools.wraps(original)
    def _process_tool_calls(self: Any, *passed: Any, **named: Any) -> Any:
        if self.tool_call_parser != TOOL_CALL_NAME:
            return original(self, *passed, **named)
        return process(self, *passed, **named)

    def process(
        handler: Any, text: str, tools: Any, finish_reason: Any, *rest: Any, **named: Any
    ) -> Any:
        before = dict(finish_reason or {})
        result = original(handler, text, tools, finish_reason, *rest, **named)
        if before and result.tool_calls and not _is_json(result.tool_calls[-1].function.arguments):
            finish_reason.update(before)
        return result

    return _process_tool_calls


def _is_json(text: str | None, parse_int: Callable[[str], Any] = str) -> bool:
    """Numbers may have any number of digits, unless `parse_int` is the one that Python has."""
    try:
        json.loads(text or "", parse_int=parse_int)
    except (ValueError, RecursionError):
        return False
    return True


def leave_cut_calls_out(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `AnthropicServing._convert_response(response)`.

    A call that was cut off has no JSON for a `tool_use` block, and SGLang makes its input `{}`: a
    client would run the tool without arguments. Without the block nothing else would tell that the
    reply is not a finished one: SGLang says `end_turn` for stop strings and aborts.
    """

    @functools.wraps(original)
    def _convert_response(self: Any, *passed: Any, **named: Any) -> Any:
        if self.openai_serving_chat.tool_call_parser != TOOL_CALL_NAME:
            return original(self, *passed, **named)
        return convert(self, *passed, **named)

    def convert(handler: Any, response: Any) -> Any:
        choice = response.choices[0] if response.choices else None
        is_cut = choice is not None and _take_cut_calls_out(choice.message)
        message = original(handler, response)
        if is_cut:
            _say_what_cut(message, choice)
        return message

    return _convert_response


def _take_cut_calls_out(message: Any) -> bool:
    """Leave only calls in a message that SGLang can read; whether there were others."""
    calls = message.tool_calls or []
    # SGLang reads them with Python's integers of up to 4300 digits, and ends in an exception else.
    whole = [call for call in calls if _is_json(call.function.arguments, parse_int=int)]
    if len(whole) == len(calls):
        return False
    message.tool_calls = whole or None
    return True


def _say_what_cut(message: Any, choice: Any) -> None:
    """Anthropic's stop reason of a reply of which a call was left out, where SGLang's is wrong."""
    if choice.finish_reason == "stop" and isinstance(choice.matched_stop, str):
        message.stop_reason, message.stop_sequence = "stop_sequence", choice.matched_stop
    elif choice.finish_reason == "abort":
        # Anthropic has no word for it, and each of its words is about how a reply came to an end.
        message.stop_reason = None


def keep_tags_in_the_text(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `OpenAIServingChat._patch_reasoning_skip_special_tokens(request)`.

    A tokenizer that counts `</think>` among its special tokens leaves it out of the text, and all
    of the reply would be reasoning. Requests with tools keep special tokens anyway.
    """

    @functools.wraps(original)
    def _patch_reasoning_skip_special_tokens(self: Any, *passed: Any, **named: Any) -> Any:
        result = original(self, *passed, **named)
        if self.reasoning_parser in REASONING_NAMES:
            keep(self, *passed, **named)
        return result

    def keep(handler: Any, request: Any) -> None:
        if request.skip_special_tokens and _is_special(handler.tokenizer_manager.tokenizer):
            request.skip_special_tokens = False

    return _patch_reasoning_skip_special_tokens


@functools.lru_cache(maxsize=4)
def _is_special(tokenizer: Any) -> bool:
    """Whether decoding without special tokens leaves `</think>` out."""
    if tokenizer is None:
        return False
    tokens = tokenizer.encode(THINK_CLOSE, add_special_tokens=False)
    return THINK_CLOSE not in tokenizer.decode(tokens, skip_special_tokens=True)
