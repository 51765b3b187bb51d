"""The reference against fp64 over whole groups, and that the cases notice plausible mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from jit_kernels.qk_norm_rope import reference
from jit_kernels.qk_norm_rope.contract import Call, Group, check
from tests.kernels import cases

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def agrees(case: cases.Case, size: int, run=reference.run) -> bool:
    ranks = cases.run_group(case, size, run)
    try:
        for rank in ranks:
            cases.assert_outcome(rank, cases.truth(case, size, rank.shard.rank), case)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize(("heads", "size"), cases.GROUPS)
@pytest.mark.parametrize("cache", [None, torch.bfloat16, E4M3, E5M2])
def test_every_group(heads, size, cache):
    case = cases.make_case(7, heads=heads, cache_dtype=cache).with_rows(cases.SPECIALS)
    for rank in cases.run_group(case, size, reference.run, spare_columns=8):
        cases.assert_outcome(rank, cases.truth(case, size, rank.shard.rank), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rotary_dim", [0, 64, 128])
def test_other_types_rotations_and_pages(dtype, rotary_dim):
    for page_size in (0, 16):
        case = cases.make_case(
            5, dtype, rotary_dim=rotary_dim, cache_dtype=dtype, page_size=page_size
        ).with_rows(cases.SPECIALS)
        for rank in cases.run_group(case, 16, reference.run, offset=1):
            cases.assert_outcome(rank, cases.truth(case, 16, rank.shard.rank), case)


def test_fp8_is_rounded_once():
    case = cases.make_case(64, cache_dtype=E4M3)
    (rank,) = cases.run_group(case, 1, reference.run)
    want = cases.truth(case, 1, 0)
    kept = rank.cache.slots >= rank.cache.first_slot
    got = rank.cache.k_cache.float().flatten(1)[rank.cache.slots[kept]]
    exact = want.k_cache[kept].clamp(-448, 448)
    assert ((got.double() == exact.to(E4M3).double()).double().mean()) > 0.999
    twice = want.k.to(torch.bfloat16).double()[kept] / case.scales[0]
    assert ((got.double() == twice.to(E4M3).double()).double().mean()) < 0.99


def local_variance(call: Call) -> None:
    reference.run(replace(call, group=Group()))


def eps_on_the_sum(call: Call) -> None:
    norm = replace(call.norm, eps=call.norm.eps / call.norm.q_divisor)
    reference.run(replace(call, norm=norm))


def replicas_not_counted(call: Call) -> None:
    norm = replace(call.norm, k_divisor=8 * 128)
    reference.run(replace(call, norm=norm))


def wrong_half(call: Call) -> None:
    rotation = call.rotation
    cos, sin = rotation.cos_sin_cache.chunk(2, dim=-1)
    swapped = torch.cat([sin, cos], dim=-1).contiguous()
    reference.run(replace(call, rotation=replace(rotation, cos_sin_cache=swapped)))


def no_rotation(call: Call) -> None:
    reference.run(replace(call, rotation=None))


def stale_k_in_the_cache(call: Call) -> None:
    before = call.k.clone()
    reference.run(call)
    kept = call.cache.slots >= call.cache.first_slot
    rows = reference.stored(before[kept], E5M2, call.cache.k_scale)
    rows = rows.view(-1, *call.cache.k_cache.shape[1:]).view(torch.uint8)
    call.cache.k_cache.view(torch.uint8)[call.cache.slots[kept]] = rows


def padding_written(call: Call) -> None:
    slots = call.cache.slots.clone()
    slots[slots < 0] += call.cache.k_cache.shape[0]
    reference.run(replace(call, cache=replace(call.cache, slots=slots)))


def not_saturated(call: Call) -> None:
    stored = reference.stored
    reference.stored = lambda x, dtype, scale: (x / scale).to(dtype)
    try:
        reference.run(call)
    finally:
        reference.stored = stored


WRONG = (
    local_variance,
    eps_on_the_sum,
    replicas_not_counted,
    wrong_half,
    no_rotation,
    stale_k_in_the_cache,
    padding_written,
    not_saturated,
)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_plausible_mistake_is_noticed(wrong):
    # E5M2, which PyTorch's own conversion does not saturate.
    case = cases.make_case(7, cache_dtype=E5M2).with_rows(cases.SPECIALS)
    assert agrees(case, 16)
    assert not agrees(case, 16, wrong)


def call(**changes) -> Call:
    rank = cases.cut(cases.make_case(4, cache_dtype=E4M3), 8, 0)
    return replace(rank.call(Group(8)), **changes)


def cache(**changes):
    return replace(call().cache, **changes)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lambda: call(q=call().q[:3]), "not two matrices of as many rows"),
        (lambda: call(q=call().q.t().contiguous().t()), "the inner stride of q is 4, not 1"),
        (lambda: call(k=call().k.float()), "k is torch.float32 where q is torch.bfloat16"),
        (
            lambda: call(norm=replace(call().norm, k_weight=torch.ones(3))),
            r"the weight of k is \(3,\), not a contiguous \[128\]",
        ),
        (
            lambda: call(rotation=replace(call().rotation, positions=torch.zeros(3).long())),
            r"positions are \(3,\) torch.int64, not \[4\]",
        ),
        (
            lambda: call(rotation=replace(call().rotation, head_dim=32)),
            "64 rotated dimensions do not fit heads of 32",
        ),
        (lambda: call(cache=cache(v=call().q)), "v is .* where k is"),
        (lambda: call(cache=cache(slots=torch.zeros(4))), "slots are .* torch.float32"),
        (
            lambda: call(cache=cache(v_cache=call().cache.v_cache.to(E5M2))),
            "differ in dtype or shape",
        ),
        (
            lambda: call(
                cache=cache(
                    k_cache=call().cache.k_cache.bfloat16(), v_cache=call().cache.v_cache.bfloat16()
                )
            ),
            "takes no scale",
        ),
        (
            lambda: call(
                cache=cache(k_cache=torch.zeros(64, 2, 128), v_cache=torch.zeros(64, 2, 128))
            ),
            "its rows are not 128 wide",
        ),
    ],
)
def test_a_malformed_call_is_refused_in_one_sentence(changed, says):
    check(call())
    with pytest.raises(ValueError, match=says):
        check(changed())


def overwritten(name: str, slot: int, value: float) -> Callable[[cases.Rank], None]:
    """A slot of a rank's cache, dense or paged, that holds something else."""

    def change(rank: cases.Rank) -> None:
        buffer = getattr(rank.cache, name)
        row = buffer[slot] if buffer.dim() == 3 else buffer[slot // 16, slot % 16]
        row.copy_(torch.full(row.shape, value).to(row.dtype))

    return change


# Of `BEYOND_FP32` in slots 3 to 5: a sum that overflows, zeros, an infinity; in 9 an ordinary row.
CHANGES = (
    overwritten("k_cache", 4, 0.0),  # NaN
    overwritten("v_cache", 3, 0.0),
    overwritten("v_cache", 5, 0.0),
    overwritten("k_cache", 9, 1.0),
    overwritten("k_cache", 20, 1.0),  # no token's
    overwritten("v_cache", 0, 1.0),  # of padding
)


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("cache", [torch.bfloat16, E4M3, E5M2])
def test_beyond_fp32_a_wrong_cache_is_noticed(cache, page_size):
    case = cases.make_case(7, cache_dtype=cache, page_size=page_size, eps=0.0)
    case = case.with_rows(cases.BEYOND_FP32)
    case = replace(case, slots=torch.tensor([3, 4, -1, 0, -1, 5, 9]))
    ranks = cases.run_group(case, 8, reference.run)
    cases.assert_same_as_fp32_reference(case, ranks)
    for change in CHANGES:
        ranks = cases.run_group(case, 8, reference.run)
        change(ranks[3])
        with pytest.raises(AssertionError, match="values are off"):
            cases.assert_same_as_fp32_reference(case, ranks)


@pytest.mark.parametrize("got", [0.0, 1.0, -torch.inf, torch.nan])
def test_nothing_but_infinity_is_infinity(got):
    want = torch.tensor([[torch.inf]], dtype=torch.float64)
    cases.close("x", want.bfloat16(), want, want.abs())
    with pytest.raises(AssertionError, match="1 values are off"):
        cases.close("x", torch.full((1, 1), got).bfloat16(), want, want.abs())


def test_beyond_the_type_is_infinity_or_nearly_the_largest():
    want = torch.tensor([[65510.0, 65600.0]], dtype=torch.float64)  # fp16: 65504 at most
    for right in ([torch.inf, torch.inf], [65504.0, torch.inf]):
        cases.close("x", torch.tensor([right]).half(), want, want)
    with pytest.raises(AssertionError, match="token 0, column 1"):
        cases.close("x", torch.tensor([[torch.inf, 65504.0]]).half(), want, want)
