"""What every implementation of the router is given, what it returns, and what it may refuse.

For each token, with x its hidden state and W, b the gate's weight and correction bias:

  logit  = W x                                       fp32, whatever x is
  score  = sigmoid(logit)
  ids    = the `top_k` experts with the largest score + b, largest first
  weight = score of each chosen expert (without b) / sum of the chosen scores

Equal biased scores are taken in the order of the experts' ids, so the result is a function of the
numbers alone. A NaN counts as larger than everything, as in torch.topk: a token whose hidden state
holds one gets `top_k` different experts, all in range, and NaN weights. Where every chosen score
has underflowed to zero the weights are zero, as in SGLang's own router on a GPU
(kernels/ops/moe/moe_fused_gate.py; transformers divides 0 by 0 there).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

HIDDEN_TYPES = (torch.bfloat16, torch.float16, torch.float32)


class Routing(NamedTuple):
    """weights: [tokens, top_k] fp32, ids: [tokens, top_k] int32, by descending biased score."""

    weights: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True, slots=True)
class Request:
    """What an implementation needs to know to accept or refuse, before any tensor exists.

    device: "cpu", "cuda", ... dtype: of the hidden states. capability: (major, minor) of an NVIDIA
    device, else None. batch_invariant: a token's result must not depend, in any bit, on how many
    tokens are routed with it.
    """

    device: str
    dtype: torch.dtype
    experts: int
    hidden: int
    top_k: int
    batch_invariant: bool = False
    capability: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One call, checked.

    hidden: [tokens, hidden] bf16, fp16 or fp32, unit inner stride, any row stride.
    weight: [experts, hidden] fp32, contiguous. bias: [experts] fp32, contiguous.
    logits: [tokens, experts] fp32, contiguous, overwritten with the logits; None where the caller
    does not need them.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    top_k: int
    logits: torch.Tensor | None = None


Run = Callable[[Call], Routing]


def check(call: Call) -> None:
    """Raise ValueError in one sentence, before anything is written, where the call is malformed."""
    problem = _problem(call)
    if problem:
        raise ValueError(f"route: {problem}")


def _problem(call: Call) -> str:
    x, weight = call.hidden, call.weight
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        return f"hidden states {tuple(x.shape)} and gate weight {tuple(weight.shape)} do not fit"
    if x.dtype not in HIDDEN_TYPES:
        return f"hidden states are {x.dtype}, not bf16, fp16 or fp32"
    if x.shape[1] > 1 and x.stride(1) != 1:
        return f"the inner stride of the hidden states is {x.stride(1)}, not 1"
    tokens, experts = x.shape[0], weight.shape[0]
    fp32: list[tuple[str, torch.Tensor | None, tuple[int, ...]]] = [
        ("gate's weights", weight, tuple(weight.shape)),
        ("correction biases", call.bias, (experts,)),
        ("logits", call.logits, (tokens, experts)),
    ]
    for name, tensor, shape in fp32:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            return f"the {name} are {tuple(tensor.shape)} {tensor.dtype}, not {shape} fp32"
        if not tensor.is_contiguous():
            return f"the {name} are not contiguous"
        if tensor.device != x.device:
            return f"the {name} are on {tensor.device}, the hidden states on {x.device}"
    if not 0 < call.top_k <= experts:
        return f"{call.top_k} of {experts} experts cannot be chosen"
    return ""
