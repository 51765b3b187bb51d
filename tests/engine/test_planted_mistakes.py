"""Plausible mistakes, planted in our own model: the comparison with transformers must see each.

The mistakes are patched into the engine's process before the ranks are forked, so SGLang runs
them for real. What is measured is what `test_against_transformers` asserts to be below `FP32`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sglang_minimax.validation.agreement import greedy, max_error, random_prompt
from sglang_minimax.validation.engine_process import EngineProcess
from sglang_minimax.validation.oracle import TransformersOracle
from tests.engine.test_against_transformers import FP32


def local_variance_only() -> None:
    """Each rank normalises with its own shard's mean of squares: no reduction."""
    from sglang_minimax.layers import qk_norm

    original = qk_norm.QKNorm.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self._reduce = lambda sums: sums * self._shard.size

    qk_norm.QKNorm.__init__ = __init__  # type: ignore[method-assign]


def k_sum_counts_replicas() -> None:
    """The reduced K sum is divided by the width alone, although replicas were added too."""
    from sglang_minimax.topology import AttentionShard

    true = AttentionShard.k_divisor.fget  # type: ignore[attr-defined]
    AttentionShard.k_divisor = property(  # type: ignore[assignment,method-assign]
        lambda self: true(self) // self.kv_replicas
    )


def k_norm_of_the_next_head() -> None:
    """K is scaled with the rows of another head."""
    from sglang_minimax.layers import qk_norm

    original = qk_norm.ShardedNormWeight.load

    def load(self: Any, parameter: torch.nn.Parameter, full: torch.Tensor) -> None:
        original(self, parameter, full.roll(32))

    qk_norm.ShardedNormWeight.load = load  # type: ignore[method-assign]


def full_rotary() -> None:
    """All of a head is rotated instead of the first half."""
    from sglang_minimax import config

    original = config.Architecture.from_config.__func__  # type: ignore[attr-defined]

    def from_config(cls: type, source: Any) -> Any:
        found = original(cls, source)
        return dataclasses.replace(found, rotary_dim=found.head_dim)

    config.Architecture.from_config = classmethod(from_config)  # type: ignore[assignment]


def no_correction_bias() -> None:
    """Experts are chosen by their scores alone."""
    from sglang_minimax.layers import moe

    original = moe.MiniMaxM2MoE.forward

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        self.e_score_correction_bias.data.zero_()
        return original(self, hidden_states)

    moe.MiniMaxM2MoE.forward = forward  # type: ignore[method-assign]


def no_renormalisation() -> None:
    """The scores of the chosen experts do not sum to one."""
    from sglang_minimax.layers import moe

    original = moe.TopK.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "renormalize": False})

    moe.TopK.__init__ = __init__  # type: ignore[method-assign]


def usual_eps() -> None:
    """1e-6 in the QK norm, whatever the config says."""
    from sglang_minimax.layers import qk_norm

    original = qk_norm.QKNorm.__init__

    def __init__(self: Any, *args: Any, eps: float, **kwargs: Any) -> None:
        original(self, *args, eps=1e-6, **kwargs)

    qk_norm.QKNorm.__init__ = __init__  # type: ignore[method-assign]


def eps_on_the_sum() -> None:
    """eps is added to the sum of squares, so that it acts divided by the width."""
    from sglang_minimax.layers import qk_norm

    original = qk_norm.QKNorm.__init__

    def __init__(self: Any, *args: Any, eps: float, **kwargs: Any) -> None:
        original(self, *args, eps=eps / 384, **kwargs)

    qk_norm.QKNorm.__init__ = __init__  # type: ignore[method-assign]


MISTAKES = [
    (local_variance_only, "tiny-m2", {"tp_size": 2}),
    (k_sum_counts_replicas, "tiny-m2", {"tp_size": 8}),
    (k_norm_of_the_next_head, "tiny-m2", {}),
    (full_rotary, "tiny-m2", {}),
    (no_correction_bias, "tiny-m2", {}),
    (no_renormalisation, "tiny-m2", {}),
    (usual_eps, "hub", {}),
    (eps_on_the_sum, "hub", {}),
]


def error_of(
    oracle: TransformersOracle, before: Callable[[], None] | None, arguments: dict[str, Any]
) -> float:
    """Largest difference of a log-probability from transformers' over a prompt and 4 steps."""
    prompt = random_prompt(32, oracle.vocab_size, seed=9)
    with EngineProcess(
        before=before,
        model_path=oracle.model.name_or_path,
        dtype="float32",
        skip_tokenizer_init=True,
        log_level="info",
        **arguments,
    ) as engine:
        tokens, found, _ = greedy(engine, prompt, 4, oracle.vocab_size)
    return max_error(oracle, prompt, tokens, found)


@pytest.mark.parametrize(
    ("mistake", "checkpoint", "shape"), MISTAKES, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_planted_mistake_shows(
    oracles: Callable[..., TransformersOracle],
    mistake: Callable[[], None],
    checkpoint: str,
    shape: dict[str, int],
) -> None:
    # eps is a hundredth of the mean of squares there, so its absence is no larger than that.
    factor = 10 if checkpoint == "hub" else 100
    assert error_of(oracles(checkpoint), mistake, shape) > factor * FP32, mistake.__doc__


def test_without_a_mistake_nothing_shows(oracles: Callable[..., TransformersOracle]) -> None:
    assert error_of(oracles("tiny-m2"), None, {}) < FP32
