"""The tests of the Triton prologue; `test_triton_prologue` runs this file, pytest does not find it.

Triton decides when it is imported whether kernels are interpreted, and another test may have
imported it by then: so this file runs in a process of its own, with TRITON_INTERPRET=1 on the CPU,
without it on a GPU. The interpreter truncates to bf16 where a GPU rounds, hence a bound of a whole
unit in the last place for it; fp32 cases judge the arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl

from jit_kernels.qk_norm_rope import reference
from jit_kernels.qk_norm_rope import triton as implementation
from jit_kernels.qk_norm_rope.contract import Call, Group, Request
from jit_kernels.qk_norm_rope.triton_kernels import _fp8_bits
from tests.kernels import cases

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on NaN and infinity


@pytest.fixture(scope="module", autouse=True)
def quick_interpreter():
    """Twice as fast: patch Triton's language once, not at each call, and let int32 wrap unchecked.

    Nothing else runs in this process. It wraps on a GPU as well.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    class Kept:
        def restore(self) -> None:
            pass

    patch, builder, seen = interpreter._patch_lang, interpreter.interpreter_builder, set()

    def patch_once(function: Callable) -> Kept:
        languages = frozenset(
            id(x) for x in function.__globals__.values() if x is tl or x is tl.core
        )
        if languages not in seen:
            seen.add(languages)
            patch(function)
        return Kept()

    interpreter._patch_lang = patch_once
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    yield


def prepared(case: cases.Case, size: int, module: ModuleType = implementation):
    """What serves the calls of a group of `size` ranks of `case`."""
    shard = cases.cut(case, size, 0).shard
    rotary_dim = 0 if case.cos_sin_cache is None else case.cos_sin_cache.shape[1]
    request = Request(
        DEVICE,
        case.q.dtype,
        shard.q_width // case.head_dim,
        shard.kv_heads,
        case.head_dim,
        rotary_dim,
        case.cache_dtype,
        size,
    )
    assert module.refusal(request) is None
    return module.prepare(request)


def verify(case: cases.Case, size: int, module: ModuleType = implementation, **layout) -> None:
    """Every rank of the group against fp64."""
    ranks = cases.run_group(case, size, prepared(case, size, module), device=DEVICE, **layout)
    for rank in ranks:
        want = cases.truth(case, size, rank.shard.rank)
        cases.assert_outcome(rank, want, case, truncated=INTERPRETED)


@pytest.mark.parametrize(("heads", "size"), cases.GROUPS)
@pytest.mark.parametrize(("dtype", "cache"), [(BF16, E4M3), (FP32, FP32)])
def test_every_group(heads, size, dtype, cache):
    case = cases.make_case(5, dtype, heads=heads, cache_dtype=cache, page_size=16)
    verify(case.with_rows(cases.SPECIALS), size, spare_columns=8)


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("size", [1, 2])
def test_every_size_of_a_batch(tokens, size):
    verify(cases.make_case(tokens, heads=(6, 2), cache_dtype=BF16), size)


@pytest.mark.slow
def test_513_tokens():
    verify(cases.make_case(513, cache_dtype=E4M3), 1)


@pytest.mark.slow
def test_16384_tokens():
    """Interpreted, a token takes as long as it has operations: there, one narrow head's norm."""
    if INTERPRETED:
        verify(cases.make_case(16384, heads=(1, 1), head_dim=32, rotary_dim=0), 1)
    else:
        verify(cases.make_case(16384, cache_dtype=E4M3), 1)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "size"), cases.GROUPS)
@pytest.mark.parametrize(("cache", "page_size"), [(None, 0), (BF16, 0), (BF16, 16), (E5M2, 16)])
def test_every_group_and_cache(heads, size, cache, page_size):
    case = cases.make_case(5, heads=heads, cache_dtype=cache, page_size=page_size)
    verify(case.with_rows(cases.SPECIALS), size, offset=8)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("cache", [None, "same", E4M3, E5M2])
