"""What the prologue's CUDA source must get right, as functions of compiled kernels.

`test_cuda_source_on_cpu.py` runs them on the source as it is, `test_cuda_source_mistakes.py` on
changed copies, each of which must fail one.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import replace

import torch

from tests.kernels import cases
from tests.kernels.on_cpu.prologue import Exchange, Kernels, Options, Shape, cut, run, run_case

E4M3 = torch.float8_e4m3fn
MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on

# (query heads, KV heads) of small groups: of 3 ranks, 2 ranks, and 6 with two replicas of K.
THREE, TWO, SIX = ((12, 3), 3), ((8, 4), 2), ((12, 3), 6)

# Batches in tokens; with 4 slots, 7 and 9 go in pieces, the last of which leaves blocks idle.
BATCHES = (4, 1, 7, 2, 0, 9, 3, 1, 4)
SLOTS = 4
LAST_EPOCH = 2**32 - 1


def assert_right(case: cases.Case, ranks: list[cases.Rank]) -> None:
    """Every rank agrees with fp64, and ranks that hold the same KV head have the same bits."""
    by_head: dict[range, cases.Rank] = {}
    for rank in ranks:
        cases.assert_outcome(rank, cases.truth(case, len(ranks), rank.shard.rank), case)
        twin = by_head.setdefault(rank.shard.kv_rows, rank)
        assert _same_bits(rank.k, twin.k), "replicas of K differ"
        if rank.cache is not None and twin.cache is not None:
            assert _same_bits(rank.cache.k_cache, twin.cache.k_cache), "replicas of K differ"


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = torch.int16 if a.itemsize == 2 else torch.uint8
    return torch.equal(a.view(kind), b.view(kind))


def right(kernels: Kernels, case: cases.Case, size: int, options: Options) -> None:
    """One call of a group."""
    assert_right(case, run_case(kernels, case, size, options=options))


def rounded_once(kernels: Kernels, size: int) -> None:
    """FP8 values come from fp32, not from what was rounded to bf16 before."""
    case = cases.make_case(64, cache_dtype=E4M3)
    cases.assert_rounded_once(case, run_case(kernels, case, size))


def offsets_beyond_32_bits(kernels: Kernels) -> None:
    """Rows and cache slots whose offsets pass 2^31 and 2^32 elements."""
    case = cases.make_case(4, cache_dtype=E4M3)
    ranks = [_far_apart(rank) for rank in cut(case, 2)]
    run(kernels, [(case, ranks)], Exchange(2, SLOTS), Options())
    assert_right(case, ranks)


def _far_apart(rank: cases.Rank) -> cases.Rank:
    """The rank with its rows and slots far apart, in memory of which almost nothing is touched."""
    tokens, width = rank.packed.shape
    packed = _vast((tokens, width), (2**31 - 16, 1), rank.packed.dtype).copy_(rank.packed)
    widths = [rank.shard.q_width, rank.shard.kv_width, rank.shard.kv_width]
    q, k, v = packed.split(widths, dim=-1)
    assert rank.cache is not None
    k_cache, v_cache = (
        _vast(x.shape, (2**28, *x.stride()[1:]), x.dtype).copy_(x)
        for x in (rank.cache.k_cache, rank.cache.v_cache)
    )
    cache = replace(rank.cache, v=v, k_cache=k_cache, v_cache=v_cache)
    return replace(rank, packed=packed, q=q, k=k, v=v, cache=cache)


def _vast(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    elements = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).as_strided(tuple(shape), tuple(strides))


def small(tokens: int, heads: tuple[int, int], seed: int = 0) -> cases.Case:
    """A case of few columns, for what is about the exchange."""
    return cases.make_case(tokens, heads=heads, rotary_dim=0, head_dim=64, seed=seed)


def small_shape(heads: tuple[int, int], size: int) -> Shape:
    """The shape that serves `small` cases."""
    return Shape.of(small(1, heads), size)


def launches(batches: Sequence[int], slots: int = SLOTS) -> int:
    """Launches, each an epoch, that serve batches of so many tokens."""
    return sum(-(-tokens // slots) for tokens in batches)


def after(epoch: int, calls: int) -> int:
    """The epoch so many calls later: 0 is no tag, and halves alternate across the wrap."""
    for _ in range(calls):
        epoch = 2 if epoch == LAST_EPOCH else epoch + 1
    return epoch


def sequence(
    kernels: Kernels,
    heads: tuple[int, int],
    exchange: Exchange,
    options: Options,
    batches: Sequence[int] = BATCHES,
) -> int:
    """Calls of changing size, each rank in its own time.

    Returns how many launches one rank had ended and another had not, at most.
    """
    first = exchange.epoch
    made = [small(tokens, heads, seed=call) for call, tokens in enumerate(batches)]
    calls = [(case, cut(case, exchange.size)) for case in made]
    apart = run(kernels, calls, exchange, options)
    for case, ranks in calls:
        if case.tokens:
            assert_right(case, ranks)
    end = [after(first, launches(batches, exchange.slots))] * exchange.size
    assert exchange.epochs() == end, f"the epochs are {exchange.epochs()} where {end} are right"
    return apart


def wrap(kernels: Kernels, seed: int) -> None:
    """Words that no call has used for 2^32 calls hold tags that are about to be valid again."""
    exchange = Exchange(2, SLOTS, epoch=LAST_EPOCH + 1 - 2 * SLOTS)
    for tag in (2, 3):
        exchange.plant(tag, 1e6)
    # Single tokens up to the wrap, so that only clearing reaches the other slots; then full calls.
    batches = [1] * (2 * SLOTS) + [SLOTS] * 4
    sequence(kernels, TWO[0], exchange, Options(seed, blocks=2), batches)
