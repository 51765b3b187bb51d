"""The attention prologue in plain PyTorch: the arithmetic that every kernel must reproduce.

Two phases, because the mean of squares spans the ranks of the group:

  sums = square_sums(q, k)        # this rank, [tokens, 2] fp32
  sums = all_reduce(sums)         # one collective for both
  apply_(call, sums)              # norm, rotation, K/V write

The arithmetic runs in fp32 (or in fp64, on request) and rounds once, when a result is stored. eps
is added to the mean, not to the sum. Source: MiniMax-M2's modeling file in transformers, which
norms before it splits the heads. It is also the path of a machine without an accelerator.
"""

from __future__ import annotations

import torch

from jit_kernels.qk_norm_rope.contract import FP8_TYPES, CacheWrite, Call, Request, Rotation

NAME = "reference"


def refusal(request: Request) -> str | None:
    """Nothing is refused."""
    return None


def run(call: Call, dtype: torch.dtype = torch.float32) -> None:
    """Serve one call. dtype: of the arithmetic, and of what the group's reduce is given."""
    sums = square_sums(call.q, call.k, dtype=dtype)
    if call.group.reduce is not None:
        sums = call.group.reduce(sums)
    apply_(call, sums)


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


def apply_(call: Call, sums: torch.Tensor) -> None:
    """Norm and rotate q and k in place with the sums of the whole group, and store K and V.

    sums: [tokens, 2], fp32 or fp64, whose dtype is the dtype of the arithmetic.
    """
    norm = call.norm
    sides = ((call.q, norm.q_weight, norm.q_divisor), (call.k, norm.k_weight, norm.k_divisor))
    exact = []
    for column, (x, weight, divisor) in enumerate(sides):
        y = normalized(x, sums[:, column], weight, divisor=divisor, eps=norm.eps)
        exact.append(y if call.rotation is None else rotated(y, call.rotation))
    call.q.copy_(exact[0])
    call.k.copy_(exact[1])
    if call.cache is not None:
        _write(call.cache, exact[1])


def _write(cache: CacheWrite, k: torch.Tensor) -> None:
    """Store K (exact, not yet rounded) and V in the slots of the tokens that have one."""
    kept = cache.slots >= cache.first_slot
    slots = cache.slots[kept].long()
    sides = ((cache.k_cache, k, cache.k_scale), (cache.v_cache, cache.v.to(k.dtype), cache.v_scale))
    for buffer, x, scale in sides:
        rows = stored(x[kept], buffer.dtype, scale).view(-1, *buffer.shape[-2:])
        # Bytes where the dtype is FP8: PyTorch does not index FP8 tensors on every device.
        if buffer.dtype in FP8_TYPES:
            buffer, rows = buffer.view(torch.uint8), rows.view(torch.uint8)
        if buffer.dim() == 3:
            buffer[slots] = rows
        else:
            page_size = buffer.shape[1]
            buffer[slots // page_size, slots % page_size] = rows


def stored(x: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """What a cache of `dtype` holds for x (fp32 or fp64): x, or x / scale saturated if FP8."""
    if dtype not in FP8_TYPES:
        return x.to(dtype)
    largest = torch.finfo(dtype).max
    return (x / scale).clamp(-largest, largest).to(dtype)