@pytest.mark.parametrize("rotary_dim", [0, 64, 128])
def test_every_type_and_combination(dtype, cache, rotary_dim):
    case = cases.make_case(
        5,
        dtype,
        heads=cases.THIRDS,
        rotary_dim=rotary_dim,
        cache_dtype=dtype if cache == "same" else cache,
        page_size=16 if rotary_dim else 0,
    )
    # One launch, or two: half of the combinations each.
    verify(case.with_rows(cases.SPECIALS), 1 if rotary_dim == 64 else 3)


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(32, 32), (32, 2), (64, 20), (96, 32), (256, 64), (256, 250)]
)
def test_other_heads(head_dim, rotary_dim):
    """Any even number of rotated dimensions; heads of 96 are not even a power of two."""
    case = cases.make_case(
        3, FP32, heads=(5, 1), head_dim=head_dim, rotary_dim=rotary_dim, cache_dtype=FP32
    )
    verify(case, 1)
    verify(case, 5)


@pytest.mark.parametrize("layout", [{"offset": 1}, {"spare_columns": 3}, {"spare_columns": 4096}])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_any_alignment_and_row_stride(layout, dtype):
    verify(cases.make_case(3, dtype, heads=cases.THIRDS, cache_dtype=E4M3), 3, **layout)


@pytest.mark.parametrize("widths", [("int", "int"), ("int", "long"), ("long", "int")])
@pytest.mark.parametrize("page_size", [0, 16])
def test_indices_of_32_bits_and_narrow_angles(page_size, widths):
    case = cases.make_case(5, heads=cases.THIRDS, cache_dtype=BF16, page_size=page_size)
    case = replace(case, cos_sin_cache=case.cos_sin_cache.bfloat16())
    verify(cases.with_indices(case, *widths), 1)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("eps", [cases.EPS, 0.0])
def test_beyond_fp32_and_without_eps_as_the_reference(dtype, size, eps):
    """A row of zeros without eps is NaN, one whose sum overflows is zero; neither is special."""
    case = cases.make_case(6, dtype, heads=cases.THIRDS, eps=eps)
    verify(case.with_rows(cases.SPECIALS), size)
    cache = E4M3 if size == 1 else dtype
    case = cases.make_case(8, dtype, heads=cases.THIRDS, eps=eps, cache_dtype=cache)
    case = case.with_rows(cases.BEYOND_FP32)
    ranks = cases.run_group(case, size, prepared(case, size), device=DEVICE)
    cases.assert_same_as_fp32_reference(case, ranks)
    assert (ranks[0].q[0] == 0).all()
    assert ranks[0].q[1].isnan().all() == (eps == 0)


def test_replicas_hold_the_same_bits():
    case = cases.make_case(3, cache_dtype=BF16)
    ranks = cases.run_group(case, 16, prepared(case, 16), device=DEVICE)
    for one, other in zip(ranks[::2], ranks[1::2], strict=True):
        assert torch.equal(one.k.float(), other.k.float())


@triton.jit
def fp8_kernel(x, out, scale, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)[None, :]
    tl.store(out + at, _fp8_bits(tl.load(x + at), scale, MANTISSA, BIAS, LARGEST))


