"""What every implementation of the attention prologue is given, and what it may refuse.

The prologue of one layer, for q, k and v as the QKV projection wrote them:

  y   = x * rsqrt(sum over the group of x^2 / divisor + eps) * weight      q and k, fp32
  z   = the first `rotary_dim` dimensions of each head of y, rotated (NeoX pairs)
  q, k <- z, rounded once                                                   in place
  K cache[slot] <- z of k,  V cache[slot] <- v                              optional

FP8 caches hold x / scale computed in fp32, saturated, rounded once from the fp32 value (not from
the rounded k). A slot below the first one is not written. v is never written to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jit_kernels.qk_norm_rope.channel import Channel

# All-reduce (sum) over the group of a [tokens, 2] fp32 tensor, which it may return or overwrite.
Reduce = Callable[[torch.Tensor], torch.Tensor]

FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, slots=True)
class Request:
    """What an implementation needs to know to accept or refuse, before any tensor exists.

    device: "cpu", "cuda", ... capability: (major, minor) of a CUDA device, else None.
    dtype: of q, k, v and the norm weights. q_heads, kv_heads: of this rank.
    rotary_dim: 0 where nothing is rotated. cache_dtype: of the K/V cache, None where the call does
    not write it. group_size: ranks of the attention-TP group.
    no_exchange: why this group cannot exchange its sums from inside a kernel (it spans NVLink
    domains, for one); empty where it can.
    """

    device: str
    dtype: torch.dtype
    q_heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int = 0
    cache_dtype: torch.dtype | None = None
    group_size: int = 1
    no_exchange: str = ""
    capability: tuple[int, int] | None = None

    @property
    def q_width(self) -> int:
        """Columns of q on this rank."""
        return self.q_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of k, and of v, on this rank."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Norm:
    """The constants of one layer's norm on one rank.

    q_weight: [q_width], k_weight: [kv_width], this rank's rows, in the dtype of q.
    q_divisor, k_divisor: elements behind the group's sums; k's counts every replica of a KV head.
    eps is added to the mean, not to the sum.
    """

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    q_divisor: int
    k_divisor: int
    eps: float


@dataclass(frozen=True, slots=True)
class Rotation:
    """A partial NeoX rotation after the norm.

    positions: [tokens] int64 or int32, each below max_position. cos_sin_cache: [max_position,
    rotary_dim], contiguous, cos in the first half of a row, sin in the second.
    """

    positions: torch.Tensor
    cos_sin_cache: torch.Tensor
    head_dim: int

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that turn."""
        return self.cos_sin_cache.shape[-1]


@dataclass(frozen=True, slots=True)
class CacheWrite:
    """Where a call stores K and V: SGLang's NHD layout, by slot or by page.

    v: [tokens, kv_width], read only, unit inner stride, any row stride.
    k_cache, v_cache: [slots, kv_heads, head_dim], or [pages, page_size, kv_heads, head_dim] where
    slot s is page s // page_size, row s % page_size. The last two dimensions are contiguous, the
    others have any stride, and the two caches need not share theirs. The dtype is q's, or FP8.
    slots: [tokens] int64 or int32; one below first_slot is not written. Of rows that name the same
    slot any one may be the one that stays. k_scale, v_scale: what FP8 values are divided by; 1 for
    other dtypes. first_slot: 0, or where a cache begins that keeps slots for padding: SGLang's
    rows of padding name slot 0, and its own kernel leaves that alone too.
    """

    v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    slots: torch.Tensor
    k_scale: float = 1.0
    v_scale: float = 1.0
    first_slot: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """The attention-TP group as a call sees it.

    reduce: the group's all-reduce, for implementations that leave the kernel to communicate.
    channel: this rank's end of the exchange inside a kernel, or None.
    """

    size: int = 1
    reduce: Reduce | None = None
    channel: Channel | None = None


ALONE = Group()


@dataclass(frozen=True, slots=True)
class Call:
    """One call, checked: q [tokens, q_width] and k [tokens, kv_width] are overwritten."""

    q: torch.Tensor
    k: torch.Tensor
    norm: Norm
    group: Group = ALONE
    rotation: Rotation | None = None
    cache: CacheWrite | None = None

    @property
    def tokens(self) -> int:
        """Rows of q, k and v."""
        return self.q.shape[0]


