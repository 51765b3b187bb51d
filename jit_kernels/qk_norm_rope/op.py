"""The QK norm that the model calls: one contract, several implementations, chosen once.

An implementation says for a `Request` why it cannot serve it, or None. `choose` takes the first
that can, in the order of `IMPLEMENTATIONS` (fastest first), and tells what it passed over and why,
so that the caller can say it at start-up. To add one, write its module with `refusal` and `run` and
enter it in `IMPLEMENTATIONS` before the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from jit_kernels.qk_norm_rope import reference
from jit_kernels.qk_norm_rope.reference import Rotation

Reduce = Callable[[torch.Tensor], torch.Tensor]


class KernelUnavailable(RuntimeError):
    """A named implementation cannot serve the request; the message says why."""


@dataclass(frozen=True, slots=True)
class Request:
    """What an implementation needs to know to accept or refuse, before any tensor exists."""

    device: str
    dtype: torch.dtype
    group_size: int
    q_width: int
    k_width: int
    head_dim: int
    rotary_dim: int = 0


@dataclass(frozen=True, slots=True)
class Norm:
    """The constants of one layer's norm on one rank.

    q_weight: [q_width], k_weight: [k_width], this rank's rows.
    q_divisor, k_divisor: elements behind the group's sums; k's counts every replica of a KV head.
    """

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    q_divisor: int
    k_divisor: int
    eps: float


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute the norm: a name, a test of a request, and the function."""

    name: str
    refusal: Callable[[Request], str | None]
    run: Callable[[torch.Tensor, torch.Tensor, Norm, Reduce | None, Rotation | None], None]


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation that serves a request, and why it and not a faster one."""

    implementation: Implementation
    why: str

    @property
    def name(self) -> str:
        """The name of the implementation."""
        return self.implementation.name


def _run_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    norm: Norm,
    reduce: Reduce | None,
    rotation: Rotation | None,
) -> None:
    sums = reference.square_sums(q, k)
    if reduce is not None:
        sums = reduce(sums)
    reference.apply_(
        q,
        k,
        sums,
        norm.q_weight,
        norm.k_weight,
        q_divisor=norm.q_divisor,
        k_divisor=norm.k_divisor,
        eps=norm.eps,
        rotation=rotation,
    )


REFERENCE = Implementation("reference", refusal=lambda request: None, run=_run_reference)

# Fastest first; the reference serves everything and stays last.
IMPLEMENTATIONS: list[Implementation] = [REFERENCE]


def choose(request: Request, prefer: str | None = None) -> Choice:
    """Return the implementation for `request`.

    prefer: the name of the only implementation to consider. Raises KernelUnavailable where it is
    unknown or refuses the request.
    """
    if prefer is not None:
        return _preferred(request, prefer)
    passed_over: list[str] = []
    for implementation in IMPLEMENTATIONS:
        refusal = implementation.refusal(request)
        if refusal is None:
            why = "; ".join(passed_over) or "no faster implementation is installed"
            if implementation is not REFERENCE and not passed_over:
                why = "the fastest that is installed"
            return Choice(implementation, why)
        passed_over.append(f"{implementation.name}: {refusal}")
    raise KernelUnavailable("no implementation of the QK norm: " + "; ".join(passed_over))


def _preferred(request: Request, name: str) -> Choice:
    known = {implementation.name: implementation for implementation in IMPLEMENTATIONS}
    if name not in known:
        raise KernelUnavailable(f"no QK norm is called {name!r}; known: {', '.join(known)}")
    refusal = known[name].refusal(request)
    if refusal is not None:
        raise KernelUnavailable(f"the QK norm {name!r} cannot be used: {refusal}")
    return Choice(known[name], "asked for")


def qk_norm_rope_(
    choice: Choice,
    q: torch.Tensor,
    k: torch.Tensor,
    norm: Norm,
    *,
    reduce: Reduce | None = None,
    rotation: Rotation | None = None,
) -> None:
    """Normalise q and k over the full projection of the group, rotate if asked, in place.

    q: [tokens, q_width], k: [tokens, k_width], unit inner stride, any row stride; views of one
    packed tensor are fine. Zero tokens are fine, but every rank of the group must then have zero,
    since each call with tokens joins one collective.
    reduce: all-reduce (sum) over the group of a [tokens, 2] fp32 tensor, which it may return or
    overwrite and return; None for a group of one rank.
    """
    if q.shape[0] == 0:
        return
    choice.implementation.run(q, k, norm, reduce, rotation)
