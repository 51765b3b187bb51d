"""The CUDA kernel on a GPU, all ranks of a group in one cooperative launch, against fp64.

Skipped without a GPU. The emulator's tests run the same kernel source on the processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from jit_kernels.qk_norm_rope import cuda, reference
from jit_kernels.qk_norm_rope.contract import Group, Request
from tests.kernels.cases import (
    BEYOND_FP32,
    EPS,
    GROUPS,
    PUBLISHED,
    SPECIALS,
    Case,
    Rank,
    assert_outcome,
    assert_rounded_once,
    assert_same_as_fp32_reference,
    cut,
    make_case,
    truth,
    with_indices,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

FP8 = torch.float8_e4m3fn
LAST_EPOCH = 0xFFFFFFFF


def stacked(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of tensors of one layout, gaps included, evenly apart in one storage."""
    first = tensors[0]
    storages = [x.new_empty(0, dtype=torch.uint8).set_(x.untyped_storage()) for x in tensors]
    room = (max(x.numel() for x in storages) + 15) // 16 * 16
    whole = torch.zeros(len(tensors), room, dtype=torch.uint8, device=first.device)
    for row, storage in zip(whole, storages, strict=True):
        row[: storage.numel()] = storage
    numbers, apart = whole.view(-1).view(first.dtype), room // first.itemsize
    return [
        numbers.as_strided(x.shape, x.stride(), x.storage_offset() + rank * apart)
        for rank, x in enumerate(tensors)
    ]


def ranks_of(case: Case, size: int, device: str = "cuda") -> list[Rank]:
    """Every rank of a group, as virtual ranks need them."""
    ranks = [cut(case, size, rank, device=device) for rank in range(size)]
    packed = stacked([rank.packed for rank in ranks])
    names = ("q_weight", "k_weight")
    weights = [stacked([getattr(rank.norm, name).clone() for rank in ranks]) for name in names]
    for n, rank in enumerate(ranks):
        shard = rank.shard
        rank.packed = packed[n]
        rank.q, rank.k, rank.v = packed[n].split(
            [shard.q_width, shard.kv_width, shard.kv_width], dim=-1
        )
        rank.norm = replace(rank.norm, q_weight=weights[0][n], k_weight=weights[1][n])
    caches = [rank.cache for rank in ranks]
    for name in ("k_cache", "v_cache"):
        if caches[0] is not None:
            for n, buffer in enumerate(stacked([getattr(cache, name) for cache in caches])):
                caches[n] = replace(caches[n], **{name: buffer})  # type: ignore[type-var]
    for rank, cache in zip(ranks, caches, strict=True):
        rank.cache = cache and replace(cache, v=rank.v, slots=caches[0].slots)  # type: ignore[union-attr]
        rank.rotation = ranks[0].rotation
    return ranks


def request_of(rank: Rank) -> Request:
    """The request that a rank's call fits."""
    return Request(
        device="cuda",
        dtype=rank.q.dtype,
        q_heads=rank.q.shape[1] // rank.shard.head_dim,
        kv_heads=rank.shard.kv_heads,
        head_dim=rank.shard.head_dim,
        rotary_dim=rank.rotation.rotary_dim if rank.rotation else 0,
        cache_dtype=rank.cache.k_cache.dtype if rank.cache else None,
        group_size=rank.shard.size,
        capability=torch.cuda.get_device_capability(),
    )


def group_for(case: Case, size: int, **options: Any) -> cuda.VirtualGroup:
    return cuda.prepare_virtual(request_of(ranks_of(case, size)[0]), **options)


def serve(group: cuda.VirtualGroup, case: Case, size: int) -> list[Rank]:
    """Serve `case` on fresh tensors and return the ranks."""
    ranks = ranks_of(case, size)
    group([rank.call(Group(size)) for rank in ranks])
    torch.cuda.synchronize()
    return ranks


def assert_right(group: cuda.VirtualGroup, case: Case, size: int) -> None:
    for n, rank in enumerate(serve(group, case, size)):
        assert_outcome(rank, truth(case, size, n), case)


@pytest.mark.parametrize(("heads", "size"), GROUPS)
@pytest.mark.parametrize(
    "options",
    [
        {"cache_dtype": torch.bfloat16},
        {"cache_dtype": FP8, "page_size": 16},
        {"cache_dtype": torch.float8_e5m2, "dtype": torch.float16},
        {"rotary_dim": 0},
        {"dtype": torch.float16},
    ],
    ids=lambda options: "-".join(str(x).removeprefix("torch.") for x in options.values()),
)
def test_every_group_is_right_back_to_back(
    heads: tuple[int, int], size: int, options: dict[str, Any]
) -> None:
    # One group object for all sizes: buffers and epochs carry over from call to call.
    group = group_for(make_case(1, heads=heads, **options), size)
    for tokens in (1, 513, 2, 7, 64, 7, 513):
        assert_right(group, make_case(tokens, heads=heads, seed=tokens, **options), size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 8])
def test_long_batch(size: int) -> None:
    case = make_case(16384, cache_dtype=torch.bfloat16)
    assert_right(group_for(case, size), case, size)


