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
    def _process_tool_calls(
        self: Any, text: str, tools: Any, finish_reason: dict[str, Any], *rest: Any, **named: Any
    ) -> Any:
        before = dict(finish_reason)
        result = original(self, text, tools, finish_reason, *rest, **named)
        ours = self.tool_call_parser == TOOL_CALL_NAME
        if ours and result.tool_calls and not _is_json(result.tool_calls[-1].function.arguments):
            finish_reason.update(before)
        return result

    return _process_tool_calls


def _is_json(text: str | None) -> bool:
    try:
        # Numbers may have any number of digits.
        json.loads(text or "", parse_int=str)
    except (ValueError, RecursionError):
        return False
    return True


def leave_cut_calls_out(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `AnthropicServing._convert_response(response)`.

    A call that was cut off has no JSON for a `tool_use` block, and SGLang makes its input `{}`: a
    client would run the tool without arguments. The stop reason says that the reply was cut.
    """

    @functools.wraps(original)
    def _convert_response(self: Any, response: Any) -> Any:
        if self.openai_serving_chat.tool_call_parser == TOOL_CALL_NAME and response.choices:
            message = response.choices[0].message
            calls = message.tool_calls or []
            whole = [call for call in calls if _is_json(call.function.arguments)]
            if len(whole) < len(calls):
                message.tool_calls = whole or None
        return original(self, response)

    return _convert_response


def keep_tags_in_the_text(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `OpenAIServingChat._patch_reasoning_skip_special_tokens(request)`.

    A tokenizer that counts `</think>` among its special tokens leaves it out of the text, and all
    of the reply would be reasoning. Requests with tools keep special tokens anyway.
    """

    @functools.wraps(original)
    def _patch_reasoning_skip_special_tokens(self: Any, request: Any) -> None:
        original(self, request)
        if self.reasoning_parser not in REASONING_NAMES or not request.skip_special_tokens:
            return
        if _is_special(self.tokenizer_manager.tokenizer):
            request.skip_special_tokens = False

    return _patch_reasoning_skip_special_tokens


@functools.lru_cache(maxsize=4)
def _is_special(tokenizer: Any) -> bool:
    """Whether decoding without special tokens leaves `</think>` out."""
    if tokenizer is None:
        return False
    tokens = tokenizer.encode(THINK_CLOSE, add_special_tokens=False)
    return THINK_CLOSE not in tokenizer.decode(tokens, skip_special_tokens=True)
