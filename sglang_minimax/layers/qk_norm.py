"""RMSNorm of q and k over the full projection, on the attention-TP group.

The kernel is chosen once, when the layer is built; the first layer of a process says which one it
is and why. The arithmetic and the implementations live in `jit_kernels.qk_norm_rope`.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from sglang.srt.layers.dp_attention import attn_tp_all_reduce
from sglang.srt.runtime_context import get_parallel
from torch import nn

from jit_kernels.qk_norm_rope.op import Choice, Group, Norm, Request, choose, qk_norm_rope_
from sglang_minimax.topology import AttentionShard

logger = logging.getLogger(__name__)


class ShardedNormWeight(nn.Module):
    """This rank's rows of a norm weight that spans all heads.

    rows: the rows of the global weight. The parameter is [len(rows)] in the default dtype; its
    loader takes the full [total] tensor and keeps these rows.
    """

    def __init__(self, rows: range, total: int) -> None:
        super().__init__()
        self.rows = rows
        self.total = total
        self.weight = nn.Parameter(torch.empty(len(rows)), requires_grad=False)
        self.weight.weight_loader = self.load  # type: ignore[attr-defined]

    def load(self, parameter: nn.Parameter, full: torch.Tensor) -> None:
        """Copy this rank's rows out of the full weight, [total]."""
        parameter.data.copy_(full[self.rows.start : self.rows.stop])

    def extra_repr(self) -> str:
        return f"rows={self.rows.start}:{self.rows.stop} of {self.total}"


class QKNorm:
    """Normalises q and k in place with the statistics of the whole attention-TP group.

    Not a module: `q_norm` and `k_norm` belong to the attention, under their checkpoint names.
    """

    def __init__(
        self,
        q_norm: ShardedNormWeight,
        k_norm: ShardedNormWeight,
        shard: AttentionShard,
        *,
        eps: float,
    ) -> None:
        self._q_norm = q_norm
        self._k_norm = k_norm
        self._shard = shard
        self._eps = eps
        self._group = Group(shard.size, attn_tp_all_reduce if shard.size > 1 else None)
        weight = q_norm.weight
        self._choice = _choose_and_say(
            Request(
                device=weight.device.type,
                dtype=weight.dtype,
                q_heads=shard.q_heads,
                kv_heads=shard.kv_heads,
                head_dim=shard.head_dim,
                group_size=shard.size,
            )
        )

    def __call__(self, q: torch.Tensor, k: torch.Tensor) -> None:
        """q: [tokens, q_heads * head_dim], k: [tokens, kv_heads * head_dim], both overwritten."""
        # Built per call: a weight update may replace the parameters.
        norm = Norm(
            q_weight=self._q_norm.weight,
            k_weight=self._k_norm.weight,
            q_divisor=self._shard.q_divisor,
            k_divisor=self._shard.k_divisor,
            eps=self._eps,
        )
        qk_norm_rope_(self._choice, q, k, norm, group=self._group)


@cache
def _choose_and_say(request: Request) -> Choice:
    """Choose once for all layers of the same shape, with one log line from the first rank."""
    choice = choose(request)
    if get_parallel().tp_rank == 0:
        logger.info(
            "QK norm: %s on %s, attention-TP %d (%s)",
            choice.name,
            request.device,
            request.group_size,
            choice.why,
        )
    return choice
