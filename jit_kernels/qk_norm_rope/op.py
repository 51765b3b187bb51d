"""The attention prologue that the model calls: one contract, several implementations, chosen once.

An implementation is a module with `NAME`, `refusal(request)` and `prepare(request)`, which returns
the function that serves a `Call`; `jit_kernels.choice` says what they do and how one is chosen.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from jit_kernels import choice as choosing
from jit_kernels.choice import KernelUnavailable
from jit_kernels.qk_norm_rope import reference
from jit_kernels.qk_norm_rope.contract import (
    ALONE,
    CacheWrite,
    Call,
    Group,
    Norm,
    Request,
    Rotation,
    check,
)

Run = Callable[[Call], None]


Implementation = choosing.Implementation[Request, Run]
Choice = choosing.Choice[Run]

REFERENCE = Implementation(
    reference.NAME, refusal=reference.refusal, prepare=lambda request: reference.run
)


def _on_demand(name: str) -> Implementation:
    """The implementation in the module of that name, imported when it is first asked.

    Triton decides when it is imported whether it compiles or interprets, and a machine without an
    accelerator need not have it.
    """

    def module() -> Any:
        return importlib.import_module(f"jit_kernels.qk_norm_rope.{name}")

    def refusal(request: Request) -> str | None:
        try:
            return module().refusal(request)
        except ImportError as error:
            return f"it cannot be imported ({error})"

    return Implementation(name, refusal, lambda request: module().prepare(request))


# Fastest first; the reference serves everything and stays last.
IMPLEMENTATIONS: list[Implementation] = [_on_demand("cuda"), _on_demand("triton"), REFERENCE]


def names() -> list[str]:
    """What the implementations are called, fastest first."""
    return [implementation.name for implementation in IMPLEMENTATIONS]


def choose(request: Request, prefer: str | None = None) -> Choice:
    """Return the implementation for `request`, compiled.

    prefer: the name of the only implementation to consider. Raises KernelUnavailable where it is
    unknown, refuses the request or does not compile.
    """
    return choosing.choose("attention prologue", IMPLEMENTATIONS, request, prefer)


def qk_norm_rope_(
    choice: Choice,
    q: torch.Tensor,
    k: torch.Tensor,
    norm: Norm,
    *,
    group: Group = ALONE,
    rotation: Rotation | None = None,
    cache: CacheWrite | None = None,
) -> None:
    """Norm q and k over the full projection of the group, rotate and store if asked, in place.

    q: [tokens, q_width], k: [tokens, kv_width], unit inner stride, any row stride; views of one
    packed tensor are fine. The formulas are in `contract`. Zero tokens are fine, but every rank of
    the group must then have zero, since each call with tokens joins one exchange.
    Raises ValueError, before anything is written, where the arguments do not fit together.
    """
    call = Call(q, k, norm, group, rotation, cache)
    check(call)
    if call.tokens:
        choice.run(call)


__all__ = [
    "ALONE",
    "IMPLEMENTATIONS",
    "REFERENCE",
    "CacheWrite",
    "Choice",
    "Group",
    "Implementation",
    "KernelUnavailable",
    "Norm",
    "Request",
    "Rotation",
    "choose",
    "names",
    "qk_norm_rope_",
]
