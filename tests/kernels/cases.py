"""Inputs of the attention prologue for whole attention-TP groups, their fp64 truth, and bounds.

A `Case` is global: all heads, all tokens. `cut` gives what one rank of a group is called with,
views of one packed [tokens, q | k | v] matrix as the QKV projection writes it. `truth` computes in
fp64 on the unsplit projection, so nothing of the group's arithmetic is in the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from jit_kernels.qk_norm_rope import reference
from jit_kernels.qk_norm_rope.contract import (
    FP8_TYPES,
    CacheWrite,
    Call,
    Group,
    Norm,
    Rotation,
)
from sglang_minimax.topology import AttentionShard

EPS = 1e-6

# (query heads, KV heads): the published shape, and one whose groups are not powers of two.
PUBLISHED, THIRDS = (48, 8), (12, 3)
GROUPS = [*((PUBLISHED, size) for size in (1, 2, 4, 8, 16)), *((THIRDS, size) for size in (3, 6))]

# Half a unit in the last place, relative to the value, and half the smallest subnormal.
UNIT = {
    torch.float32: (2.0**-24, 2.0**-150),
    torch.bfloat16: (2.0**-8, 2.0**-134),
    torch.float16: (2.0**-11, 2.0**-25),
    torch.float8_e4m3fn: (2.0**-4, 2.0**-10),
    torch.float8_e5m2: (2.0**-3, 2.0**-17),
}
# What fp32 may lose before the one rounding: a sum of up to 6144 squares (pairwise in blocks, so
# some tens of units of 2**-24), halved by the root, and six more operations.
ARITHMETIC = 2.0**-19


@dataclass(frozen=True)
class Special:
    """A row that breaks careless kernels: what it is called and how it is made from a row."""

    name: str
    make: Callable[[torch.Tensor], torch.Tensor]


def _one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """One element in an ordinary row, in the first half of a head's rotated part."""

    def make(row: torch.Tensor) -> torch.Tensor:
        row = row.clone()
        row[3] = value
        return row

    return make


SPECIALS = (
    Special("zeros", torch.zeros_like),
    Special("nan", _one(float("nan"))),
    Special("inf", _one(float("inf"))),
    Special("tiny", lambda row: row * 1e-6),
    Special("large", lambda row: row.sign() * min(1e17, torch.finfo(row.dtype).max / 4)),
)
# Beyond what fp32 sums can hold (1e17 squared, times 6144, is 6e37): judged by the fp32 reference.
OVERFLOWING = Special("overflowing", lambda row: row.sign() * 1e30)
# `make_case` stores the K and V of rows 2, 4 and 5 of these.
BEYOND_FP32 = (OVERFLOWING, SPECIALS[0], OVERFLOWING, SPECIALS[1], SPECIALS[0], SPECIALS[2])