@pytest.mark.parametrize("size", [1, 2, 8, 16])
def test_special_rows_neither_hang_nor_spread(size: int) -> None:
    case = make_case(12, cache_dtype=FP8).with_rows(SPECIALS)
    assert_right(group_for(case, size), case, size)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8, torch.float8_e5m2])
@pytest.mark.parametrize("eps", [0.0, EPS])
@pytest.mark.parametrize("size", [1, 8])
def test_beyond_fp32_it_does_what_the_fp32_reference_does(
    size: int, eps: float, cache_dtype: torch.dtype
) -> None:
    case = make_case(8, cache_dtype=cache_dtype, eps=eps).with_rows(BEYOND_FP32)
    assert_same_as_fp32_reference(case, serve(group_for(case, size), case, size))


def test_ranks_of_one_kv_head_get_the_same_bits() -> None:
    case = make_case(64, cache_dtype=torch.bfloat16)
    ranks = serve(group_for(case, 16), case, 16)
    for first, second in zip(ranks[::2], ranks[1::2], strict=True):
        assert torch.equal(first.k, second.k)


@pytest.mark.parametrize("tokens", [8, 9, 23, 24])
def test_pieces(tokens: int) -> None:
    case = make_case(tokens, cache_dtype=torch.bfloat16)
    group = group_for(case, 4, slots=8)
    for _ in range(3):
        assert_right(group, case, 4)


def test_epochs_wrap_and_tag_zero_is_never_drawn() -> None:
    case = make_case(5, cache_dtype=torch.bfloat16)
    group = group_for(case, 4)
    group.channel.ticket.fill_((LAST_EPOCH - 2 << 32) - (1 << 64))  # as signed 64 bits
    epochs = []
    for _ in range(5):
        epochs.append(int(group.channel.ticket[0]) >> 32 & LAST_EPOCH)
        assert_right(group, case, 4)
    assert epochs == [LAST_EPOCH - 2, LAST_EPOCH - 1, LAST_EPOCH, 2, 3]


def test_words_that_no_call_uses_are_cleared() -> None:
    slots, few = 6, make_case(1, cache_dtype=torch.bfloat16)
    group = group_for(few, 2, slots=slots)
    assert_right(group, make_case(slots, cache_dtype=torch.bfloat16), 2)
    assert_right(group, make_case(slots, cache_dtype=torch.bfloat16), 2)
    words = group.buffers.view(2, 2, slots, 2, 2)  # [rank, half, slot, sender, which]
    assert (words != 0).all()
    for _ in range(2 * slots):
        assert_right(group, few, 2)
    assert (words[:, :, 1:] == 0).all()


def test_graph_replays_draw_fresh_epochs() -> None:
    case = make_case(7, cache_dtype=torch.bfloat16, rotary_dim=0)
    ranks = ranks_of(case, 8)
    group = cuda.prepare_virtual(request_of(ranks[0]))
    calls = [rank.call(Group(8)) for rank in ranks]
    before = [rank.packed.clone() for rank in ranks]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        group(calls)
        group(calls)
    start = group.channel.ticket.clone()
    for replay in range(3):
        for rank, packed in zip(ranks, before, strict=True):
            rank.packed.copy_(packed)
        graph.replay()
        torch.cuda.synchronize()
        assert (group.channel.ticket - start == 2 * (replay + 1) << 32).all()
    assert_normed_twice(case, ranks)


