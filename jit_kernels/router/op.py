"""The router that the model calls: one contract, several implementations, chosen once.

An implementation is a module with `NAME`, `refusal(request)` and `prepare(request)`, which returns
the function that serves a `Call`; `jit_kernels.choice` says what they do and how one is chosen.
"""

from __future__ import annotations

import torch

from jit_kernels import choice as choosing
from jit_kernels.choice import KernelUnavailable
from jit_kernels.router import reference, triton
from jit_kernels.router.contract import Call, Request, Routing, Run, check

Implementation = choosing.Implementation[Request, Run]
Choice = choosing.Choice[Run]

# Fastest first; the reference serves everything and stays last.
IMPLEMENTATIONS: list[Implementation] = [
    Implementation(module.NAME, module.refusal, module.prepare) for module in (triton, reference)
]


def choose(request: Request, prefer: str | None = None) -> Choice:
    """Return the implementation for `request`, compiled.

    prefer: the name of the only implementation to consider. Raises KernelUnavailable where it is
    unknown, refuses the request or does not compile.
    """
    return choosing.choose("router", IMPLEMENTATIONS, request, prefer)


def route(
    choice: Choice,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    top_k: int,
    logits: torch.Tensor | None = None,
) -> Routing:
    """Choose `top_k` experts for each token, with their weights. The formulas are in `contract`.

    hidden: [tokens, hidden] bf16, fp16 or fp32, unit inner stride, any row stride.
    weight: [experts, hidden] fp32, contiguous. bias: [experts] fp32, contiguous.
    logits: [tokens, experts] fp32, contiguous, filled with the logits where it is given.
    Returns weights [tokens, top_k] fp32 and ids [tokens, top_k] int32; nothing is kept between
    calls, so a call may be captured in a CUDA graph and run on any stream. Zero tokens are fine.
    Raises ValueError, before anything is written, where the arguments do not fit together.
    """
    call = Call(hidden, weight, bias, top_k, logits)
    check(call)
    if not hidden.shape[0]:
        return Routing(
            torch.empty(0, top_k, dtype=torch.float32, device=hidden.device),
            torch.empty(0, top_k, dtype=torch.int32, device=hidden.device),
        )
    return choice.run(call)


__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "Implementation",
    "KernelUnavailable",
    "Request",
    "Routing",
    "choose",
    "route",
]
