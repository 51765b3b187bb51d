"""A thought cannot go around the grammar of its reply.

SGLang lets a grammar begin behind `</think>`. A thought that opens a block of tool calls, or ends
the turn, would never get there: the reply is over and the grammar has not been asked. So while a
request with a grammar thinks, those tokens are not to be had; the model has to end its thought.

`--enable-strict-thinking` does so too, but for all requests. Here it is switched on for the objects
of one grammar: its copies, batches and rollbacks are then SGLang's own.

Where a message to be continued has ended its thought, there is none to wait for. SGLang takes all
that follows for one; the grammar would never begin, and the reply could not end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_minimax.parsers.continued import text_of
from sglang_minimax.parsers.markup import BLOCK_OPEN, THINK_CLOSE
from sglang_minimax.patches.parsers import REASONING_NAMES

_ENDS = "_minimax_ends_of_a_reply"
#: Where our reasoning parsers are. By name: other models need not import them.
_OURS = "sglang_minimax.parsers.reasoning_detector"


def know_what_ends_a_reply(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `ReasonerGrammarBackend.__init__`."""

    @functools.wraps(original)
    def __init__(
        self: Any,
        grammar_backend: Any,
        reasoning_parser: Any,
        tokenizer: Any,
        *rest: Any,
        **named: Any,
    ) -> None:
        original(self, grammar_backend, reasoning_parser, tokenizer, *rest, **named)
        if type(reasoning_parser.detector).__module__ == _OURS:
            setattr(self, _ENDS, ends_of_a_reply(tokenizer))

    return __init__


def keep_them_from_thoughts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `ReasonerGrammarBackend._make_grammar_object(grammar, reasoning)`."""

    @functools.wraps(original)
    def _make_grammar_object(self: Any, grammar: Any, *rest: Any, **named: Any) -> Any:
        made = original(self, grammar, *rest, **named)
        ends = getattr(self, _ENDS, ())
        if ends and grammar is not None and self.grammar_backend.is_support_token_filter:
            made.think_excluded_token_ids = [*(made.think_excluded_token_ids or ()), *ends]
            made.token_filter_fn = self.grammar_backend.set_token_filter
            if not made.enable_token_filter:
                made.max_think_tokens = -1  # SGLANG_MAX_THINK_TOKENS is for strict thinking
            made.enable_token_filter = True
        return made

    return _make_grammar_object


def begin_behind_a_finished_thought(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `OpenAIServingChat._process_messages(request, is_multimodal, *, ...)`."""

    @functools.wraps(original)
    def _process_messages(self: Any, request: Any, *rest: Any, **named: Any) -> Any:
        result = original(self, request, *rest, **named)
        if self.reasoning_parser in REASONING_NAMES and _continues_an_answer(request):
            result.require_reasoning = False
        return result

    return _process_messages


def _continues_an_answer(request: Any) -> bool:
    if not request.continue_final_message or not request.messages:
        return False
    last = request.messages[-1]
    return last.role == "assistant" and THINK_CLOSE in text_of(last.content)


def ends_of_a_reply(tokenizer: Any) -> list[int]:
    """Tokens with which a reply leaves its thought otherwise than by `</think>`.

    The block's tag is one token in MiniMax-M2's tokenizers. Where it is several, none of them can
    be kept from a thought, which may use them for other words; only the ends of a turn are then.
    """
    block = tokenizer.encode(BLOCK_OPEN, add_special_tokens=False)
    ends = {tokenizer.eos_token_id, *(getattr(tokenizer, "additional_stop_token_ids", None) or ())}
    return [*(block if len(block) == 1 else ()), *sorted(ends - {None})]