def check(call: Call) -> None:
    """Raise ValueError in one sentence, before anything is written, where the call is malformed."""
    problem = _problem(call)
    if problem:
        raise ValueError(f"qk_norm_rope_: {problem}")


def _problem(call: Call) -> str:
    q, k, norm = call.q, call.k, call.norm
    if q.dim() != 2 or k.dim() != 2 or q.shape[0] != k.shape[0]:
        return f"q {tuple(q.shape)} and k {tuple(k.shape)} are not two matrices of as many rows"
    rows = [("q", q), ("k", k)]
    if call.cache is not None:
        rows.append(("v", call.cache.v))
        if call.cache.v.shape != k.shape:
            return f"v is {tuple(call.cache.v.shape)} where k is {tuple(k.shape)}"
    for name, x in rows:
        if x.shape[1] > 1 and x.stride(1) != 1:
            return f"the inner stride of {name} is {x.stride(1)}, not 1"
        if x.dtype != q.dtype:
            return f"{name} is {x.dtype} where q is {q.dtype}"
    for name, weight, x in (("q", norm.q_weight, q), ("k", norm.k_weight, k)):
        if weight.shape != x.shape[1:] or not weight.is_contiguous():
            return f"the weight of {name} is {tuple(weight.shape)}, not a contiguous [{x.shape[1]}]"
    if call.rotation is not None and (problem := _rotation_problem(call.rotation, q, k)):
        return problem
    return "" if call.cache is None else _cache_problem(call.cache, k)


def _rotation_problem(rotation: Rotation, q: torch.Tensor, k: torch.Tensor) -> str:
    head, rotary = rotation.head_dim, rotation.rotary_dim
    if q.shape[1] % head or k.shape[1] % head:
        return f"rows of {q.shape[1]} and {k.shape[1]} are not whole heads of {head}"
    if rotary % 2 or rotary > head:
        return f"{rotary} rotated dimensions do not fit heads of {head} in pairs"
    if not rotation.cos_sin_cache.is_contiguous():
        return "the cos/sin cache is not contiguous"
    return _index_problem("positions", rotation.positions, q.shape[0])


def _cache_problem(cache: CacheWrite, k: torch.Tensor) -> str:
    for name, buffer in (("K", cache.k_cache), ("V", cache.v_cache)):
        if buffer.dim() not in (3, 4) or buffer.shape[-2] * buffer.shape[-1] != k.shape[1]:
            return f"the {name} cache is {tuple(buffer.shape)}: its rows are not {k.shape[1]} wide"
        if buffer.stride(-1) != 1 or (
            buffer.shape[-2] > 1 and buffer.stride(-2) != buffer.shape[-1]
        ):
            return f"the heads of the {name} cache are not contiguous"
        if buffer.dtype != k.dtype and buffer.dtype not in FP8_TYPES:
            return f"a {name} cache of {buffer.dtype} cannot hold {k.dtype}"
    if cache.k_cache.dtype != cache.v_cache.dtype or cache.k_cache.shape != cache.v_cache.shape:
        return "the K and V caches differ in dtype or shape"
    if cache.k_cache.dtype not in FP8_TYPES and (cache.k_scale, cache.v_scale) != (1.0, 1.0):
        return f"a cache of {cache.k_cache.dtype} takes no scale"
    if cache.first_slot < 0:
        return f"the first slot is {cache.first_slot}; negative ones are never written"
    return _index_problem("slots", cache.slots, k.shape[0])


def _index_problem(name: str, index: torch.Tensor, tokens: int) -> str:
    if (
        index.dim() != 1
        or index.shape[0] != tokens
        or index.dtype
        not in (
            torch.int64,
            torch.int32,
        )
    ):
        return f"{name} are {tuple(index.shape)} {index.dtype}, not [{tokens}] int64 or int32"
    return "" if index.is_contiguous() else f"{name} are not contiguous"