@dataclass(frozen=True)
class Case:
    """Global tensors: q [tokens, heads * head_dim], k and v alike, weights, what to do with them.

    slots: [tokens] or None; page_size: 0 for a cache of slots, else of pages. first_slot: 1 where
    slot 0 is kept for padding.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_weight: torch.Tensor
    k_weight: torch.Tensor
    heads: tuple[int, int]
    head_dim: int
    positions: torch.Tensor | None = None
    cos_sin_cache: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    cache_dtype: torch.dtype | None = None
    page_size: int = 0
    scales: tuple[float, float] = (1.0, 1.0)
    first_slot: int = 0
    eps: float = EPS

    @property
    def tokens(self) -> int:
        return self.q.shape[0]

    def with_rows(self, specials: Sequence[Special]) -> Case:
        """The first rows replaced by special ones, in q, k and v alike."""
        changed = {name: getattr(self, name).clone() for name in ("q", "k", "v")}
        for row, special in enumerate(specials):
            for x in changed.values():
                x[row] = special.make(x[row])
        return replace(self, **changed)


def make_case(
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    heads: tuple[int, int] = PUBLISHED,
    head_dim: int = 128,
    rotary_dim: int = 64,
    cache_dtype: torch.dtype | None = None,
    page_size: int = 0,
    seed: int = 7,
    eps: float = EPS,
) -> Case:
    """A random case. rotary_dim 0 leaves the rotation out, cache_dtype None the K/V write.

    With a cache, every third token has slot -1, the others distinct random slots, the second one
    slot 0, which is kept for padding.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    # Heads of different size make a mean over too few of them visible.
    q, k, v = (
        random(tokens, count * head_dim) * torch.linspace(0.2, 3.0, count * head_dim)
        for count in (heads[0], heads[1], heads[1])
    )
    weights = [random(count * head_dim).abs() + 0.5 for count in heads]
    case = Case(
        *(x.to(dtype) for x in (q, k, v, *weights)), heads=heads, head_dim=head_dim, eps=eps
    )
    if rotary_dim:
        angles = random(257, rotary_dim // 2) * 3
        positions = torch.randint(0, 257, (tokens,), generator=generator)
        cos_sin_cache = torch.cat([angles.cos(), angles.sin()], dim=-1)
        case = replace(case, positions=positions, cos_sin_cache=cos_sin_cache)
    if cache_dtype is not None:
        slots = torch.randperm(cache_slots(tokens), generator=generator)[:tokens]
        if tokens > 1:
            slots[slots == 0] = slots[1].item()
            slots[1] = 0
        slots[::3] = -1
        fp8 = cache_dtype in FP8_TYPES
        scales = (0.37, 1.7) if fp8 else (1.0, 1.0)
        case = replace(
            case,
            slots=slots,
            cache_dtype=cache_dtype,
            page_size=page_size,
            scales=scales,
            first_slot=1,
        )
    return case


def with_indices(case: Case, positions: str, slots: str) -> Case:
    """The case with its indices as "int" (32 bits) or "long" (64), each in its own width."""
    types = {"int": torch.int32, "long": torch.int64}
    assert case.positions is not None
    assert case.slots is not None
    return replace(
        case, positions=case.positions.to(types[positions]), slots=case.slots.to(types[slots])
    )


def cache_slots(tokens: int) -> int:
    """Slots of a cache for so many tokens: a whole number of pages of 16, with some to spare."""
    return (tokens + 47) // 16 * 16


@dataclass
class Rank:
    """What one rank is called with; q, k and v are views of `packed`."""

    shard: AttentionShard
    packed: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    norm: Norm
    rotation: Rotation | None
    cache: CacheWrite | None

    def call(self, group: Group) -> Call:
        """The call of this rank in `group`."""
        return Call(self.q, self.k, self.norm, group, self.rotation, self.cache)


def cut(
    case: Case, size: int, rank: int, *, spare_columns: int = 0, offset: int = 0, device: str = ""
) -> Rank:
    """One rank's call. spare_columns: added to the row stride; offset: elements before the first.

    An odd offset gives views that are not aligned to 16 bytes. Caches are filled with 7, so that
    what is not written can be seen; their pages and slots have strides with gaps.
    """
    shard = AttentionShard(size, rank, case.head_dim, *case.heads)
    rows = slice(shard.q_rows.start, shard.q_rows.stop)
    kv_rows = slice(shard.kv_rows.start, shard.kv_rows.stop)
    packed = torch.cat([case.q[:, rows], case.k[:, kv_rows], case.v[:, kv_rows]], dim=-1)
    width = packed.shape[1]
    stride = width + spare_columns
    storage = torch.full((case.tokens * stride + offset,), 5.0, dtype=packed.dtype)
    strided = storage.to(device or "cpu").as_strided((case.tokens, width), (stride, 1), offset)
    strided.copy_(packed)
    q, k, v = strided.split([shard.q_width, shard.kv_width, shard.kv_width], dim=-1)

    def there(x: torch.Tensor) -> torch.Tensor:
        return x.to(device or "cpu").contiguous()

    norm = Norm(
        there(case.q_weight[rows]),
        there(case.k_weight[kv_rows]),
        shard.q_divisor,
        shard.k_divisor,
        case.eps,
    )
    rotation = None
    if case.positions is not None and case.cos_sin_cache is not None:
        rotation = Rotation(there(case.positions), there(case.cos_sin_cache), case.head_dim)
    cache = None
    if case.slots is not None:
        buffers = [_cache(case, shard.kv_heads, gap, device or "cpu") for gap in (16, 48)]
        slots = there(case.slots)
        cache = CacheWrite(v, *buffers, slots, *case.scales, first_slot=case.first_slot)
    return Rank(shard, strided, q, k, v, norm, rotation, cache)


def _cache(case: Case, kv_heads: int, gap: int, device: str) -> torch.Tensor:
    """A K or V cache whose slots lie `gap` elements further apart than they must, full of 7."""
    assert case.cache_dtype is not None
    slots, width = cache_slots(case.tokens), kv_heads * case.head_dim
    stride = width + gap
    page = case.page_size or 1
    assert slots % page == 0
    page_stride = page * stride + gap
    # As bytes or numbers of one size: FP8 has no fill.
    storage = torch.full((slots // page * page_stride,), 7.0, device=device).to(case.cache_dtype)
    if case.page_size:
        shape = (slots // page, page, kv_heads, case.head_dim)
        return storage.as_strided(shape, (page_stride, stride, case.head_dim, 1))
    return storage.as_strided((slots, kv_heads, case.head_dim), (page_stride, case.head_dim, 1))


@dataclass(frozen=True)
class Outcome:
    """What a rank must hold after the call: fp64 values before the one rounding, and magnitudes.

    q, k: [tokens, width]. k_cache, v_cache: [tokens, width] before rounding, divided by the scale;
    None without a cache. q_size, k_size: |y_i| + |y_partner|, since a rotation can cancel.
    """

    q: torch.Tensor
    k: torch.Tensor
    q_size: torch.Tensor
    k_size: torch.Tensor
    k_cache: torch.Tensor | None
    v_cache: torch.Tensor | None


def truth(case: Case, size: int, rank: int) -> Outcome:
    """The formula in fp64 on the unsplit projection, then this rank's columns."""
    shard = AttentionShard(size, rank, case.head_dim, *case.heads)
    q, q_size = _exact(case, case.q, case.q_weight, shard.q_rows)
    k, k_size = _exact(case, case.k, case.k_weight, shard.kv_rows)
    k_cache = v_cache = None
    if case.cache_dtype is not None:
        v = case.v[:, shard.kv_rows.start : shard.kv_rows.stop].double()
        k_cache, v_cache = k / case.scales[0], v / case.scales[1]
    return Outcome(q, k, q_size, k_size, k_cache, v_cache)


def _exact(
    case: Case, x: torch.Tensor, weight: torch.Tensor, rows: range
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.double()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + case.eps) * weight.double()
    y = y[:, rows.start : rows.stop]
    if case.positions is None or case.cos_sin_cache is None:
        return y, y.abs()
    half = case.cos_sin_cache.shape[1] // 2
    # As complex numbers, so that the oracle shares no line with the reference.
    angles = case.cos_sin_cache[case.positions].double()
    turn = torch.complex(angles[:, :half], angles[:, half:]).unsqueeze(1)
    heads = y.unflatten(-1, (-1, case.head_dim)).clone()
    size = heads.abs()
    pairs = torch.complex(heads[..., :half], heads[..., half : 2 * half])
    turned = pairs * turn
    # A NaN or infinity in one of a pair spoils both, as in (a cos - b sin, b cos + a sin).
    heads[..., :half], heads[..., half : 2 * half] = turned.real, turned.imag
    both = size[..., :half] + size[..., half : 2 * half]
    size[..., :half], size[..., half : 2 * half] = both, both
    return heads.flatten(1), size.flatten(1)


def bound(
    want: torch.Tensor, size: torch.Tensor, dtype: torch.dtype, *, truncated: bool = False
) -> torch.Tensor:
    """How far a stored value may lie from the fp64 one: one rounding and the fp32 arithmetic.

    truncated: a whole unit in the last place instead of half of it (Triton's interpreter).
    """
    unit, subnormal = UNIT[dtype]
    rounding = want.abs() * unit + subnormal
    return rounding * (2 if truncated else 1) * (1 + 2.0**-10) + ARITHMETIC * size


def assert_outcome(rank: Rank, want: Outcome, case: Case, *, truncated: bool = False) -> None:
    """Everything the call wrote is within the bound of `want`, and nothing else was written."""
    close("q", rank.q, want.q, want.q_size, truncated)
    close("k", rank.k, want.k, want.k_size, truncated)
    v = case.v[:, rank.shard.kv_rows.start : rank.shard.kv_rows.stop]
    assert _same_bits(rank.v.cpu(), v), "v was written to"
    if rank.cache is None:
        return
    assert want.k_cache is not None
    assert want.v_cache is not None
    slots = rank.cache.slots.cpu()
    kept = slots >= rank.cache.first_slot
    for name, buffer, exact, size in (
        ("K cache", rank.cache.k_cache, want.k_cache, want.k_size / case.scales[0]),
        ("V cache", rank.cache.v_cache, want.v_cache, want.v_cache.abs()),
    ):
        stored = _slots_of(buffer, exact.shape[1])
        largest = torch.finfo(buffer.dtype).max
        if buffer.dtype in FP8_TYPES:  # saturated; and what is saturated has no error left
            exact, size = exact.clamp(-largest, largest), size.clamp(max=largest)
        close(name, stored[slots[kept]], exact[kept], size[kept], truncated, buffer.dtype)
        others = torch.ones(stored.shape[0], dtype=torch.bool)
        others[slots[kept]] = False
        assert (stored[others] == 7).all(), f"the {name} was written where no slot said so"


def close(
    name: str,
    got: torch.Tensor,
    want: torch.Tensor,
    size: torch.Tensor,
    truncated: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """got, in any dtype, is within `bound` of want, fp64; NaN and infinity where want has them.

    A want beyond the dtype is infinite there, or the largest value if it is that close.
    """
    dtype = dtype or got.dtype
    got = got.cpu().double()
    # What overflows the stored type is infinite there.
    stored = torch.where(want.abs() > torch.finfo(dtype).max, want.sign() * torch.inf, want)
    _assert_within(name, got, want, bound(want, size, dtype, truncated=truncated), stored)


def _assert_within(
    name: str, got: torch.Tensor, want: torch.Tensor, limit: torch.Tensor, stored: torch.Tensor
) -> None:
    """got is `stored`, or lies within `limit` of want where want is finite; all fp64."""
    # Nothing finite is near an infinity, whose limit is infinite too.
    near = want.isfinite() & ((got - want).abs() <= limit)
    right = (got == stored) | (got.isnan() & stored.isnan()) | near
    if not right.all():
        row, column = (~right).nonzero()[0].tolist()
        raise AssertionError(
            f"{name}: {int((~right).sum())} of {right.numel()} values are off, the first at "
            f"token {row}, column {column}: {got[row, column]} where {stored[row, column]} was "
            f"right (within {limit[row, column]})"
        )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def correctly_rounded_share(got: torch.Tensor, want: torch.Tensor) -> float:
    """The share of values that are `want` (fp64) rounded once: two roundings lower it visibly."""
    return float((got.cpu().double() == want.to(got.dtype).double()).double().mean())


def assert_rounded_once(case: Case, ranks: list[Rank]) -> None:
    """The K caches, FP8, come from the fp32 values and not from what was rounded before."""
    for rank in ranks:
        want = truth(case, len(ranks), rank.shard.rank)
        assert rank.cache is not None
        assert want.k_cache is not None
        slots = rank.cache.slots.cpu()
        kept = slots >= rank.cache.first_slot
        dtype = rank.cache.k_cache.dtype
        largest = torch.finfo(dtype).max
        got = _slots_of(rank.cache.k_cache, want.k_cache.shape[1])[slots[kept]]
        # fp32 arithmetic puts a value on the other side of a tie once in some thousands; rounding
        # to bf16 first, once in some tens.
        exact = want.k_cache[kept].clamp(-largest, largest)
        share = correctly_rounded_share(got.to(dtype), exact)
        assert share > 0.999, f"{share:.4f} of the values are rounded once"


def run_group(
    case: Case,
    size: int,
    run: Callable[[Call], None],
    sums_of: Callable[[Rank], torch.Tensor] | None = None,
    **layout: int,
) -> list[Rank]:
    """Run every rank of a group in this process, with the collective taken from `sums_of`.

    sums_of: a rank's own [tokens, 2] sums before anything is written; the reference's by default.
    The reduce that ranks are given checks that they offer those sums, and returns the total.
    """
    ranks = [cut(case, size, rank, **layout) for rank in range(size)]
    own = [
        (sums_of or (lambda rank: reference.square_sums(rank.q, rank.k)))(rank) for rank in ranks
    ]
    total = torch.stack(own).sum(0)
    for rank, mine in zip(ranks, own, strict=True):

        def reduce(sums: torch.Tensor, mine: torch.Tensor = mine) -> torch.Tensor:
            torch.testing.assert_close(
                sums.cpu().float(), mine.cpu().float(), rtol=1e-5, atol=0, equal_nan=True
            )
            return total.to(sums)

        run(rank.call(Group(size, reduce if size > 1 else None)))
    return ranks


def assert_same_as_fp32_reference(case: Case, ranks: list[Rank]) -> None:
    """Where fp64 is no judge (sums that overflow fp32): infinities and NaN as the reference has.

    Both values come from fp32 arithmetic of their own, in another order, and one rounding, so they
    may lie two bounds apart.
    """
    size = len(ranks)
    flat = replace(case, positions=None, cos_sin_cache=None)
    rights = run_group(case, size, reference.run)
    for rank, right, unturned in zip(
        ranks, rights, run_group(flat, size, reference.run), strict=True
    ):
        k_size = _sizes(unturned.k, case)
        for name, size_of in (("q", _sizes(unturned.q, case)), ("k", k_size)):
            got, want = (getattr(x, name).cpu().double() for x in (rank, right))
            _assert_within(name, got, want, 2 * bound(want, size_of, rank.q.dtype), want)
        if rank.cache is None or right.cache is None:
            continue
        slots = right.cache.slots
        kept = slots >= right.cache.first_slot
        # All that is done to v is one correctly rounded division, and one rounding to FP8.
        for name, scale in (("k_cache", case.scales[0]), ("v_cache", None)):
            got_buffer, buffer = getattr(rank.cache, name), getattr(right.cache, name)
            width = right.k.shape[1]
            got, want = (_slots_of(x, width).double() for x in (got_buffer, buffer))
            limit = torch.zeros_like(want)  # where no slot says so, nothing may be written
            if scale is not None:
                step = torch.where(k_size.isfinite(), k_size / scale, 0)[kept]
                if buffer.dtype in FP8_TYPES:  # what is saturated has no error left
                    step = step.clamp(max=torch.finfo(buffer.dtype).max)
                limit[slots[kept]] = 2 * bound(want[slots[kept]], step, buffer.dtype)
            _assert_within(name, got, want, limit, want)


def _sizes(unturned: torch.Tensor, case: Case) -> torch.Tensor:
    """|y_i| + |y_partner|, as in `Outcome`, of what was normed and not rotated."""
    size = unturned.double().abs()
    if case.cos_sin_cache is None:
        return size
    half = case.cos_sin_cache.shape[1] // 2
    heads = size.unflatten(-1, (-1, case.head_dim)).clone()
    both = heads[..., :half] + heads[..., half : 2 * half]
    heads[..., :half], heads[..., half : 2 * half] = both, both
    return heads.flatten(1)


def _slots_of(buffer: torch.Tensor, width: int) -> torch.Tensor:
    """A K or V cache as [slots, width] fp32 on the CPU, paged or not."""
    return buffer.cpu().float().flatten(-2).reshape(-1, width)
