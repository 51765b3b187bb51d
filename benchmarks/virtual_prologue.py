"""All ranks of an attention-TP group in one launch on one device: the cost of the exchange.

The grid's second dimension is the rank, each rank's tensors lie one after another, and the ranks
push their sums into buffers of the same memory. So the protocol runs as on several devices, but
its words never leave the chip: what it adds to the same grid without it is a lower bound of what
it costs over NVLink, and is never a multi-GPU figure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.kernel_timing import Work
from benchmarks.prologue_settings import Inputs, Setting, make, views
from jit_kernels.choice import KernelUnavailable
from jit_kernels.qk_norm_rope import reference
from jit_kernels.qk_norm_rope.contract import (
    Call,
    Group,
    Norm,
    Request,
)


@dataclass(frozen=True, slots=True)
class Stacked:
    """All ranks' tensors, rank first; `ranks` has the views of each, which share all else.

    packed: [ranks, tokens, q_width + 2 * kv_width]; weights: [ranks, width]; caches:
    [ranks, slots, kv_heads, head_dim].
    """

    ranks: list[Inputs]
    packed: torch.Tensor
    q_weight: torch.Tensor
    k_weight: torch.Tensor
    k_cache: torch.Tensor | None
    v_cache: torch.Tensor | None

    def calls(self) -> list[Call]:
        """Each rank's call; a launch over virtual ranks has no group to reduce over."""
        return [rank.call(Group(len(self.ranks))) for rank in self.ranks]

    def bytes_moved(self) -> int:
        """Useful bytes of all ranks together."""
        return sum(rank.setting.bytes_moved() for rank in self.ranks)


def stack(setting: Setting) -> Stacked:
    """Random inputs of every rank of the setting's group."""
    made = [make(replace(setting, rank=rank), seed=7 + rank) for rank in range(setting.tp)]
    packed = torch.stack([rank.packed for rank in made])
    q_weight = torch.stack([rank.norm.q_weight for rank in made])
    k_weight = torch.stack([rank.norm.k_weight for rank in made])
    caches: list[torch.Tensor] = []
    if (cache := made[0].cache) is not None:
        caches = [_zeros(x, setting.tp) for x in (cache.k_cache, cache.v_cache)]
    ranks = []
    for n, one in enumerate(made):
        q, k, v = views(one.setting, packed[n])
        norm = Norm(q_weight[n], k_weight[n], one.norm.q_divisor, one.norm.k_divisor, one.norm.eps)
        mine = None
        if caches and cache is not None:
            # All ranks serve the same tokens: positions and slots are those of rank 0.
            mine = replace(cache, v=v, k_cache=caches[0][n], v_cache=caches[1][n])
        rotation = made[0].rotation
        ranks.append(Inputs(one.setting, packed[n], q, k, v, norm, rotation, mine))
    k_cache, v_cache = caches if caches else (None, None)
    return Stacked(ranks, packed, q_weight, k_weight, k_cache, v_cache)


def _zeros(like: torch.Tensor, times: int) -> torch.Tensor:
    """[times, *like.shape]; by way of bytes, since not every device fills FP8."""
    shape = (times, *like.shape[:-1], like.shape[-1] * like.itemsize)
    return torch.zeros(shape, dtype=torch.uint8, device=like.device).view(like.dtype)


def right_answers(stacked: Stacked) -> list[Inputs]:
    """Copies of every rank's inputs, served by the reference with the sums of the whole group."""
    ranks = [rank.copied() for rank in stacked.ranks]
    total = torch.stack([reference.square_sums(rank.q, rank.k) for rank in ranks]).sum(0)
    for rank in ranks:
        reference.run(rank.call(Group(len(ranks), reduce=lambda sums: total)))
    return ranks


def compiled(request: Request, *, exchange: bool) -> Callable[[list[Call]], None]:
    """The launch over all ranks of the request's group, compiled.

    exchange: False takes the kernel in which the exchange is compiled out, on the same grid.
    Raises KernelUnavailable where there is no such launch or it does not compile.
    """
    try:
        from jit_kernels.qk_norm_rope import cuda
    except ImportError as error:
        raise KernelUnavailable(str(error)) from error
    exchanging = cuda.prepare_virtual(request)
    if exchange:
        return exchanging
    return cuda.prepare_virtual(request, exchange=False, room=exchanging.room)


def prepare(stacked: Stacked, *, exchange: bool) -> Work:
    """The launch over all ranks of `stacked`, as a work to be timed."""
    run = compiled(stacked.ranks[0].setting.request(), exchange=exchange)
    calls = stacked.calls()
    return lambda: run(calls)
