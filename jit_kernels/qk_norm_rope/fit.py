"""Whether a call fits a compiled CUDA kernel: what the kernel takes for granted, asked on the host.

The kernel reads and writes 16 bytes at a time from raw addresses: a tensor of another dtype, width,
alignment or device would not fail there, it would corrupt memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch

from jit_kernels.qk_norm_rope.contract import CacheWrite, Call, Request

VECTOR = 8  # elements that a thread loads at once
VECTOR_BYTES = 16
MAX_STRIDE = 2**32  # of rows, in elements
MAX_SLOTS = 2**31  # of a cache


class Fit:
    """The calls that one compiled kernel may be launched with.

    Layers call again and again with tensors of the same layout: what was once found to fit is
    looked up and not asked again (a third of the time, and it is paid per layer in eager mode).
    """

    def __init__(self, request: Request, *, virtual: bool = False) -> None:
        """virtual: the calls are those of virtual ranks, which have no channel of their own."""
        self._request = request
        self._virtual = virtual
        self._seen: set[Hashable] = set()

    def check(self, call: Call) -> None:
        """Raise ValueError in one sentence where `call` does not fit. call: passed `check`."""
        layout = (*_layouts(call), call.group.size, self._channel_size(call))
        if layout in self._seen:
            return
        if problem := self.problem(call):
            raise ValueError(f"qk_norm_rope_: {problem}")
        self._seen.add(layout)

    def problem(self, call: Call) -> str:
        """Why `call` does not fit, or ""."""
        return (
            self._group_problem(call)
            or self._shape_problem(call)
            or self._rotation_problem(call)
            or self._cache_problem(call.cache)
            or alignment_problem(_tensors(call))
            or _device_problem(call)
        )

    def _channel_size(self, call: Call) -> int:
        return 0 if call.group.channel is None else call.group.channel.size

    def _group_problem(self, call: Call) -> str:
        size = self._request.group_size
        if call.group.size != size:
            return f"the group has {call.group.size} ranks, compiled for {size}"
        if size == 1 or self._virtual:
            return ""
        if call.group.channel is None:
            return "the group has no channel to exchange its sums"
        if call.group.channel.size != size:
            return f"the channel has {call.group.channel.size} ranks, the group {size}"
        return ""

    def _shape_problem(self, call: Call) -> str:
        q, k, request = call.q, call.k, self._request
        widths = (q.shape[1], k.shape[1])
        if q.dtype != request.dtype or widths != (request.q_width, request.kv_width):
            return (
                f"q and k are {q.dtype}, {widths[0]} and {widths[1]} wide; the kernel was compiled "
                f"for {request.dtype}, {request.q_width} and {request.kv_width}"
            )
        for name, weight in (("q", call.norm.q_weight), ("k", call.norm.k_weight)):
            if weight.dtype != q.dtype:
                return f"the weight of {name} is {weight.dtype} where q is {q.dtype}"
        return ""

    def _rotation_problem(self, call: Call) -> str:
        rotation, request = call.rotation, self._request
        rotary = 0 if rotation is None else rotation.rotary_dim
        if rotary != request.rotary_dim:
            return f"{rotary} dimensions turn, compiled for {request.rotary_dim}"
        if rotation is None:
            return ""
        if rotation.head_dim != request.head_dim:
            return f"head_dim is {rotation.head_dim}, compiled for {request.head_dim}"
        table = rotation.cos_sin_cache
        if table.dtype != torch.float32:
            return f"the cos/sin cache is {table.dtype}, not float32"
        return ""

    def _cache_problem(self, cache: CacheWrite | None) -> str:
        wanted = self._request.cache_dtype
        if (None if cache is None else cache.k_cache.dtype) != wanted:
            return f"the cache's dtype is not {wanted}, which the kernel was compiled for"
        slots = 0 if cache is None else cache.k_cache.shape[:-2].numel()
        return f"a cache of {slots} slots is too large" if slots >= MAX_SLOTS else ""


def _tensors(call: Call) -> Iterator[tuple[str, torch.Tensor, int]]:
    """A name, the tensor, and how many of its last dimensions are one contiguous row."""
    yield from (("q", call.q, 1), ("k", call.k, 1))
    yield from (
        ("the weight of q", call.norm.q_weight, 1),
        ("the weight of k", call.norm.k_weight, 1),
    )
    if call.rotation is not None:
        yield "the cos/sin cache", call.rotation.cos_sin_cache, 1
    if call.cache is not None:
        yield "v", call.cache.v, 1
        yield from (("the K cache", call.cache.k_cache, 2), ("the V cache", call.cache.v_cache, 2))


def _indices(call: Call) -> Iterator[torch.Tensor]:
    if call.rotation is not None:
        yield call.rotation.positions
    if call.cache is not None:
        yield call.cache.slots


def _layouts(call: Call) -> Iterator[Hashable]:
    """What `problem` depends on, of every tensor; not the number of tokens, but for one row."""
    for _, x, _ in _tensors(call):
        rows = x.shape[0] > 1 if x.dim() == 2 else x.shape[0]
        yield x.dtype, x.device, rows, x.shape[1:], x.stride(), x.data_ptr() % VECTOR_BYTES
    for index in _indices(call):
        yield index.device
    if call.rotation is not None:
        yield call.rotation.head_dim
    if call.q.is_cuda:
        yield torch.cuda.current_device()


def alignment_problem(tensors: Iterator[tuple[str, torch.Tensor, int]] | Sequence[Any]) -> str:
    """Why the kernel cannot address one of `tensors`, or ""."""
    for name, x, inner in tensors:
        # FP8 only in the cache: eight elements, as of the other dtypes, are eight bytes.
        need = min(VECTOR_BYTES, VECTOR * x.itemsize)
        if x.data_ptr() % need:
            return f"{name} starts at an address that is not a multiple of {need}"
        for size, stride in zip(x.shape[:-inner], x.stride(), strict=False):
            if size > 1 and stride * x.itemsize % need:
                return f"the rows of {name} lie {stride} elements apart, not a multiple of {need} B"
            if size > 1 and not 0 <= stride < MAX_STRIDE:
                return f"the rows of {name} lie {stride} elements apart, beyond {MAX_STRIDE}"
    return ""


def _device_problem(call: Call) -> str:
    """A pointer of another device would end the process, not the call; so would a launch on one."""
    here = call.q.device
    away = [x.device for _, x, _ in _tensors(call) if x.device != here]
    away += [x.device for x in _indices(call) if x.device != here]
    if away:
        return f"q is on {here}, another tensor on {away[0]}"
    if here.type == "cuda" and here.index != torch.cuda.current_device():
        return f"q is on {here}, the current device is cuda:{torch.cuda.current_device()}"
    return ""
