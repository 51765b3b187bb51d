"""Rounding of activations, against a second implementation with NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_minimax.platforms.cpu.quantised import activations
from tests.quantised import rounding

GROUP, COLUMNS = 8, 32
SCALE, OFFSET, GLOBAL = 0.037, 5.0, 448 * 6 / 7.0

Round = Callable[[torch.Tensor], torch.Tensor]

PAIRS: dict[str, tuple[Round, Round]] = {
    "fp8 groups": (
        lambda x: activations.fp8_groups(x, GROUP),
        lambda x: rounding.by_row(x, lambda row: rounding.fp8_group(row, GROUP)),
    ),
    "nvfp4": (
        lambda x: activations.fp4_blocks(x, torch.tensor(GLOBAL)),
        lambda x: rounding.by_row(x, lambda row: rounding.nvfp4(row, np.float32(GLOBAL))),
    ),
    "fp8 tokens": (
        activations.fp8_tokens,
        lambda x: rounding.by_row(x, rounding.fp8_token),
    ),
    "fp8 tensor": (
        activations.fp8_tensor,
        lambda x: rounding.by_row(x, lambda row: rounding.fp8_given(row, rounding.largest(x))),
    ),
    "fp8 static": (
        lambda x: activations.fp8_static(x, torch.tensor(SCALE)),
        lambda x: rounding.by_row(x, lambda row: rounding.fp8_given(row, np.float32(SCALE))),
    ),
    "int8 tokens": (
        activations.int8_tokens,
        lambda x: rounding.by_row(x, rounding.int8_token),
    ),
    "ascend tokens": (
        activations.ascend_tokens,
        lambda x: rounding.by_row(x, rounding.ascend_token),
    ),
    "ascend static": (
        lambda x: activations.ascend_static(x, torch.tensor(SCALE), torch.tensor(OFFSET)),
        lambda x: rounding.by_row(
            x, lambda row: rounding.ascend_given(row, np.float32(SCALE), np.float32(OFFSET))
        ),
    ),
}
EVERY = pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def _ties() -> torch.Tensor:
    """448 or 127 as the largest makes the scale one; the rest lies between two codes."""
    fp8 = torch.tensor([448.0, 17, 19, 21, 23, 1.0625, 1.1875, 2**-10, 3 * 2**-10, -17, -19, -21])
    int8 = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 0.49999997, 63.5, -62.5, 0, 1])
    return torch.stack([fp8, int8]).repeat(1, 3)[:, :COLUMNS]


EDGES = {
    "zeros": torch.zeros(2, COLUMNS),
    "a zero token": torch.stack([torch.zeros(COLUMNS), torch.linspace(-3, 3, COLUMNS)]),
    "huge": torch.linspace(-60000, 60000, COLUMNS)[None],
    "denormal": torch.linspace(-6e-8, 6e-8, COLUMNS)[None],
    "below the least": torch.full((1, COLUMNS), 1e-12),
    "ties": _ties(),
    "one large": torch.tensor([1e4] + [1e-3] * (COLUMNS - 1))[None],
}


@EVERY
@DTYPES
@pytest.mark.parametrize("x", EDGES.values(), ids=EDGES)
def test_edges(ours: Round, theirs: Round, x: torch.Tensor, dtype: torch.dtype) -> None:
    x = x.to(dtype)
    found = ours(x)
    assert found.dtype == dtype
    assert found.isfinite().all()
    assert torch.equal(found, theirs(x))


@EVERY
@DTYPES
def test_random(ours: Round, theirs: Round, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(200, COLUMNS, generator=generator) * 3).to(dtype)
    found = ours(x)
    assert torch.equal(found, theirs(x))
    assert not torch.equal(found, x)


# Infinities are no activations; the reciprocal of a scale below 2**-126 is one, on GPUs as well.
FLOATS = st.floats(-60000, 60000, width=32).filter(lambda v: v == 0 or abs(v) > 1e-30)


@EVERY
@settings(max_examples=60, deadline=None)
@given(values=st.lists(FLOATS, min_size=COLUMNS, max_size=COLUMNS))
def test_anything(ours: Round, theirs: Round, values: list[float]) -> None:
    x = torch.tensor(values).view(1, -1)
    assert torch.equal(ours(x), theirs(x))


def test_table_of_fp8_numbers() -> None:
    """The table that the second implementation rounds with, against PyTorch's type."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(codes, torch.from_numpy(rounding.E4M3).float())


def test_no_tokens() -> None:
    for ours, _ in PAIRS.values():
        assert ours(torch.zeros(0, COLUMNS)).shape == (0, COLUMNS)


def test_tensor_scale_depends_on_the_batch() -> None:
    """Per-token scales do not."""
    x = torch.tensor([[0.011, 0.37, 1.03, -0.59]])
    with_more = torch.cat([x, 100 * x])
    assert torch.equal(activations.fp8_tokens(with_more)[:1], activations.fp8_tokens(x))
    assert not torch.equal(activations.fp8_tensor(with_more)[:1], activations.fp8_tensor(x))


def test_static_scale_cuts_off() -> None:
    x = torch.tensor([[1000.0, -1000.0, math.pi]])
    assert activations.fp8_static(x, torch.tensor(1.0)).tolist() == [[448.0, -448.0, 3.25]]


def test_groups_must_be_whole() -> None:
    with pytest.raises(ValueError, match="32 columns do not come in groups of 12"):
        activations.fp8_groups(torch.zeros(1, COLUMNS), 12)
