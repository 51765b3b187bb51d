"""The prologue's CUDA source, run on a CPU, against fp64: arithmetic, indexing, exchange.

`test_cuda_source_mistakes.py` plants mistakes in the source and sees the same checks notice them.
Not covered: what only hardware has (rsqrtf's last bit, FMA contraction, timing, the PTX itself).
"""

from __future__ import annotations

import functools

import pytest
import torch

from tests.kernels import cases
from tests.kernels.on_cpu import emulator, prologue, scenarios
from tests.kernels.on_cpu.prologue import Exchange, Options
from tests.kernels.on_cpu.scenarios import assert_right

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=emulator.missing())

BF16, FP16 = torch.bfloat16, torch.float16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# (dtype, cache): each group takes three of them by default, the others are slow.
TYPES = [
    *((BF16, cache) for cache in (E4M3, None, BF16, E5M2)),
    *((FP16, cache) for cache in (FP16, E4M3, E5M2, None)),
]


def default(group: int, kind: int) -> bool:
    return kind in (group % 4, 4 + group % 4) or (kind == 0 and group in (0, 4))


WAYS = [
    pytest.param(heads, size, *types, marks=() if default(i, j) else pytest.mark.slow)
    for i, (heads, size) in enumerate(cases.GROUPS)
    for j, types in enumerate(TYPES)
]


@functools.cache
def kernels(*shapes: prologue.Shape) -> prologue.Kernels:
    return prologue.Kernels(shapes)


@pytest.mark.parametrize(("heads", "size", "dtype", "cache"), WAYS)
def test_every_group(heads, size, dtype, cache):
    make = functools.partial(cases.make_case, dtype=dtype, heads=heads, cache_dtype=cache)
    shape = prologue.Shape.of(make(1), size)
    exchange = Exchange(size, 8)
    for tokens in (0, 1, 2, 7):
        case = make(tokens, page_size=16 if tokens == 7 else 0, seed=tokens)
        if tokens == 7:
            case = case.with_rows(cases.SPECIALS)
        options = Options(seed=tokens + size, blocks=5)
        ranks = prologue.run_case(kernels(shape), case, size, exchange, options)
        if tokens:  # without any, nothing is launched
            assert_right(case, ranks)
    assert exchange.epochs() == [4 if size > 1 else 1] * size


@pytest.mark.parametrize("tokens", [64, pytest.param(513, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("heads", "size"), cases.GROUPS)
def test_many_tokens(heads, size, tokens):
    case = cases.make_case(tokens, heads=heads, cache_dtype=E4M3)
    shape = prologue.Shape.of(case, size)
    exchange, options = Exchange(size, tokens), Options(seed=size, blocks=8)
    assert_right(case, prologue.run_case(kernels(shape), case, size, exchange, options))


VIRTUAL = ((cases.PUBLISHED, 16), (cases.THIRDS, 6))


@pytest.mark.parametrize(
    ("heads", "size"),
    [pytest.param(*g, marks=() if g in VIRTUAL else pytest.mark.slow) for g in cases.GROUPS],
)
def test_virtual_ranks(heads, size):
    case = cases.make_case(7, heads=heads, cache_dtype=E4M3).with_rows(cases.SPECIALS)
    shape = prologue.Shape.of(case, size, virtual=True)
    exchange = Exchange(size, 8)
    for call in range(3):
        options = Options(seed=call, blocks=1 + call, virtual=True)
        assert_right(case, prologue.run_case(kernels(shape), case, size, exchange, options))
    assert exchange.epochs() == [4 if size > 1 else 1] * size


@pytest.mark.parametrize(
    ("size", "rotary_dim", "head_dim"), [(1, 0, 128), (8, 128, 128), (2, 32, 64)]
)
def test_other_rotations_and_heads(size, rotary_dim, head_dim):
    case = cases.make_case(7, FP16, rotary_dim=rotary_dim, head_dim=head_dim, cache_dtype=FP16)
    shape = prologue.Shape.of(case, size)
    assert_right(case, prologue.run_case(kernels(shape), case, size, spare_columns=0))


@pytest.mark.parametrize("widths", [("int", "int"), ("int", "long"), ("long", "int")])
@pytest.mark.parametrize("size", [1, 16])
def test_narrow_indices(size, widths):
    case = cases.with_indices(cases.make_case(7, cache_dtype=E4M3), *widths)
    shape = prologue.Shape.of(case, size)
    assert_right(case, prologue.run_case(kernels(shape), case, size))


@pytest.mark.parametrize("size", [1, 16])
def test_fp8_is_rounded_once(size):
    case = cases.make_case(1, cache_dtype=E4M3)
    scenarios.rounded_once(kernels(prologue.Shape.of(case, size)), size)


@pytest.mark.parametrize("eps", [0.0, cases.EPS])
@pytest.mark.parametrize(("size", "cache"), [(1, BF16), (16, E4M3), (1, E5M2)])
def test_beyond_fp32_it_does_what_the_fp32_reference_does(size, cache, eps):
    case = cases.make_case(8, cache_dtype=cache, eps=eps).with_rows(cases.BEYOND_FP32)
    shape = prologue.Shape.of(case, size)
    ranks = prologue.run_case(kernels(shape), case, size)
    cases.assert_same_as_fp32_reference(case, ranks)


def test_offsets_beyond_32_bits():
    case = cases.make_case(1, cache_dtype=E4M3)
    scenarios.offsets_beyond_32_bits(kernels(prologue.Shape.of(case, 2)))


@pytest.mark.parametrize(
    ("group", "seeds"), [(scenarios.THREE, 12), (scenarios.TWO, 12), (scenarios.SIX, 6)]
)
@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("first", [1, scenarios.LAST_EPOCH - 4])
def test_a_sequence_of_calls(group, seeds, overlaps, first):
    heads, size = group
    compiled = kernels(scenarios.small_shape(heads, size))
    furthest = 0
    for seed in range(seeds):
        exchange = Exchange(size, scenarios.SLOTS, epoch=first)
        # Words of calls just gone by, which must not be taken for new ones.
        for tag in (first - 2, first - 1):
            exchange.plant(max(tag, 0), 1e3)
        early = overlaps and seed % 2 == 1
        options = Options(seed, blocks=1 + seed % 4, overlaps=overlaps, launch_early=early)
        furthest = max(furthest, scenarios.sequence(compiled, heads, exchange, options))
    assert furthest == 1  # as far as the protocol lets a rank get


@pytest.mark.slow
@pytest.mark.parametrize("group", [scenarios.THREE, scenarios.TWO, scenarios.SIX])
def test_a_sequence_of_calls_under_many_schedules(group):
    heads, size = group
    compiled = kernels(scenarios.small_shape(heads, size))
    for seed in range(300):
        exchange = Exchange(size, scenarios.SLOTS, epoch=scenarios.LAST_EPOCH - seed % 16)
        options = Options(seed, 1 + seed % 4, seed % 2 == 1, launch_early=seed % 4 == 3)
        scenarios.sequence(compiled, heads, exchange, options)


@pytest.mark.parametrize("seed", range(4))
def test_tags_wrap_around(seed):
    heads, size = scenarios.TWO
    scenarios.wrap(kernels(scenarios.small_shape(heads, size)), seed)
