"""SGLang's KV pool as a target of our own write, where writing it ourselves changes nothing.

What `MHATokenToKVPool.set_kv_buffer` does besides storing, and what becomes of it here:

* leaves slot 0, which rows of padding name, unwritten on GPUs: so do we, everywhere;
* stops the process at a slot outside of the pool (an assertion on the device): we do not look;
* checks slot numbers on the host if SGLANG_ENABLE_ASYNC_ASSERT is set: then SGLang's store runs;
* takes ids as physical, unless the pool is a unified one: another class, so SGLang's store runs;
* for an FP8 pool, divides k and v by the layer's scales in place, in their own dtype, and converts
  without saturation: ours divides in fp32, saturates, and leaves k and v alone;
* views the buffer as bytes where it holds FP8: undone here;
* for HND, 5-D, FP4, MXFP8, striped and decode-context pools, another store: SGLang's runs;
* stores V on a second stream while a graph is captured: one launch here.

It does not wait for a layer's transfer from the host (HiCache): the slots of new tokens are not
part of one. The buffers are therefore taken as `set_kv_buffer` takes them, not through
`get_key_buffer`, which waits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_parallel

from jit_kernels.qk_norm_rope.contract import CacheWrite
from sglang_minimax.layers.fusion import STORE_RULES, StoreFacts, first_reason

#: Slot 0 of a pool is kept for rows of padding; `store_cache`, SGLang's kernel, skips it too.
FIRST_SLOT = 1

#: Why SGLang stores for now, where nothing was ready before a graph was captured.
WHILE_CAPTURING = "the KV pool was not known before a CUDA graph was captured"

# SGLang's backends that hand a forward to others, and where they keep those. By name: their modules
# import all of SGLang's model runner.
_WRAPPERS = {
    "HybridAttnBackend": ("prefill_backend", "decode_backend"),
    "TboAttnBackend": ("primary",),
}


class KVStore:
    """One layer's K and V buffers in whatever pool the running forward uses."""

    def __init__(
        self,
        attn: RadixAttention,
        *,
        rotated: bool,
        implementation: str,
        compute: torch.dtype,
        prepare: Callable[[torch.dtype], str],
        say: Callable[[str], None],
    ) -> None:
        """implementation: who would write. compute: the dtype of k and v.

        prepare: makes ready what writes a cache of a dtype, and says why it cannot. say: told, for
        each judgement, why SGLang's own store runs, "" where ours does.
        """
        self._attn = attn
        self._rotated = rotated
        self._implementation = implementation
        self._compute = compute
        self._prepare = prepare
        self._say = say
        self._pool: Callable[[], Any] = lambda: None  # a weak reference: pools are replaced
        # Classes of the backend and the layer's scales, as they were judged.
        self._seen: tuple[tuple[str, ...], tuple[float, float] | None] = ((), None)
        self._reason = ""

    def target(self, v: torch.Tensor, batch: ForwardBatch) -> CacheWrite | None:
        """Where this call stores K and V; None where SGLang's own store runs.

        v: [tokens, kv_width]. Reads attributes of the host alone: nothing waits for the device.
        """
        slots = batch.out_cache_loc
        # One slot a row, or the rows are not those that SGLang would store. An idle batch of
        # padding stores nothing.
        if slots is None or slots.shape[0] != v.shape[0] or batch.forward_mode.is_idle():
            return None
        backend = get_attn_backend()
        pool = backend.token_to_kv_pool
        backends, scales = _behind(backend), self._scales(pool)
        if self._pool() is not pool or self._seen != (backends, scales):
            self._judge(pool, backends, scales)
        if self._reason or scales is None:
            return None
        k_cache, v_cache = _buffers(pool, self._attn.layer_id)
        k_scale, v_scale = scales
        return CacheWrite(v, k_cache, v_cache, slots, k_scale, v_scale, FIRST_SLOT)

    def _judge(
        self, pool: Any, backends: tuple[str, ...], scales: tuple[float, float] | None
    ) -> None:
        facts = self._facts(pool, backends, scales)
        self._reason = first_reason(STORE_RULES, facts) or self._prepare(pool.dtype)
        self._say(self._reason)
        # What a capture could not make ready, the next call asks for again.
        passing = self._reason == WHILE_CAPTURING
        self._pool = (lambda: None) if passing else weakref.ref(pool)
        self._seen = backends, scales

    def _scales(self, pool: Any) -> tuple[float, float] | None:
        """Of this layer, 1 where nothing scales. None where a scale has no number on the host.

        Read in each call: a weight update may change them.
        """
        if type(pool) is not MHATokenToKVPool:  # SGLang stores
            return None
        attn = self._attn
        if pool.dtype == pool.store_dtype:
            return 1.0, 1.0
        pair = ((attn.k_scale, attn.k_scale_float), (attn.v_scale, attn.v_scale_float))
        numbers = [1.0 if scale is None else number for scale, number in pair]
        if any(number is None for number in numbers):
            return None
        return float(numbers[0]), float(numbers[1])

    def _facts(
        self, pool: Any, backends: tuple[str, ...], scales: tuple[float, float] | None
    ) -> StoreFacts:
        plain = type(pool) is MHATokenToKVPool
        # Another class may not even have the attributes.
        shapes = [tuple(x.shape) for x in _buffers(pool, self._attn.layer_id)] if plain else []
        parallel = get_parallel()
        return StoreFacts(
            pool=type(pool).__name__,
            plain=plain,
            layout=pool.kv_cache_layout if plain else "",
            hnd=plain and pool.use_hnd,
            quantised=plain and pool.is_quantized_kv_cache,
            dtype=pool.dtype,
            compute=self._compute,
            k_shape=shapes[0] if plain else (),
            v_shape=shapes[1] if plain else (),
            heads=(self._attn.tp_k_head_num, self._attn.head_dim),
            backends=backends,
            scales=scales,
            rotated=self._rotated,
            implementation=self._implementation,
            device=torch.device(pool.device).type,
            context_ranks=parallel.attn_cp_size,
            decode_context_ranks=parallel.attn_dcp_size,
            checked=envs.SGLANG_ENABLE_ASYNC_ASSERT.get(),
        )


def _behind(backend: Any) -> tuple[str, ...]:
    """What the backends are called that may run a forward, behind SGLang's wrappers."""
    name = type(backend).__name__
    held = _WRAPPERS.get(name)
    if held is None:
        return (name,)
    return tuple(inner for each in held for inner in _behind(getattr(backend, each)))


def _buffers(pool: Any, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[slots, heads, head_dim] of one layer's K and V, in the dtype of what they hold."""
    index = layer_id - pool.start_layer
    k_cache, v_cache = pool.k_buffer[index], pool.v_buffer[index]
    if pool.store_dtype != pool.dtype:
        k_cache, v_cache = k_cache.view(pool.dtype), v_cache.view(pool.dtype)
    return k_cache, v_cache