def assert_normed_twice(case: Case, ranks: list[Rank]) -> None:
    """q and k are what two calls of the reference, one after the other, make of the case.

    Of a case without rotation, which can cancel: a step of the first result would be any number of
    steps of the second.
    """
    assert case.positions is None
    size = len(ranks)
    twice = [cut(case, size, n) for n in range(size)]
    for _ in range(2):
        total = torch.stack([reference.square_sums(rank.q, rank.k) for rank in twice]).sum(0)
        for rank in twice:
            reference.apply_(rank.call(Group(size)), total)
    for got, want in zip(ranks, twice, strict=True):
        for x, right in ((got.q, want.q), (got.k, want.k)):
            # A first rounding that fell the other way, a step of 2**-7 at most, and a second one.
            torch.testing.assert_close(x.cpu(), right, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("tokens", [1, 513])
def test_lone_rank_in_a_graph_waits_for_the_kernel_before_it(tokens: int) -> None:
    case = make_case(tokens, cache_dtype=FP8)
    rank = cut(case, 1, 0, device="cuda")
    run, call = cuda.prepare(request_of(rank)), rank.call(Group())
    source, one = rank.packed.clone(), torch.ones((), dtype=rank.packed.dtype, device="cuda")
    rank.packed.zero_()
    assert rank.cache is not None
    caches = [rank.cache.k_cache, rank.cache.v_cache]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.mul(source, one, out=rank.packed)  # a kernel, as a projection is: no copy of memory
        run(call)
    for _ in range(2):
        rank.packed.zero_()
        for cache in caches:
            cache.copy_(torch.full(cache.shape, 7.0, device="cuda").to(cache.dtype))
        graph.replay()
        torch.cuda.synchronize()
        assert_outcome(rank, truth(case, 1, 0), case)


@pytest.mark.parametrize("captured", [False, True])
def test_a_dependent_launch_waits_for_the_one_before(captured: bool) -> None:
    # Two calls in a row on the same rows: the second is let onto the chip before the first ends.
    case = make_case(513, cache_dtype=torch.bfloat16, rotary_dim=0)
    rank = cut(case, 1, 0, device="cuda")
    run, call = cuda.prepare(request_of(rank)), rank.call(Group())
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(call)
            run(call)
        graph.replay()
    else:
        run(call)
        run(call)
    torch.cuda.synchronize()
    assert_normed_twice(case, [rank])


@pytest.mark.parametrize("widths", [("int", "int"), ("int", "long"), ("long", "int")])
@pytest.mark.parametrize("size", [1, 8])
def test_indices_of_either_width(size: int, widths: tuple[str, str]) -> None:
    case = with_indices(make_case(9, cache_dtype=FP8), *widths)
    assert_right(group_for(case, size), case, size)


@pytest.mark.parametrize("size", [1, 16])
def test_fp8_is_rounded_once(size: int) -> None:
    case = make_case(64, cache_dtype=FP8)
    assert_rounded_once(case, serve(group_for(case, size), case, size))


@pytest.mark.parametrize("first_slot", [0, 1])
@pytest.mark.parametrize("page_size", [0, 16])
def test_slots_below_the_first_are_left_alone(page_size: int, first_slot: int) -> None:
    case = make_case(9, cache_dtype=torch.bfloat16, page_size=page_size)
    assert case.slots is not None
    assert (case.slots == 0).any()
    case = replace(case, first_slot=first_slot)
    assert_right(group_for(case, 2), case, 2)


def test_no_tokens_launch_nothing() -> None:
    few, none = (make_case(tokens, cache_dtype=torch.bfloat16) for tokens in (1, 0))
    alone = cut(none, 1, 0, device="cuda")
    cuda.prepare(request_of(alone))(alone.call(Group()))
    group = group_for(few, 4)
    before = group.channel.ticket.clone()
    serve(group, none, 4)
    assert torch.equal(group.channel.ticket, before)
    assert_right(group, few, 4)


@pytest.mark.parametrize("page_size", [0, 16])
def test_cache_rows_beyond_32_bits(page_size: int) -> None:
    case = make_case(4, cache_dtype=FP8, page_size=page_size)
    case = replace(case, slots=torch.tensor([47, 32, 3, -1]))
    rank = cut(case, 1, 0, device="cuda")
    assert rank.cache is not None
    # The slots from 32 on lie 2^32 bytes behind the first.
    apart = 2**31 if page_size else 2**27
    shape, strides = rank.cache.k_cache.shape, (apart, *rank.cache.k_cache.stride()[1:])
    extent = 1 + sum((count - 1) * step for count, step in zip(shape, strides, strict=True))
    if torch.cuda.mem_get_info()[0] < 2 * extent + 2**30:
        pytest.skip(f"needs {2 * extent / 2**30:.0f} GiB of GPU memory")
    near = (rank.cache.k_cache, rank.cache.v_cache)
    k_cache, v_cache = (
        torch.empty(extent, dtype=FP8, device="cuda").as_strided(shape, strides).copy_(x)
        for x in near
    )
    rank.cache = replace(rank.cache, k_cache=k_cache, v_cache=v_cache)
    cuda.prepare(request_of(rank))(rank.call(Group()))
    torch.cuda.synchronize()
    for x, far in zip(near, (k_cache, v_cache), strict=True):
        x.copy_(far)  # back together, to be looked at
    rank.cache = replace(rank.cache, k_cache=near[0], v_cache=near[1])
    assert_outcome(rank, truth(case, 1, 0), case)


def test_lone_rank_through_prepare_and_alignment() -> None:
    case = make_case(9, cache_dtype=torch.bfloat16)
    rank = cut(case, 1, 0, device="cuda", spare_columns=24)
    run = cuda.prepare(request_of(rank))
    run(rank.call(Group()))
    assert_outcome(rank, truth(case, 1, 0), case)
    for layout in ({"offset": 1}, {"offset": 4}, {"spare_columns": 3}):
        rank = cut(case, 1, 0, device="cuda", **layout)
        before = rank.packed.clone()
        with pytest.raises(ValueError, match="multiple of 16"):
            run(rank.call(Group()))
        assert torch.equal(rank.packed, before)


def test_exchange_compiled_out_takes_the_own_sums() -> None:
    case, size = make_case(5, heads=PUBLISHED, rotary_dim=0), 4
    for n, rank in enumerate(serve(group_for(case, size, exchange=False), case, size)):
        want = cut(case, size, n)
        own = reference.square_sums(want.q, want.k) * size
        reference.apply_(want.call(Group(size)), own)
        # One unit in the last place: fp32 sums in another order, and no rotation that cancels.
        torch.testing.assert_close(rank.q.cpu(), want.q, rtol=2**-7, atol=2**-20)
