"""The attention prologue that the model calls: one contract, several implementations, chosen once.

An implementation is a module with `NAME`, `refusal(request)`, which says why it cannot serve a
request or None, and `prepare(request)`, which compiles what it needs (KernelUnavailable with the
compiler's message where that fails) and returns the function that serves a `Call`. `choose` takes
the first that can, in the order of `IMPLEMENTATIONS` (fastest first), and tells what it passed
over and why, so that the caller can say it at start-up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from jit_kernels.qk_norm_rope import reference
from jit_kernels.qk_norm_rope.contract import (
    ALONE,
    CacheWrite,
    Call,
    Group,
    KernelUnavailable,
    Norm,
    Request,
    Rotation,
    check,
)

Run = Callable[[Call], None]


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to serve a call: a name, a test of a request, and what makes it ready."""

    name: str
    refusal: Callable[[Request], str | None]
    prepare: Callable[[Request], Run]


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation that serves a request, ready to run, and why it and not a faster one."""

    name: str
    why: str
    run: Run


REFERENCE = Implementation(
    reference.NAME, refusal=reference.refusal, prepare=lambda request: reference.run
)

# Fastest first; the reference serves everything and stays last.
IMPLEMENTATIONS: list[Implementation] = [REFERENCE]


def choose(request: Request, prefer: str | None = None) -> Choice:
    """Return the implementation for `request`, compiled.

    prefer: the name of the only implementation to consider. Raises KernelUnavailable where it is
    unknown, refuses the request or does not compile.
    """
    if prefer is not None:
        return _preferred(request, prefer)
    passed_over: list[str] = []
    for implementation in IMPLEMENTATIONS:
        try:
            run = _ready(implementation, request)
        except KernelUnavailable as error:
            passed_over.append(f"{implementation.name}: {error}")
            continue
        return Choice(implementation.name, "; ".join(passed_over) or "the fastest", run)
    raise KernelUnavailable(
        "no implementation of the attention prologue: " + "; ".join(passed_over)
    )


def _preferred(request: Request, name: str) -> Choice:
    known = {implementation.name: implementation for implementation in IMPLEMENTATIONS}
    if name not in known:
        raise KernelUnavailable(
            f"no attention prologue is called {name!r}; known: {', '.join(known)}"
        )
    try:
        return Choice(name, "asked for", _ready(known[name], request))
    except KernelUnavailable as error:
        raise KernelUnavailable(
            f"the attention prologue {name!r} cannot be used: {error}"
        ) from error


def _ready(implementation: Implementation, request: Request) -> Run:
    refusal = implementation.refusal(request)
    if refusal is not None:
        raise KernelUnavailable(refusal)
    return implementation.prepare(request)


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
    "qk_norm_rope_",
]
