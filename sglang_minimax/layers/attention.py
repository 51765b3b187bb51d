"""Grouped-query attention with a QK norm over all heads and a partial rotation."""

from __future__ import annotations

import torch
from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import add_prefix
from torch import nn

from sglang_minimax.config import Architecture
from sglang_minimax.layers.prologue import Prologue
from sglang_minimax.layers.qk_norm import ShardedNormWeight
from sglang_minimax.topology import AttentionShard


def attention_shard(arch: Architecture) -> AttentionShard:
    """What this rank holds of the attention: its place in the attention-TP group decides."""
    parallel = get_parallel()
    return AttentionShard.of(arch, parallel.attn_tp_size, parallel.attn_tp_rank)


class MiniMaxM2Attention(nn.Module):
    """qkv projection, prologue (QK norm, rotation, K/V write), attention, output projection.

    The output is this rank's share of a sum over the attention-TP group: the layer boundary adds
    the shares, not this module.
    """

    def __init__(
        self,
        arch: Architecture,
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        shard = self.shard = attention_shard(arch)
        self.qkv_proj = QKVParallelLinear(
            arch.hidden_size,
            arch.head_dim,
            arch.num_heads,
            arch.num_kv_heads,
            bias=False,
            quant_config=quant_config,
            parallel_group="attn_tp",
            prefix=add_prefix("qkv_proj", prefix),
        )
        self.o_proj = RowParallelLinear(
            shard.q_total,
            arch.hidden_size,
            bias=False,
            reduce_results=False,
            quant_config=quant_config,
            parallel_group="attn_tp",
            prefix=add_prefix("o_proj", prefix),
        )
        self.q_norm = ShardedNormWeight(shard.q_rows, shard.q_total)
        self.k_norm = ShardedNormWeight(shard.kv_rows, shard.kv_total)
        self.rotary_emb = get_rope(
            arch.head_dim,
            rotary_dim=arch.rotary_dim,
            max_position=arch.max_position,
            base=arch.rope_theta,
            is_neox_style=True,
            rope_scaling=None if arch.rope_scaling is None else dict(arch.rope_scaling),
        )
        self.attn = RadixAttention(
            shard.q_heads,
            arch.head_dim,
            scaling=arch.head_dim**-0.5,
            num_kv_heads=shard.kv_heads,
            layer_id=layer_id,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )
        self.prologue = Prologue(
            self.q_norm, self.k_norm, shard, self.rotary_emb, self.attn, eps=arch.rms_norm_eps
        )

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """positions: [tokens]; hidden_states: [tokens, hidden] -> the same shape, a partial sum."""
        if hidden_states.shape[0] == 0:
            # The whole attention-TP group has no tokens, so nobody waits in the norm's collective.
            return hidden_states
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v, stored = self.prologue(positions, qkv, forward_batch)
        # [tokens, q_heads * head_dim]
        attended = self.attn(q, k, v, forward_batch, save_kv_cache=not stored)
        output, _ = self.o_proj(attended)
        return output
