"""The router in plain PyTorch: the arithmetic that every kernel must reproduce.

It runs in fp32 (or in fp64, on request). It is also the path of a machine without an accelerator.
Source: MiniMaxM2TopKRouter and route_tokens_to_experts of transformers' MiniMax-M2.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from jit_kernels.router.contract import Call, Request, Routing, Run

NAME = "reference"


def refusal(request: Request) -> str | None:
    """Nothing is refused."""
    return None


def prepare(request: Request) -> Run:
    """Nothing needs to be made ready."""
    return run


def run(call: Call, dtype: torch.dtype = torch.float32) -> Routing:
    """Serve one call. dtype: of the arithmetic and of the weights returned."""
    logits = F.linear(call.hidden.to(dtype), call.weight.to(dtype))
    if call.logits is not None:
        call.logits.copy_(logits)
    return selected(logits, call.bias.to(dtype), call.top_k)


def selected(logits: torch.Tensor, bias: torch.Tensor, top_k: int) -> Routing:
    """Choose from logits [tokens, experts]; weights come in their dtype."""
    scores = logits.sigmoid()
    # A stable sort, where topk leaves open which of two equal scores it takes.
    ids = torch.sort(scores + bias, dim=-1, descending=True, stable=True).indices[:, :top_k]
    return Routing(renormalised(scores.gather(1, ids)), ids.to(torch.int32))


def renormalised(scores: torch.Tensor) -> torch.Tensor:
    """Divide the chosen scores, [tokens, top_k], by their sum, and leave rows of zeros zero."""
    total = scores.sum(dim=-1, keepdim=True)
    return scores / torch.where(total == 0, 1.0, total)
