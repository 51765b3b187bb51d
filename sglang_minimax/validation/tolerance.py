"""How far two correct computations may differ, from the arithmetic and the model's shape alone."""

from __future__ import annotations

import math

import torch

from sglang_minimax.config import Architecture

#: Half the distance of 1 to the next number.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
#: Roundings of a value on its way through a layer in a 16-bit dtype: the residual stream twice,
#: and about five in the branches (products, attention, activation), which accumulate in fp32.
ROUNDINGS_A_LAYER = 7


def relative_error(arch: Architecture, tokens: int, dtype: torch.dtype) -> float:
    """Expected relative error of a logit, of a computation in `dtype` against an exact one.

    fp32: two orders of adding n products differ by about sqrt(n) roundings. n is the longest sum
    of the model (hidden size, heads * head_dim, expert width, or `tokens` attended to). Each layer
    adds two such errors to the residual stream, the head one; independent, they grow as a root:
      sqrt(2 * layers + 1) * sqrt(n) * 2**-24
    16 bits: products accumulate in fp32, and what counts is how often a value is rounded:
      sqrt(7 * layers) * (2**-9 for bf16)
    """
    if dtype is torch.float32:
        terms = max(arch.hidden_size, arch.num_heads * arch.head_dim, arch.expert_width, tokens)
        return math.sqrt((2 * arch.num_layers + 1) * terms) * ROUNDING[dtype]
    return math.sqrt(ROUNDINGS_A_LAYER * arch.num_layers) * ROUNDING[dtype]


def log_probability(arch: Architecture, tokens: int, dtype: torch.dtype, spread: float) -> float:
    """How far a log-probability may be off.

    spread: the largest difference of two logits of one distribution, as the oracle has it: the
    error of a logit is relative to its size, which no configuration tells.
    """
    return spread * relative_error(arch, tokens, dtype)


def routing_margin(arch: Architecture, tokens: int, dtype: torch.dtype) -> float:
    """Below this difference of two scores, two correct computations may choose other experts.

    A score is a sigmoid, whose slope is at most a quarter, of a router logit; those of a normalised
    input are a few units large, so that the relative error of the input is also the score's error.
    """
    return relative_error(arch, tokens, dtype)