def fp8_inputs(dtype: torch.dtype) -> torch.Tensor:
    """All values of the type, all midpoints and their neighbours, and random fp32 bits."""
    codes = torch.arange(128, dtype=torch.uint8).view(dtype).double()
    codes = codes[codes.isfinite()]
    middles = torch.cat([(codes[1:] + codes[:-1]) / 2, codes, codes[-1:] * 1.1]).float()
    bits = middles.view(torch.int32)
    near = torch.cat([bits, bits + 1, (bits - 1).clamp(0)]).view(torch.float32)
    random = torch.randint(-(2**31), 2**31, (60000,), generator=torch.Generator().manual_seed(3))
    special = torch.tensor([0.0, torch.inf, torch.nan, 1e-45, 1e-39, 3e38])
    x = torch.cat([near, special, -near, -special, random.int().view(torch.float32)])
    return x[: len(x) // 1024 * 1024]


def fp8_is_right(kernel, dtype: torch.dtype, scale: float) -> bool:
    x = fp8_inputs(dtype)
    want = reference.stored(x, dtype, scale)
    out = torch.zeros(x.shape, dtype=torch.uint8, device=DEVICE)
    mantissa, bias = implementation.FP8_FORMATS[dtype]
    largest = implementation._fp32_bits(torch.finfo(dtype).max)
    kernel[(len(x) // 1024,)](x.to(DEVICE), out, scale, mantissa, bias, largest)
    got, nan = out.cpu().view(dtype).float(), want.float().isnan()
    return torch.equal(got.isnan(), nan) and torch.equal(
        out.cpu()[~nan], want.view(torch.uint8)[~nan]
    )


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("scale", [1.0, 0.37, 1.7e-3])
def test_fp8_bits_are_those_of_torch(dtype, scale):
    assert fp8_is_right(fp8_kernel, dtype, scale)


def fp8_share(module: ModuleType) -> float:
    """The share of the K cache that is the fp64 truth rounded once to FP8, bf16 k beside it."""
    case = cases.make_case(6, heads=cases.THIRDS, cache_dtype=E4M3)
    ranks = cases.run_group(case, 1, prepared(case, 1, module), device=DEVICE)
    kept = case.slots >= case.first_slot
    got = ranks[0].cache.k_cache.cpu().float().flatten(1)[case.slots[kept]]
    return cases.correctly_rounded_share(got.to(E4M3), cases.truth(case, 1, 0).k_cache[kept])


def test_fp8_is_rounded_once():
    assert fp8_share(implementation) > 0.999


# A stride that fits int32 and whose double does not, and room below for an offset that wraps.
FAR, ROOM = 2**30 + 64, 2**31 + 2**12


def far_rows_agree(module: ModuleType) -> bool:
    """Whether three tokens and slots whose rows lie 2 GiB apart are served, in two launches."""
    case = cases.make_case(3, FP16, heads=(3, 1), head_dim=32, rotary_dim=16, cache_dtype=FP16)
    case = replace(case, slots=torch.tensor([2, 0, 1]), first_slot=0)
    near, want = cases.cut(case, 1, 0, device=DEVICE), cases.truth(case, 1, 0)
    # Gigabytes, of which pages exist only where they are touched (on a CPU).
    storage = torch.empty(ROOM + 2 * FAR + 4096, dtype=FP16, device=DEVICE)

    def rows(at: int, *shape: int) -> torch.Tensor:
        strides = (FAR, 1) if len(shape) == 2 else (FAR, shape[2], 1)
        return storage.as_strided(shape, strides, ROOM + at)

    q, k, v = rows(0, 3, 96), rows(512, 3, 32), rows(1024, 3, 32)
    for far, x in ((q, near.q), (k, near.k), (v, near.v)):
        far.copy_(x)
    caches = rows(1536, 3, 1, 32), rows(2048, 3, 1, 32)
    cache = replace(near.cache, v=v, k_cache=caches[0], v_cache=caches[1])
    group = Group(2, lambda sums: sums)  # one rank's sums are the whole group's
    prepared(case, 1, module)(Call(q, k, near.norm, group, near.rotation, cache))
    try:
        cases.close("q", q, want.q, want.q_size)
        cases.close("k", k, want.k, want.k_size)
        for buffer, exact in zip(caches, (want.k, want.v_cache), strict=True):
            cases.close("cache", buffer.cpu().flatten(1)[case.slots], exact, want.k_size)
    except AssertionError:
        return False
    return True


def test_offsets_beyond_32_bits():
    assert far_rows_agree(implementation)
