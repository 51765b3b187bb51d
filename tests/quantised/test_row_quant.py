"""Quantised rows as they travel: codes, scales and values, against exact arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jit_kernels.row_quant import reference
from jit_kernels.row_quant.reference import ScaleRule
from tests.quantised import exact

GROUP, COLUMNS = 16, 32
#: Of one, of the size that checkpoints have, and what divides into no round number.
GLOBAL_SCALES = (1.0, 448 * 6 / 5.0, 0.37)
HALVES = [17, 19, 21, 23, 1.0625, 1.1875, 2**-10, 3 * 2**-10, 15 * 2**-10, -17, -19, -21, -(2**-10)]
HALVES_FP4 = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0]

Parts = tuple[list[int], list[float]]
Encode = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _fp4(scale: float) -> tuple[Encode, Callable[[list[float]], Any]]:
    return lambda x: reference.fp4_blocks(x, scale), lambda row: exact.nvfp4(row, scale)


FORMS: dict[str, tuple[Encode, Callable[[list[float]], Any]]] = {
    "fp32": (
        lambda x: reference.fp8_groups(x, GROUP),
        lambda row: exact.fp8_fp32(row, GROUP),
    ),
    "ue8m0": (
        lambda x: reference.fp8_groups(x, GROUP, ScaleRule.UE8M0),
        lambda row: exact.fp8_ue8m0(row, GROUP),
    ),
    **{f"fp4 {scale:.3g}": _fp4(scale) for scale in GLOBAL_SCALES},
}
EVERY = pytest.mark.parametrize("form", FORMS)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def ours(form: str, x: torch.Tensor) -> list[Parts]:
    codes, scales = FORMS[form][0](x)
    return list(zip(codes.view(torch.uint8).tolist(), scales.tolist(), strict=True))


def theirs(form: str, x: torch.Tensor) -> list[Parts]:
    return [FORMS[form][1](row) for row in x.tolist()]


def _filled(values: list[float], largest: float) -> torch.Tensor:
    """A row of two groups with the same largest value, so that the scale is known."""
    group = [largest, *values, *[0.0] * GROUP][:GROUP]
    return torch.tensor([[*group, *(-v for v in group)]])


EDGES = {
    "zeros": torch.zeros(2, COLUMNS),
    "negative zeros": torch.full((1, COLUMNS), -0.0),
    "a zero group": torch.cat([torch.zeros(1, 16), torch.linspace(-3, 3, 16)[None]], 1),
    "huge": torch.linspace(-60000, 60000, COLUMNS)[None],
    "subnormal": torch.linspace(-6e-8, 6e-8, COLUMNS)[None],
    "below the least": torch.full((1, COLUMNS), 1e-12),
    "one large": torch.tensor([1e4] + [1e-3] * (COLUMNS - 1))[None],
    "halfway between fp8 codes": _filled(HALVES, 448),
    "halfway between fp4 codes": _filled(HALVES_FP4, 6),
    # Of 1 and 9/8 the even code is that of 1; of 9/8 and 10/8 that of 10/8.
    "halfway between fp4 scales": torch.cat([_filled([1.0], 6 * n / 16) for n in (17, 19)]),
    "fp4 scales around the first": torch.cat(
        [_filled([1e-4, -2e-4], 6 * n / 4096) for n in (1, 2, 3, 4, 5, 11, 12, 13)]
    ),
    "fp4 scale cut off": _filled([1000.0, -2000.0, 2600.0], 6 * 480),
    # Just above, at and just below 448 * a power of two, the scale of which is one as well.
    "around powers of two": torch.cat(
        [_filled([3.3, 0.7], v) for v in (447, 448, 450, 223.5, 896)]
    ),
}


@EVERY
@DTYPES
@pytest.mark.parametrize("x", EDGES.values(), ids=EDGES)
def test_edges(form: str, x: torch.Tensor, dtype: torch.dtype) -> None:
    x = x.to(dtype)
    assert ours(form, x) == theirs(form, x)


@EVERY
@DTYPES
def test_random(form: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    size = torch.randn(60, 1, generator=generator).exp()
    x = (torch.randn(60, COLUMNS, generator=generator) * size).to(dtype)
    assert ours(form, x) == theirs(form, x)


FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
#: Halfway between two codes under some scale, or next to it.
NEAR_HALVES = st.builds(
    lambda value, power, off: value * 2.0**power * (1 + off * 2.0**-23),
    st.sampled_from([*HALVES, *HALVES_FP4, 6.0, 448.0]),
    st.integers(-4, 4),
    st.integers(-1, 1),
)


@EVERY
@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.one_of(FLOATS, NEAR_HALVES), min_size=COLUMNS, max_size=COLUMNS))
@example(values=[2.0**-149] * COLUMNS)
@example(values=[2.0**100, -(2.0**-100)] * (COLUMNS // 2))
def test_anything(form: str, values: list[float]) -> None:
    x = torch.tensor([values])
    assert ours(form, x) == theirs(form, x)


# --- back to values -----------------------------------------------------------------------------

#: Every code but the two that are no numbers.
E4M3_CODES = [code for code in range(256) if code & 127 != 127]
#: Powers of two, one that is no normal number, and others.
SCALES = [1.0, 2.0**-42, 0.1, 3e-5, 2.0**-127, 700.3]


def fp8_decodes() -> bool:
    codes = torch.tensor([E4M3_CODES[place : place + 127] for place in (0, 127)] * 3)
    scales = torch.tensor(SCALES).view(6, 1)
    found = reference.fp8_rows(codes.to(torch.uint8).view(torch.float8_e4m3fn), scales)
    return found.dtype == torch.float32 and found.tolist() == [
        exact.fp8_values(row, [Fraction(scale)], 127)
        for row, (scale,) in zip(codes.tolist(), scales.tolist(), strict=True)
    ]


def ue8m0_decodes() -> bool:
    exponents = torch.tensor([[0, 1], [85, 126], [127, 128], [253, 254]], dtype=torch.uint8)
    codes = torch.tensor([[0x38, 0x07, 0xB9, 0x01]] * 4, dtype=torch.uint8)
    found = reference.fp8_rows(codes.view(torch.float8_e4m3fn), exponents)
    return found.tolist() == [
        exact.fp8_values(row, [Fraction(2) ** (s - 127) for s in stored], 2)
        for row, stored in zip(codes.tolist(), exponents.tolist(), strict=True)
    ]


def fp4_decodes() -> bool:
    packed = torch.arange(256, dtype=torch.uint8).view(1, 256)
    scales = torch.tensor([E4M3_CODES[:127:4]], dtype=torch.uint8)
    return all(
        reference.fp4_rows(packed, scales, scale).tolist()
        == [exact.nvfp4_values(packed[0].tolist(), scales[0].tolist(), scale)]
        for scale in GLOBAL_SCALES
    )


DECODES = (fp8_decodes, ue8m0_decodes, fp4_decodes)


@pytest.mark.parametrize("check", DECODES, ids=lambda check: check.__name__)
def test_decodes(check: Callable[[], bool]) -> None:
    assert check()


@DTYPES
@pytest.mark.parametrize("rule", ScaleRule)
def test_fp8_is_near(rule: ScaleRule, dtype: torch.dtype) -> None:
    """Values come back within half a step of e4m3, of which ue8m0 may waste one bit of range."""
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(2)).to(dtype)
    back = reference.fp8_rows(*reference.fp8_groups(x, scales=rule))
    largest = x.float().unflatten(1, (2, 128)).abs().amax(-1).repeat_interleave(128, 1)
    waste = 1 if rule is ScaleRule.FP32 else 2
    # 1/16 of a value, or half of the smallest step, 2**-10, of scales of at most amax / 448.
    allowed = torch.maximum(x.float().abs() / 16, waste * largest / 448 * 2**-10) * (1 + 2**-20)
    assert ((back - x.float()).abs() <= allowed).all()


@DTYPES
def test_fp4_is_near(dtype: torch.dtype) -> None:
    """Within half a step of e2m1, 1 at most, of a scale that is rounded by 1/16 itself."""
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(2)).to(dtype)
    factor = 448 * 6 / x.float().abs().max()
    back = reference.fp4_rows(*reference.fp4_blocks(x, factor), factor)
    largest = x.float().unflatten(1, (16, 16)).abs().amax(-1).repeat_interleave(16, 1)
    assert ((back - x.float()).abs() <= largest / 6 * (17 / 16)).all()


# --- shapes and what is no number -----------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("lead", [(0,), (1,), (2, 3)])
def test_shapes(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.ones(*lead, 256, dtype=dtype)
    for rule, stored in ((ScaleRule.FP32, torch.float32), (ScaleRule.UE8M0, torch.uint8)):
        codes, scales = reference.fp8_groups(x, scales=rule)
        assert (codes.shape, codes.dtype) == ((*lead, 256), torch.float8_e4m3fn)
        assert (scales.shape, scales.dtype) == ((*lead, 2), stored)
        assert reference.fp8_rows(codes, scales).shape == x.shape
    codes, scales = reference.fp4_blocks(x, torch.tensor([2.0]))
    assert (codes.shape, codes.dtype) == ((*lead, 128), torch.uint8)
    assert (scales.shape, scales.dtype) == ((*lead, 16), torch.uint8)
    assert reference.fp4_rows(codes, scales, torch.tensor(2.0)).shape == x.shape


def test_groups_must_be_whole() -> None:
    with pytest.raises(ValueError, match="192 columns do not come in groups of 128"):
        reference.fp8_groups(torch.zeros(1, 192))
    with pytest.raises(ValueError, match="24 columns do not come in groups of 16"):
        reference.fp4_blocks(torch.zeros(1, 24), 1.0)


def test_nan_is_not_hidden() -> None:
    x = torch.ones(2, 128)
    x[1, 5] = torch.nan
    for back in (
        *(reference.fp8_rows(*reference.fp8_groups(x, scales=rule)) for rule in ScaleRule),
        reference.fp4_rows(*reference.fp4_blocks(x, 1.0), 1.0),
    ):
        assert back[1, 5].isnan()
        assert back[0].isfinite().all()


# --- against others -----------------------------------------------------------------------------


def test_fp4_codes_are_those_of_compressed_tensors() -> None:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

    steps = torch.arange(-6 * 64, 6 * 64 + 1) / 64  # each halfway point, and around it
    x = torch.nn.functional.pad(steps, (0, -len(steps) % 15)).view(-1, 15)
    x = torch.cat([torch.full((len(x), 1), 6.0), x], 1)  # so that every scale is one
    codes, scales = reference.fp4_blocks(x, 1.0)
    assert (scales == 0x38).all()
    found = unpack_fp4_from_uint8(codes, *x.shape, dtype=torch.float32)
    assert torch.equal(found, cast_to_fp4(x.clone()))
    assert torch.equal(reference.e2m1_values(codes), found)


@pytest.mark.parametrize(("rows", "groups"), [(0, 24), (1, 24), (5, 24), (8, 3), (3, 6)])
def test_packed_scales(rows: int, groups: int) -> None:
    """Four to a word, and laid out as SGLang allocates them for DeepGEMM."""
    from sglang.kernels.ops.quantization.fp8_kernel import (
        create_per_token_group_quant_fp8_output_scale as allocate,
    )

    generator = torch.Generator().manual_seed(3)
    scales = torch.randint(0, 255, (rows, groups), generator=generator).to(torch.uint8)
    found = reference.packed_ue8m0(scales)
    layout = allocate((rows, groups * 128), torch.device("cpu"), 128, True, True, True)
    assert (found.shape, found.dtype, found.stride()) == (
        layout.shape,
        layout.dtype,
        layout.stride(),
    )
    for row, words in zip(scales.tolist(), found.tolist(), strict=True):
        padded = bytes(row) + bytes(-groups % 4)
        assert words == [
            int.from_bytes(padded[at : at + 4], "little", signed=True)
            for at in range(0, len(padded), 4)
        ]


# --- wrong versions -------------------------------------------------------------------------------


def _behind(values: torch.Tensor) -> torch.Tensor:
    """What rounds up where halfway would round to even."""
    return values * (1 + 2.0**-22)


def _upwards(values: torch.Tensor) -> torch.Tensor:
    down = _TO_FP8(values)
    bits = down.view(torch.uint8) + ((down.float() < values) & (values < 448)).to(torch.uint8)
    return bits.view(torch.float8_e4m3fn)


def _not_cut_off(values: torch.Tensor) -> torch.Tensor:
    """What a cast without saturation makes of what lies beyond the largest number: NaN."""
    return torch.where(values.abs() > 448, torch.nan, values).to(torch.float8_e4m3fn)


_TO_FP8, _FP4_BLOCKS = reference._to_fp8, reference.fp4_blocks
_FP4_ROWS, _FP8_ROWS = reference.fp4_rows, reference.fp8_rows
_EXPONENTS = reference._exponents_above


def _halves_swapped(x: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = _FP4_BLOCKS(x, scale)
    return codes << 4 | codes >> 4, scales


def _nearest_power(factors: torch.Tensor) -> torch.Tensor:
    return factors.log2().round().to(torch.int32)


#: What is wrong -> the forms that must notice, the name in `reference`, and what takes its place.
WRONG: dict[str, tuple[tuple[str, ...], str, Any]] = {
    "e2m1 halfway upwards": (("fp4 1",), "_BOUNDS", (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)),
    "e2m1 halfway downwards": (
        ("fp4 1",),
        "_BOUNDS",
        tuple(_behind(torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])).tolist()),
    ),
    "e4m3 halfway upwards": (
        ("fp32", "ue8m0", "fp4 1"),
        "_to_fp8",
        lambda values: _TO_FP8(_behind(values)),
    ),
    "scales upwards": (("fp4 1", "fp4 538", "fp4 0.37"), "_to_fp8", _upwards),
    "a scale that is not cut off": (("fp4 1", "fp4 538"), "_to_fp8", _not_cut_off),
    "no least value": (("fp32",), "LEAST", 0.0),
    "1/448 one unit off": (("fp32",), "FP8_MAX_INVERSE", 1 / 448 * (1 + 2**-23)),
    "240 for 448": (("fp32",), "FP8_MAX", 240.0),
    "a power of two downwards": (
        ("ue8m0",),
        "_exponents_above",
        lambda factors: factors.log2().floor().to(torch.int32),
    ),
    "the next power of two": (("ue8m0",), "_exponents_above", lambda f: _EXPONENTS(f) + 1),
    "the nearest power of two": (("ue8m0",), "_exponents_above", _nearest_power),
    "high half first": (("fp4 1", "fp4 538", "fp4 0.37"), "fp4_blocks", _halves_swapped),
    "scale of 4 for 6": (("fp4 1", "fp4 538"), "E2M1_MAX_INVERSE", 0.25),
    "global scale inverted": (
        ("fp4 538", "fp4 0.37"),
        "fp4_blocks",
        lambda x, scale: _FP4_BLOCKS(x, 1 / scale),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rounding_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forms, attribute, wrong = WRONG[name]
    expected = {form: [theirs(form, x) for x in EDGES.values()] for form in forms}
    monkeypatch.setattr(reference, attribute, wrong)
    for form in forms:
        found = [ours(form, x) for x in EDGES.values()]
        assert found != expected[form], f"{form} does not notice"


WRONG_VALUES: dict[str, tuple[Callable[[], bool], str, Any]] = {
    "scales in another order": (
        ue8m0_decodes,
        "fp8_rows",
        lambda codes, scales: _FP8_ROWS(codes, scales.flip(-1)),
    ),
    "another bias": (ue8m0_decodes, "BIAS", 128),
    "scale divides": (fp8_decodes, "fp8_rows", lambda codes, scales: _FP8_ROWS(codes, 1 / scales)),
    "high half first": (
        fp4_decodes,
        "fp4_rows",
        lambda codes, *scales: _FP4_ROWS(codes << 4 | codes >> 4, *scales),
    ),
    "global scale multiplies": (
        fp4_decodes,
        "fp4_rows",
        lambda codes, scales, scale: _FP4_ROWS(codes, scales, 1 / scale),
    ),
    "integers of 4 bits": (fp4_decodes, "E2M1", tuple(range(8))),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_wrong_value_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, attribute, wrong = WRONG_VALUES[name]
    assert check()
    monkeypatch.setattr(reference, attribute, wrong)
    assert not check()


def test_every_power_of_two() -> None:
    """ue8m0's factors are exact: a power function may be one unit off."""
    found = reference._power_of_two(torch.arange(-127, 128, dtype=torch.int32))
    assert found.tolist() == [2.0**n for n in range(-127, 128)]
