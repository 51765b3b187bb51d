"""Rows of bytes: what travels with a token to its experts, put together and taken apart.

One tensor carries values, scales, ids and weights, so one collective does, and a row can never be
taken for another's. The layout is `moe_exchange.payload`'s. PyTorch only.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch

from sglang_minimax.moe_exchange.payload import Payload

# PyTorch copies what is not contiguous element by element, so parts are copied in the longest
# words that their places allow: a byte at a time costs as many operations as there are bytes.
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


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
    word = word_of(payload)
    packed = parcel.values.new_empty(
        (parcel.values.shape[0], payload.bytes // word.itemsize), dtype=word
    )
    parts = (parcel.values, parcel.scales, parcel.ids.to(torch.int32), parcel.weights.float())
    for (start, end), part in zip(_places(payload), parts, strict=True):
        if part is not None:
            packed[:, start // word.itemsize : end // word.itemsize] = _in_words(part, word)
    return packed.view(torch.uint8)


def unpack(payload: Payload, packed: torch.Tensor, types: Types) -> Parcel:
    """The parts of rows that `pack` made, each contiguous, as kernels want them."""
    word = word_of(payload)
    words = packed.view(word)

    def part(place: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        start, end = place
        return words[:, start // word.itemsize : end // word.itemsize].contiguous().view(dtype)

    values, scales, ids, weights = _places(payload)
    return Parcel(
        values=part(values, types.values),
        scales=None if types.scales is None else part(scales, types.scales),
        ids=part(ids, torch.int32),
        weights=part(weights, torch.float32),
    )


@cache
def word_of(payload: Payload) -> torch.dtype:
    """The longest integer in which every part of a row, and the row itself, is counted whole."""
    size = math.gcd(payload.bytes, *(edge for place in _places(payload) for edge in place))
    return next(word for word in _WORDS if size % word.itemsize == 0)


def _places(payload: Payload) -> tuple[tuple[int, int], ...]:
    """First byte of values, scales, ids and weights, and the one behind their last."""
    weights_at = payload.ids_at + 4 * payload.top_k
    return (
        (0, payload.values),
        (payload.values, payload.values + payload.scales),
        (payload.ids_at, weights_at),
        (weights_at, payload.bytes),
    )


def _in_words(part: torch.Tensor, word: torch.dtype) -> torch.Tensor:
    if part.stride(-1) != 1:  # a single column counts as contiguous whatever its stride is
        part = part.clone(memory_format=torch.contiguous_format)
    return part.contiguous().view(word)
