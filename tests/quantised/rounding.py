"""How SGLang's kernels round activations, written a second time, from their sources, with NumPy.

Nothing is shared with `activations.py`: FP8 and FP4 numbers come from tables of their values, and
scalars are np.float32, so that every operation is rounded as in the kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

Array = np.ndarray
ONE, FP8_MAX, INT8_MAX, LEAST = (np.float32(v) for v in (1, 448, 127, 1e-10))

#: The FP8 E4M3 numbers from zero up; the index is the code, whose lowest bit is the mantissa's.
E4M3 = np.array(
    [(code & 7) * 2.0**-9 if code < 8 else (8 + (code & 7)) * 2.0 ** ((code >> 3) - 10)
     for code in range(127)],
    dtype=np.float64,
)  # fmt: skip


#: The FP4 E2M1 numbers in the same way.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float64)


def nearest(values: Array, numbers: Array) -> Array:
    """The nearest of the numbers, ties to the even code, everything beyond the largest cut off."""
    size = np.minimum(np.abs(values.astype(np.float64)), numbers[-1])
    below = np.searchsorted(numbers, size, side="right") - 1
    above = np.minimum(below + 1, len(numbers) - 1)
    down, up = size - numbers[below], numbers[above] - size
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return np.copysign(numbers[code], values).astype(np.float32)


def e4m3(values: Array) -> Array:
    """The nearest FP8 number."""
    return nearest(values, E4M3)


def half_away(values: Array) -> Array:
    """`round()` of C, exact: fp64 holds any fp32 plus a half."""
    wide = values.astype(np.float64)
    return np.copysign(np.floor(np.abs(wide) + 0.5), wide).astype(np.float32)


def fp8_group(row: Array, size: int) -> Array:
    """per_token_group_quant.cuh: multiply by 448 / amax, keep amax * (1 / 448)."""
    result = np.empty_like(row)
    for begin in range(0, len(row), size):
        group = row[begin : begin + size]
        amax = max(np.abs(group).max(), LEAST)
        result[begin : begin + size] = e4m3(group * (FP8_MAX / amax)) * (amax * (ONE / FP8_MAX))
    return result


def nvfp4(row: Array, global_scale: np.float32) -> Array:
    """cvt_warp_fp16_to_fp4: three reciprocals, and a scale that is an FP8 number itself."""
    result = np.empty_like(row)
    for begin in range(0, len(row), 16):
        block = row[begin : begin + 16]
        scale = e4m3(global_scale * (np.abs(block).max() * (ONE / np.float32(6))))
        factor = ONE / (scale * (ONE / global_scale)) if scale else np.float32(0)
        result[begin : begin + 16] = nearest(block * factor, E2M1) * scale / global_scale
    return result


def fp8_given(row: Array, scale: np.float32) -> Array:
    """per_tensor_quant_fp8.cuh: multiply by 1 / scale."""
    if scale == 0:
        return np.zeros_like(row)
    return e4m3(row * (ONE / scale)) * scale


def fp8_token(row: Array) -> Array:
    """per_token_quant_fp8.cuh: scale = amax / 448, without a least value."""
    return fp8_given(row, np.abs(row).max() / FP8_MAX)


def int8_token(row: Array) -> Array:
    """int8_kernel.py: multiply by 127 / amax, round half away from zero, keep amax / 127."""
    amax = max(np.abs(row).max(), LEAST)
    return half_away(row * (INT8_MAX / amax)) * (amax / INT8_MAX)


def ascend_token(row: Array) -> Array:
    """npu_dynamic_quant: divide by amax / 127, round half to even."""
    scale = np.abs(row).max() / INT8_MAX
    return np.rint(row / scale) * scale if scale else np.zeros_like(row)


def ascend_given(row: Array, scale: np.float32, offset: np.float32) -> Array:
    """npu_quantize."""
    code = np.clip(np.rint(row * (ONE / scale)) + offset, -128, 127)
    return (code - offset) * scale


def by_row(x: torch.Tensor, rule: Callable[[Array], Array]) -> torch.Tensor:
    """A rule for one token, for all of them; in x's dtype."""
    rows = x.float().numpy()
    with np.errstate(over="ignore", divide="ignore", invalid="ignore", under="ignore"):
        return torch.from_numpy(np.stack([rule(row) for row in rows])).to(x.dtype)


def largest(x: torch.Tensor) -> np.float32:
    """The scale of a tensor that is rounded as a whole."""
    return np.abs(x.float().numpy()).max() / FP8_MAX
