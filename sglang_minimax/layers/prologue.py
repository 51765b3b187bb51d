"""From the QKV projection to the KV cache in one call: norm, rotation, K/V write.

The implementation is chosen once, when the first layer is built; what cannot be fused is left to
SGLang, and the start-up lines say which and why. docs/prologue.md tells all of it. The arithmetic
and the implementations live in `jit_kernels.qk_norm_rope`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from sglang.srt.layers.dp_attention import attn_tp_all_reduce
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_model, get_parallel

from jit_kernels.qk_norm_rope.op import (
    REFERENCE,
    CacheWrite,
    Choice,
    Group,
    Norm,
    Request,
    qk_norm_rope_,
)
from jit_kernels.qk_norm_rope.reference import run as run_reference
from sglang_minimax.layers import path
from sglang_minimax.layers.agreeing import (
    device_of,
    group_gather,
    kind_and_capability,
    tell,
)
from sglang_minimax.layers.exchange import open_to_peers
from sglang_minimax.layers.fusion import expected_cache_dtype
from sglang_minimax.layers.kv_store import WHILE_CAPTURING, KVStore
from sglang_minimax.layers.qk_norm import ShardedNormWeight
from sglang_minimax.layers.rotation import rotation, why_not
from sglang_minimax.topology import AttentionShard

logger = logging.getLogger(__name__)

# What is traced where torch.compile looks at the model.
_TRACED = Choice(REFERENCE.name, "torch.compile fuses it", run_reference)

# By device and size of the group: one, in a server.
_channels: dict[tuple[torch.device, int], path.Opening] = {}

# What writes the KV cache for a request and an implementation's name, or why nothing does.
_stores: dict[tuple[Request, str], Choice | str] = {}


class Attendable(NamedTuple):
    """What attention gets: q, k, v [tokens, heads * head_dim], and whether K and V are stored."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    stored: bool


class Prologue:
    """Norms and rotates q and k in place, and stores K and V where it can.

    Not a module: norms, rotary module and attention belong to the layer, under their own names.
    """

    def __init__(
        self,
        q_norm: ShardedNormWeight,
        k_norm: ShardedNormWeight,
        shard: AttentionShard,
        rotary: Any,
        attn: RadixAttention,
        *,
        eps: float,
    ) -> None:
        self._q_norm = q_norm
        self._k_norm = k_norm
        self._rotary = rotary
        # Plain numbers: the exact divisions of a shard are not the compiler's to trace.
        self._widths = (shard.q_width, shard.kv_width, shard.kv_width)
        self._divisors = (shard.q_divisor, shard.k_divisor)
        self._head_dim = shard.head_dim
        self._eps = eps
        weight = q_norm.weight
        device = device_of(weight)
        asked = _request(shard, device, weight.dtype)
        with_rotation = replace(asked, rotary_dim=rotary.rotary_dim)
        prepared = _prepared(with_rotation, device)
        self._no_rotation = why_not(
            rotary,
            head_dim=shard.head_dim,
            implementation=prepared.choice.name,
            device=asked.device,
        )
        if self._no_rotation:
            prepared = _prepared(asked, device)
        self._plain, self._request, channel, failed = prepared
        reduce = attn_tp_all_reduce if shard.size > 1 else None
        self._group = Group(shard.size, reduce, channel)
        self._storing = self._plain
        self._store = KVStore(
            attn,
            rotated=not self._no_rotation,
            implementation=self._plain.name,
            compute=weight.dtype,
            prepare=self._prepare_store,
            say=lambda reason: _say(path.store_summary(self._storing, reason)),
        )
        setting = get_model().kv_cache_dtype
        expected = expected_cache_dtype(setting, weight.dtype, _cache_algorithm(attn))
        if expected is not None and not self._no_rotation:
            self._prepare_store(expected)
        _say(path.summary(self._plain, self._request, self._no_rotation), failed)

    def __call__(
        self, positions: torch.Tensor, qkv: torch.Tensor, batch: ForwardBatch
    ) -> Attendable:
        """positions: [tokens]; qkv: [tokens, q_width + 2 * kv_width], q and k overwritten."""
        q, k, v = qkv.split(self._widths, dim=-1)
        write: CacheWrite | None = None
        if torch.compiler.is_compiling():
            choice = _TRACED
        else:
            write = self._store.target(v, batch)
            choice = self._plain if write is None else self._storing
        # Built per call: a weight update may replace the parameters.
        norm = Norm(
            q_weight=self._q_norm.weight,
            k_weight=self._k_norm.weight,
            q_divisor=self._divisors[0],
            k_divisor=self._divisors[1],
            eps=self._eps,
        )
        turn = None if self._no_rotation else rotation(self._rotary, positions, self._head_dim)
        qk_norm_rope_(choice, q, k, norm, group=self._group, rotation=turn, cache=write)
        if self._no_rotation:
            q, k = self._rotary(positions, q, k)
        return Attendable(q, k, v, stored=write is not None)

    def _prepare_store(self, cache_dtype: torch.dtype) -> str:
        """Make ready what writes a cache of this dtype; why it cannot. Collective, then kept."""
        request = replace(self._request, cache_dtype=cache_dtype)
        found = _storing(request, self._plain.name)
        if isinstance(found, str):
            return found
        self._storing = found
        return ""


def _request(shard: AttentionShard, device: torch.device, dtype: torch.dtype) -> Request:
    """What is asked of the norm alone."""
    kind, capability = kind_and_capability(device)
    return Request(
        device=kind,
        dtype=dtype,
        q_heads=shard.q_heads,
        kv_heads=shard.kv_heads,
        head_dim=shard.head_dim,
        group_size=shard.size,
        capability=capability,
    )


def _cache_algorithm(attn: RadixAttention) -> str | None:
    """How the checkpoint quantises its KV cache, as the layer's quant config names it."""
    config = getattr(attn.quant_method, "quant_config", None)
    return getattr(config, "kv_cache_quant_algo", None)


@cache
def _prepared(request: Request, device: torch.device) -> path.Prepared:
    """Choose once for all layers of a shape. Collective over the attention-TP group."""
    gather = group_gather(request.device, request.group_size)
    return path.prepare(
        request, path.forced(), gather, lambda: _channel(device, request.group_size)
    )


def _channel(device: torch.device, size: int) -> path.Opening:
    """The process's channel, opened on first use. Collective where it is not open yet."""
    found = _channels.get((device, size))
    if found is None or (found.channel is not None and found.channel.closed):
        found = _channels[device, size] = open_to_peers(device, group_gather(device.type, size))
    return found


def _storing(request: Request, name: str) -> Choice | str:
    """The same implementation with a K/V write, or why there is none. Collective on first use.

    While a graph is captured nothing new is compiled, and that answer is not kept.
    """
    found = _stores.get((request, name))
    if found is None:
        if request.device == "cuda" and torch.cuda.is_current_stream_capturing():
            return WHILE_CAPTURING
        found = path.only(request, name, group_gather(request.device, request.group_size))
        _stores[request, name] = found
        if isinstance(found, str) and path.allowed(request, name):
            _say(path.store_failure(name, found), failed=True)
    return found


@cache
def _say(line: str, failed: bool = False) -> None:
    """Once a process."""
    tell(logger, line, failed=failed, group_rank=get_parallel().attn_tp_rank)
