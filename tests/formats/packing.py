"""Bits of the packed formats, by the definitions of their papers and not by our package."""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: e2m1, by code (OCP Microscaling Formats 1.0, section 5.3.3); bit 3 is the sign.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
IN_ORDER = tuple(range(8))


def words_of(lines: torch.Tensor, order: Sequence[int] = IN_ORDER) -> torch.Tensor:
    """[..., n] nibbles -> [..., n / 8] int32; bits 4i to 4i + 3 hold line order[i] of eight."""
    eights = lines.to(torch.int64).unflatten(-1, (-1, 8))
    words = sum(eights[..., line] << (4 * i) for i, line in enumerate(order))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def lines_of(words: torch.Tensor, order: Sequence[int] = IN_ORDER) -> torch.Tensor:
    """The reverse of `words_of`."""
    eights = torch.empty(*words.shape, 8, dtype=torch.int32)
    for i, line in enumerate(order):
        eights[..., line] = (words >> (4 * i)) & 15
    return eights.flatten(-2)


def e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """The nearest codes, of two equally near ones the even one; 6 where a value is larger."""
    distance = (values.abs().clamp(max=6)[..., None] - E2M1[:8]).abs()
    # Even codes first among equals.
    preferred = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    codes = preferred[distance[..., preferred].argmin(-1)]
    return codes + 8 * values.signbit().long()


def bytes_of(codes: torch.Tensor) -> torch.Tensor:
    """[..., n] nibbles -> [..., n / 2] uint8, even columns in the low nibbles."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).to(torch.uint8)


def codes_of(packed: torch.Tensor) -> torch.Tensor:
    """The reverse of `bytes_of`."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()


def exact(scales: torch.Tensor) -> torch.Tensor:
    """Scales that BF16 and FP16 both hold exactly, so that the type of a parameter is no matter."""
    rounded = scales.bfloat16().float()
    assert torch.equal(rounded.half().float(), rounded)
    return rounded
