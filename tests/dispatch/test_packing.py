"""Rows of bytes: what is put in comes out again, at the places that the plan names."""

from __future__ import annotations

import pytest
import torch

from sglang_minimax.layers.dispatch.packing import Parcel, Types, pack, unpack
from sglang_minimax.moe_exchange.paths import Rows
from sglang_minimax.moe_exchange.payload import Payload

FORMS = [
    (Rows.PLAIN, torch.bfloat16, None),
    (Rows.PLAIN, torch.float32, None),
    (Rows.FP8, torch.float8_e4m3fn, torch.float32),
    (Rows.FP8, torch.float8_e4m3fn, torch.uint8),
    (Rows.FP4, torch.uint8, torch.uint8),
]
HIDDEN = (128, 256, 3072)  # one group of FP8, which is a single column of scales, and more


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern of a type may come, a NaN among them."""
    generator = torch.Generator().manual_seed(sum(shape))
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).view(dtype)


def parcel(payload: Payload, values: torch.dtype, scales: torch.dtype | None, rows: int) -> Parcel:
    return Parcel(
        drawn((rows, payload.values // values.itemsize), values),
        None if scales is None else drawn((rows, payload.groups), scales),
        drawn((rows, payload.top_k), torch.int32),
        drawn((rows, payload.top_k), torch.float32),
    )


def bits(tensor: torch.Tensor | None) -> list[int]:
    if tensor is None:
        return []
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8).flatten().tolist()


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize(("form", "values", "scales"), FORMS)
def test_what_is_packed_comes_out_again(
    form: Rows, values: torch.dtype, scales: torch.dtype | None, hidden: int, rows: int
) -> None:
    item, scale = values.itemsize, scales.itemsize if scales else 4
    payload = Payload(form, hidden, 3, item_bytes=item, scale_bytes=scale)
    given = parcel(payload, values, scales, rows)
    packed = pack(payload, given)
    assert packed.shape == (rows, payload.bytes)
    found = unpack(payload, packed, Types(values, scales))
    for got, wanted in zip(found, given, strict=True):
        assert bits(got) == bits(wanted)
        assert got is None or (got.is_contiguous() and got.dtype == wanted.dtype)


def test_rows_of_a_gather_are_in_the_order_of_the_ranks() -> None:
    """Whole rows are gathered, so no part of one can be taken for another's."""
    payload = Payload(Rows.FP8, 256, 3)
    types = Types(torch.float8_e4m3fn, torch.float32)
    several = [parcel(payload, *types, rows=rows) for rows in (2, 0, 3)]
    together = unpack(payload, torch.cat([pack(payload, each) for each in several]), types)
    for part, found in enumerate(together):
        assert bits(found) == [bit for each in several for bit in bits(each[part])]


@pytest.mark.parametrize("strides", [(1, 0), (7, 1), (1, 4)])
def test_strides_do_not_matter(strides: tuple[int, int]) -> None:
    """SGLang's kernels return scales in column-major order; those of one group have any stride."""
    payload = Payload(Rows.FP8, 128, 2)
    given = parcel(payload, torch.float8_e4m3fn, torch.float32, rows=4)
    scales = torch.rand(64).as_strided((4, 1), strides)
    packed = pack(payload, given._replace(scales=scales))
    found = unpack(payload, packed, Types(torch.float8_e4m3fn, torch.float32))
    assert torch.equal(found.scales, scales)
