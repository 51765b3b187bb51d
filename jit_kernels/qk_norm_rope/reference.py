"""RMSNorm of q and k over the full projection of an attention-TP group, in plain PyTorch.

Two phases, because the mean of squares spans the ranks of the group:

  sums = square_sums(q, k)                    # this rank, [tokens, 2] fp32
  sums = all_reduce(sums)                     # one collective for both
  normalize_(q, k, sums, ...)                 # y = x * rsqrt(sum / divisor + eps) * weight

and an optional NeoX rotation of the first dimensions of each head. The arithmetic runs in fp32 (or
in fp64, on request) and rounds once, when the result is stored. eps is added to the mean, not to
the sum. Source: MiniMax-M2's modeling file in transformers, which norms before it splits the heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rotation:
    """A partial NeoX rotation after the norm.

    positions: [tokens] integer. cos_sin_cache: [max_position, rotary_dim], cos in the first half of
    a row, sin in the second.
    """

    positions: torch.Tensor
    cos_sin_cache: torch.Tensor
    head_dim: int


def square_sums(
    q: torch.Tensor, k: torch.Tensor, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Sum the squares of each row of q and of k on this rank.

    q: [tokens, q_width], k: [tokens, k_width], any float dtype, any row stride.
    Returns [tokens, 2] in `dtype`: column 0 is q's sum, column 1 is k's.
    """
    return torch.stack([x.to(dtype).square().sum(dim=-1) for x in (q, k)], dim=-1)


def normalized(
    x: torch.Tensor, square_sum: torch.Tensor, weight: torch.Tensor, *, divisor: int, eps: float
) -> torch.Tensor:
    """Return x * rsqrt(square_sum / divisor + eps) * weight, not yet rounded to x's dtype.

    x: [tokens, width]; square_sum: [tokens], over the whole group; weight: [width], this rank's
    rows. divisor: the number of elements behind `square_sum`, each replica counted.
    Returns [tokens, width] in square_sum's dtype.
    """
    inverse = torch.rsqrt(square_sum / divisor + eps)
    return x.to(square_sum.dtype) * inverse.unsqueeze(-1) * weight.to(square_sum.dtype)


def rotated(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate the first `rotary_dim` dimensions of each head, NeoX style, in x's dtype.

    x: [tokens, heads * head_dim]; returns a new tensor of the same shape.
    Pairs are (i, i + rotary_dim / 2): (a, b) -> (a cos - b sin, b cos + a sin).
    """
    angles = rotation.cos_sin_cache[rotation.positions].to(x.dtype)
    cos, sin = angles.unsqueeze(1).chunk(2, dim=-1)
    half = cos.shape[-1]
    heads = x.unflatten(-1, (-1, rotation.head_dim))
    a, b, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).flatten(-2)


def apply_(
    q: torch.Tensor,
    k: torch.Tensor,
    sums: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    *,
    q_divisor: int,
    k_divisor: int,
    eps: float,
    rotation: Rotation | None = None,
) -> None:
    """Normalise q and k in place with the sums of the whole group, then rotate if asked.

    q, k: as in `square_sums`, written through their views. sums: [tokens, 2], fp32 or fp64, whose
    dtype is the dtype of the arithmetic. q_weight: [q_width], k_weight: [k_width].
    """
    sides = ((q, q_weight, q_divisor), (k, k_weight, k_divisor))
    for column, (x, weight, divisor) in enumerate(sides):
        y = normalized(x, sums[:, column], weight, divisor=divisor, eps=eps)
        if rotation is not None:
            y = rotated(y, rotation)
        x.copy_(y)
