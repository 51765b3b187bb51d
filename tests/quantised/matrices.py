"""Random matrices as each format's checkpoints store them, and what they stand for.

Codes are drawn first; the weight is the format's formula on them, and packing is written here from
the formats' descriptions. Nothing comes from our package. Scales are sixteenths of small integers,
which bf16 and fp16 hold, so that a parameter's type rounds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

State = dict[str, torch.Tensor]
Stored = tuple[State, torch.Tensor]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Draw:
    """A source of matrices; the same seed gives the same."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def scales(self, *shape: int) -> torch.Tensor:
        return self.integers(1, 32, *shape) / 256

    def fp8(self, *shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=self.generator) * 20
        return values.to(torch.float8_e4m3fn)


def packed(values: torch.Tensor, dim: int, order: Sequence[int] = range(8), width: int = 32):
    """4-bit values along `dim` in words of `width` bits; nibble k is the order[k]-th of its run."""
    count = width // 4
    runs = values.long().unflatten(dim, (-1, count)).movedim(dim + 1, -1)
    words = sum(runs[..., place] << (4 * k) for k, place in enumerate(order[:count]))
    if width == 8:
        return words.to(torch.uint8)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def spread(scale: torch.Tensor, dim: int, count: int) -> torch.Tensor:
    return scale.float().repeat_interleave(count, dim)


def fp8_blocks(draw: Draw, out: int, columns: int, name: str = "weight_scale_inv") -> Stored:
    weight, scale = draw.fp8(out, columns), draw.scales(-(-out // 128), -(-columns // 128))
    spread_scale = spread(spread(scale, 0, 128)[:out], 1, 128)[:, :columns]
    return {"weight": weight, name: scale}, weight.float() * spread_scale


def fp8_tensor(draw: Draw, out: int, columns: int, *, static: bool, shape=()) -> Stored:
    weight, scale = draw.fp8(out, columns), draw.scales(1)
    state = {"weight": weight, "weight_scale": scale.reshape(shape)}
    if static:
        state["input_scale"] = torch.full(shape, 0.0123)
    return state, weight.float() * scale


def channels(draw: Draw, out: int, columns: int, *, integer: bool) -> Stored:
    weight = draw.fp8(out, columns)
    if integer:
        weight = draw.integers(-127, 128, out, columns).to(torch.int8)
    scale = draw.scales(out, 1)
    return {"weight": weight, "weight_scale": scale}, weight.float() * scale


def compressed(
    draw: Draw, out: int, columns: int, *, zeros: bool = False, ordered: bool = False
) -> Stored:
    values = draw.integers(-8, 8, out, columns)
    scale = draw.scales(out, columns // 128)
    group = torch.arange(columns) // 128
    state = {
        "weight_packed": packed(values + 8, 1),
        "weight_scale": scale.bfloat16(),
        "weight_shape": torch.tensor([out, columns]),
    }
    zero = torch.zeros(out, columns // 128, dtype=torch.long)
    if zeros:
        zero = draw.integers(-8, 8, out, columns // 128)
        state["weight_zero_point"] = packed(zero + 8, 0)
    if ordered:  # one order for all matrices of an input
        group = group[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
        state["weight_g_idx"] = group.int()
    return state, (values - zero[:, group]) * scale[:, group]


def awq(draw: Draw, out: int, columns: int, group: int = 128) -> Stored:
    values, zeros = draw.integers(0, 16, columns, out), draw.integers(0, 16, columns // group, out)
    scale = draw.scales(columns // group, out)
    state = {
        "qweight": packed(values, 1, AWQ_ORDER),
        "qzeros": packed(zeros, 1, AWQ_ORDER),
        "scales": scale.half(),
    }
    return state, ((values - spread(zeros, 0, group)) * spread(scale, 0, group)).t()


def gptq(draw: Draw, out: int, columns: int, *, ordered: bool = False) -> Stored:
    values, scale = draw.integers(0, 16, columns, out), draw.scales(columns // 128, out)
    group = torch.arange(columns) // 128
    if ordered:
        group = group[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
    state = {
        "qweight": packed(values, 0),
        "qzeros": packed(torch.full((columns // 128, out), 7), 1),
        "scales": scale.half(),
        "g_idx": group.int(),
    }
    return state, ((values - 8) * scale[group]).t()


def nvfp4(draw: Draw, out: int, columns: int) -> Stored:
    codes = draw.integers(0, 16, out, columns)
    scale = draw.fp8(out, columns // 16).float().abs().to(torch.float8_e4m3fn)
    scale_2 = draw.scales(1).reshape(()) / 16
    state = {
        "weight": packed(codes, 1, width=8),
        "weight_scale": scale,
        "weight_scale_2": scale_2,
        "input_scale": torch.tensor(0.01),
    }
    return state, E2M1[codes] * spread(scale, 1, 16) * scale_2


def mxfp4(draw: Draw, out: int, columns: int) -> Stored:
    codes, scale = draw.integers(0, 16, out, columns), draw.integers(118, 127, out, columns // 32)
    state = {"weight": packed(codes, 1, width=8), "weight_scale": scale.to(torch.uint8)}
    return state, E2M1[codes] * spread(2.0 ** (scale - 127), 1, 32)


def modelslim(draw: Draw, out: int, columns: int) -> Stored:
    state, weight = channels(draw, out, columns, integer=True)
    return state | {"weight_offset": torch.zeros(out, 1)}, weight


def modelslim_static(draw: Draw, out: int, columns: int) -> Stored:
    """y = ((round(x / s) + o) @ q + quant_bias) * deq, where quant_bias takes o back."""
    weight = draw.integers(-127, 128, out, columns).to(torch.int8)
    deq = draw.scales(out) / 16
    state = {
        "weight": weight,
        "input_scale": torch.tensor([1 / 16]),
        "input_offset": torch.tensor([3.0]),
        "quant_bias": (-3 * weight.long().sum(1)).int(),
        "deq_scale": deq,
    }
    return state, weight.float() * deq[:, None] * 16
