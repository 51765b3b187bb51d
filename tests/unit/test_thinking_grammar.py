"""A thought cannot leave the grammar of its request."""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.constrained.grammar_manager import GrammarManager
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarBackend
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
from sglang.srt.parser.reasoning_parser import ReasoningParser

from sglang_minimax.parsers.reasoning_detector import MinimaxAppendThinkDetector, MinimaxDetector
from sglang_minimax.patches.thinking_grammar import (
    begin_behind_a_finished_thought,
    ends_of_a_reply,
)
from tests.grammars import EOS, TWO, backend, of, tokenizer


def token(text: str) -> int:
    (found,) = tokenizer().encode(text, add_special_tokens=False)
    return int(found)


BLOCK, CLOSE, LETTER = "<minimax:tool_call>", "</think>", "a"


def grammar(of_backend: ReasonerGrammarBackend, tag: Any = None, reasoning: bool = True) -> Any:
    key = json.dumps((tag or of(TWO)).model_dump(by_alias=True))
    return of_backend._init_value_dispatch(("structural_tag", key), reasoning)


def allowed(of_grammar: Any, *tokens: int, row: int = 0) -> list[bool]:
    mask = of_grammar.allocate_vocab_mask(len(tokenizer()), row + 1, "cpu")
    of_grammar.fill_vocab_mask(mask, row)
    assert torch.all(mask[:row] == -1)  # other rows are other requests
    return [bool(int(mask[row, each // 32]) >> each % 32 & 1) for each in tokens]


def jumps() -> tuple[int, ...]:
    assert tokenizer().eos_token_id == EOS
    return token(BLOCK), EOS, token(CLOSE), token(LETTER)


@pytest.mark.parametrize("parser", ["minimax", "minimax-append-think"])
def test_a_thought_cannot_jump(parser: str) -> None:
    assert issubclass(MinimaxAppendThinkDetector, MinimaxDetector)
    found = grammar(backend(parser))
    for each in (found, found.copy()):
        assert allowed(each, *jumps(), row=2) == [False, False, True, True]
    found.accept_token(token(LETTER))
    found.accept_token(token(CLOSE))
    # Behind the thought the grammar has the word.
    assert allowed(found, *jumps()) == [True, False, False, False]
    found.rollback(1)
    assert allowed(found, *jumps()) == [False, False, True, True]
    found.rollback(1)
    assert allowed(found.copy(), *jumps()) == [False, False, True, True]


def test_a_request_that_does_not_think_has_its_grammar_at_once() -> None:
    assert allowed(grammar(backend(), reasoning=False), *jumps()) == [True, False, False, False]


def test_from_the_cache_as_when_new() -> None:
    of_backend = backend()
    of_backend.set_cache(("structural_tag", "k"), grammar(of_backend).copy())
    found, hit = of_backend.get_cached_or_future_value(("structural_tag", "k"), True)
    assert hit
    assert allowed(found, *jumps()) == [False, False, True, True]


def test_other_requests_and_parsers_are_left_alone() -> None:
    assert backend().init_strict_reasoning_grammar(True) is None
    other = ReasonerGrammarBackend(
        backend().grammar_backend, ReasoningParser("deepseek-r1"), tokenizer()
    )
    assert allowed(grammar(other), *jumps()) == [True, True, True, True]  # they may jump


def test_without_the_patch_a_thought_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    make = ReasonerGrammarBackend._make_grammar_object
    monkeypatch.setattr(ReasonerGrammarBackend, "_make_grammar_object", make.__wrapped__)
    assert allowed(grammar(backend()), *jumps()) == [True, True, True, True]


def test_strict_thinking_masks_the_same() -> None:
    strict_backend = backend(strict_thinking=True)
    alone = strict_backend.init_strict_reasoning_grammar(True)
    for each in (alone, grammar(strict_backend)):
        assert allowed(each, *jumps()) == [False, False, True, True]


def test_a_thinking_budget_is_kept_only_where_a_request_has_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_backend = backend()
    of_backend.max_think_tokens = 1  # SGLANG_MAX_THINK_TOKENS, which is for strict thinking
    found = grammar(of_backend)
    for _ in range(3):
        found.accept_token(token(LETTER))
    assert allowed(found, *jumps()) == [False, False, True, True]


def test_the_budget_of_strict_thinking_stays() -> None:
    strict_backend = backend(strict_thinking=True)
    strict_backend.max_think_tokens = 1  # SGLANG_MAX_THINK_TOKENS
    for found in (strict_backend.init_strict_reasoning_grammar(True), grammar(strict_backend)):
        assert allowed(found, *jumps()) == [False, False, True, True]
        found.accept_token(token(LETTER))
        assert allowed(found, *jumps()) == [False, False, True, False]


def test_the_budget_of_a_request_with_a_grammar() -> None:
    """`custom_params.thinking_budget`, as SGLang gives it to the grammar of a request."""
    found = grammar(backend()).copy()
    parameters = SimpleNamespace(custom_params={"thinking_budget": 2})
    manager = GrammarManager.__new__(GrammarManager)
    manager.scheduler = SimpleNamespace(model_config=None)
    asked = SimpleNamespace(grammar=found, sampling_params=parameters)
    manager._apply_request_reasoning_config(asked)
    for _ in range(2):
        assert allowed(found, *jumps()) == [False, False, True, True]
        found.accept_token(token(LETTER))
    assert allowed(found, *jumps()) == [False, False, True, False]  # the thought is ended
    found.accept_token(token(CLOSE))
    assert allowed(found, *jumps()) == [True, False, False, False]


def test_what_strict_thinking_masks_otherwise_stays_masked() -> None:
    strict_backend = backend(strict_thinking=True)
    strict_backend.think_excluded_token_ids = [token(LETTER)]
    assert allowed(grammar(strict_backend), *jumps()) == [False, False, True, False]


def test_strict_thinking_of_requests_without_a_grammar_is_sglangs() -> None:
    strict_backend = backend(strict_thinking=True)
    strict_backend.think_excluded_token_ids = [token(LETTER)]
    alone = strict_backend.init_strict_reasoning_grammar(True)
    assert allowed(alone, *jumps()) == [True, True, True, False]


def test_a_grammar_backend_that_cannot_mask_is_not_asked_to() -> None:
    """llguidance and outlines: thoughts are free."""

    class Plain(XGrammarGrammarBackend):
        is_support_token_filter = False

        def set_token_filter(self, *passed: Any, **named: Any) -> None:
            raise AssertionError("not for this backend")

    inner = Plain(tokenizer(), vocab_size=len(tokenizer()), model_eos_token_ids=[EOS])
    of_backend = ReasonerGrammarBackend(inner, ReasoningParser("minimax"), tokenizer())
    found = grammar(of_backend)
    assert allowed(found, *jumps()) == [True, True, True, True]
    found.accept_token(token(CLOSE))
    assert allowed(found, *jumps()) == [True, False, False, False]
    for name in ("llguidance_backend.GuidanceBackend", "outlines_backend.OutlinesGrammarBackend"):
        module, _, kind = name.partition(".")
        imported = importlib.import_module(f"sglang.srt.constrained.{module}")
        assert "is_support_token_filter" not in vars(getattr(imported, kind))


@pytest.mark.parametrize(
    ("options", "thinks"),
    [
        ({"content": "So.</think>"}, False),
        ({"content": "So.\n</think>\n\nIt is", "name": "minimax-append-think"}, False),
        ({"content": "So"}, True),
        ({"content": None}, True),
        ({"content": [{"type": "text", "text": "So.\n</think>\n\nI"}]}, False),
        ({"content": [SimpleNamespace(type="text", text="So.</think>")]}, False),
        ({"content": [{"type": "text", "text": "So"}]}, True),
        ({"content": "So.</think>", "role": "user"}, True),
        ({"content": "So.</think>", "continued": False}, True),
        ({"content": "So.</think>", "messages": []}, True),
        ({"content": "So.</think>", "name": "deepseek-r1"}, True),
        ({"content": "So.</think>", "name": None}, True),
    ],
    ids=str,
)
def test_a_continued_answer_does_not_think(options: dict[str, Any], thinks: bool) -> None:
    def process(self: Any, request: Any, is_multimodal: bool, *, output_constrained: bool) -> Any:
        return SimpleNamespace(require_reasoning=True)

    message = SimpleNamespace(role=options.get("role", "assistant"), content=options["content"])
    request = SimpleNamespace(
        continue_final_message=options.get("continued", True),
        messages=options.get("messages", [message]),
    )
    handler = SimpleNamespace(reasoning_parser=options.get("name", "minimax"))
    wrapped = begin_behind_a_finished_thought(process)
    assert wrapped(handler, request, False, output_constrained=True).require_reasoning is thinks


class Spelling:
    """A tokenizer that has the tag in several tokens."""

    def __init__(self, eos: int | None, *stops: int) -> None:
        self.eos_token_id = eos
        self.additional_stop_token_ids = stops or None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [1, 2, 3]


def test_a_tag_of_several_tokens_is_not_kept_from_thoughts() -> None:
    assert ends_of_a_reply(Spelling(9, 11)) == [9, 11]
    assert ends_of_a_reply(tokenizer()) == [token(BLOCK), EOS]


@pytest.mark.parametrize(("stops", "expected"), [((), []), ((11,), [11])])
def test_a_tokenizer_without_an_end(stops: tuple[int, ...], expected: list[int]) -> None:
    assert ends_of_a_reply(Spelling(None, *stops)) == expected
