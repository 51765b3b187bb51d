"""Compare an engine's distributions and tokens with the oracle's, for the same weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_minimax.validation.engine_process import EngineProcess
from sglang_minimax.validation.oracle import TransformersOracle


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a comparison found.

    max_error: the largest difference of a log-probability, over every step and the whole
    vocabulary. tokens_equal: whether every greedy token was the oracle's. steps: tokens compared.
    """

    max_error: float
    tokens_equal: bool
    steps: int


def compare(
    engine: EngineProcess,
    oracle: TransformersOracle,
    prompts: Iterable[Sequence[int]],
    steps: int,
) -> Agreement:
    """Generate `steps` tokens after each prompt, one request at a time, and judge all of them."""
    errors, equal, count = [], True, 0
    for prompt in prompts:
        tokens, found, _ = greedy(engine, prompt, steps, oracle.vocab_size)
        errors.append(max_error(oracle, prompt, tokens, found))
        equal &= tokens == oracle.greedy(prompt, steps)
        count += len(tokens)
    return Agreement(max(errors), equal, count)


def greedy(
    engine: EngineProcess, prompt: Sequence[int], steps: int, vocabulary: int
) -> tuple[list[int], torch.Tensor, dict[str, Any]]:
    """Generate `steps` tokens: (their ids, [steps, vocabulary] log-probabilities, meta info).

    Asking for the whole vocabulary as top log-probabilities returns SGLang's fp32 log-softmax.
    Prompt log-probabilities are not asked for: they would prevent a radix-cache hit.
    """
    reply = engine.generate(
        input_ids=list(prompt),
        sampling_params={"temperature": 0, "max_new_tokens": steps, "ignore_eos": True},
        return_logprob=True,
        top_logprobs_num=vocabulary,
    )
    info = reply["meta_info"]
    return reply["output_ids"], table(info["output_top_logprobs"], vocabulary), info


def max_error(
    oracle: TransformersOracle,
    prompt: Sequence[int],
    tokens: Sequence[int],
    found: torch.Tensor,
) -> float:
    """Largest |found - oracle| over [len(tokens), vocabulary], given the engine's own tokens."""
    expected = oracle.log_probabilities([*prompt, *tokens])[len(prompt) - 1 : -1]
    return float((found - expected).abs().max())


def table(rows: Sequence[Sequence[tuple[float, int, str | None]]], vocabulary: int) -> torch.Tensor:
    """SGLang's (log-probability, token, text) rows as [rows, vocabulary] fp32; NaN where absent."""
    result = torch.full((len(rows), vocabulary), torch.nan)
    for index, row in enumerate(rows):
        values, tokens, _ = zip(*row, strict=True)
        result[index, list(tokens)] = torch.tensor(values)
    return result


def random_prompt(length: int, vocabulary: int, seed: int = 0) -> list[int]:
    """`length` token ids without the special ones at the start of a vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, vocabulary, (length,), generator=generator).tolist()
