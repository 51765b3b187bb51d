"""Rows of bytes: what travels with a token to its experts, put together and taken apart.

One tensor carries values, scales, ids and weights, so one collective does, and a row can never be
taken for another's. The layout is `moe_exchange.payload`'s. PyTorch only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_minimax.moe_exchange.payload import Payload


class Parcel(NamedTuple):
    """The parts of some rows.

    values: [rows, columns] in any dtype; scales: [rows, groups] in any dtype, None where there are
    none; ids: [rows, top_k] int32; weights: [rows, top_k] fp32.
    """

    values: torch.Tensor
    scales: torch.Tensor | None
    ids: torch.Tensor
    weights: torch.Tensor


class Types(NamedTuple):
    """In which dtypes the first two parts are read again."""

    values: torch.dtype
    scales: torch.dtype | None


def pack(payload: Payload, parcel: Parcel) -> torch.Tensor:
    """[rows, payload.bytes] uint8."""
    values = parcel.values
    packed = values.new_empty((values.shape[0], payload.bytes), dtype=torch.uint8)
    packed[:, : payload.values] = _bytes(values)
    if parcel.scales is not None:
        end = payload.values + payload.scales
        packed[:, payload.values : end] = _bytes(parcel.scales)
    weights_at = payload.ids_at + 4 * payload.top_k
    packed[:, payload.ids_at : weights_at] = _bytes(parcel.ids.to(torch.int32))
    packed[:, weights_at:] = _bytes(parcel.weights.float())
    return packed


def unpack(payload: Payload, packed: torch.Tensor, types: Types) -> Parcel:
    """The parts of rows that `pack` made, each contiguous, as kernels want them."""
    weights_at = payload.ids_at + 4 * payload.top_k
    end = payload.values + payload.scales
    return Parcel(
        values=_part(packed[:, : payload.values], types.values),
        scales=None
        if types.scales is None
        else _part(packed[:, payload.values : end], types.scales),
        ids=_part(packed[:, payload.ids_at : weights_at], torch.int32),
        weights=_part(packed[:, weights_at:], torch.float32),
    )


def _bytes(part: torch.Tensor) -> torch.Tensor:
    if part.stride(-1) != 1:  # a single column counts as contiguous whatever its stride is
        part = part.clone(memory_format=torch.contiguous_format)
    return part.contiguous().view(torch.uint8)


def _part(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return part.contiguous().view(dtype)
