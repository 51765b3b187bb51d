"""Context-parallel attention and data-parallel experts, which the list of shapes does not name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sglang_minimax import TINY_M2
from sglang_minimax.validation.agreement import compare, random_prompt
from sglang_minimax.validation.engine_process import EngineProcess
from sglang_minimax.validation.oracle import TransformersOracle
from tests.engine.test_against_transformers import FP32


@pytest.mark.parametrize(
    "shape",
    [{"tp_size": 2, "attn_cp_size": 2}, {"tp_size": 4, "attn_cp_size": 2, "moe_dp_size": 2}],
    ids=["tp2-cp2", "tp4-cp2-moedp2"],
)
def test_the_same_model(oracles: Callable[..., TransformersOracle], shape: dict[str, int]) -> None:
    oracle = oracles("tiny-m2")
    prompts = [random_prompt(length, oracle.vocab_size, seed=length) for length in (1, 7, 64)]
    with EngineProcess(
        model_path=str(TINY_M2), dtype="float32", skip_tokenizer_init=True, **shape
    ) as engine:
        found = compare(engine, oracle, prompts, 16)
    assert found.max_error < FP32
    assert found.tokens_equal
