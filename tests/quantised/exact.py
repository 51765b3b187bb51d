"""Codes and scales of quantised rows in exact arithmetic: fractions, and a list of every number.

A third way to write them down, beside `jit_kernels.row_quant.reference` (PyTorch) and `rounding`
(NumPy): each step of a kernel is one exact operation and one rounding to fp32, by `f32`; codes are
looked up among the numbers that there are. Nothing but Python.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from math import copysign

Numbers = Sequence[Fraction]

#: Index: code without sign. e4m3 has 3 bits of mantissa and bias 7, e2m1 1 bit and bias 1.
E4M3: Numbers = [
    Fraction(m, 512) if e == 0 else Fraction(8 + m, 8) * Fraction(2) ** (e - 7)
    for e in range(16)
    for m in range(8)
][:-1]
E2M1: Numbers = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]
LEAST = Fraction(1e-10)  # of the double: `f32` rounds it


def f32(value: Fraction) -> Fraction:
    """The nearest fp32, ties to even, subnormal ones included."""
    if not value:
        return value
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    exponent -= abs(value) < Fraction(2) ** exponent
    step = Fraction(2) ** (max(exponent, -126) - 23)
    assert abs(value) < Fraction(2) ** 128, "beyond fp32"
    return round(value / step) * step


def nearest(size: Fraction, numbers: Numbers) -> int:
    """The code of the number nearest to size >= 0: of two the even one, beyond all the last."""
    if size >= numbers[-1]:
        return len(numbers) - 1
    below = bisect_right(numbers, size) - 1
    down, up = size - numbers[below], numbers[below + 1] - size
    return below + (up < down or (up == down and below % 2 == 1))


def coded(values: Sequence[float], factor: Fraction, numbers: Numbers, sign: int) -> list[int]:
    """Codes of values * factor; sign: the bit of negative ones, zeros included."""
    return [
        nearest(abs(f32(Fraction(v) * factor)), numbers) | (sign if copysign(1, v) < 0 else 0)
        for v in values
    ]


def value_of(code: int, numbers: Numbers, sign: int) -> Fraction:
    return numbers[code & ~sign] * (-1 if code & sign else 1)


def runs(row: Sequence[float], size: int) -> list[Sequence[float]]:
    return [row[begin : begin + size] for begin in range(0, len(row), size)]


def fp8_fp32(row: Sequence[float], size: int) -> tuple[list[int], list[float]]:
    """per_token_group_quant.cuh without kUe8m0."""
    codes, scales = [], []
    for group in runs(row, size):
        amax = max(f32(LEAST), *(abs(Fraction(v)) for v in group))
        codes += coded(group, f32(448 / amax), E4M3, 128)
        scales.append(float(f32(amax * f32(Fraction(1, 448)))))
    return codes, scales


def fp8_ue8m0(row: Sequence[float], size: int) -> tuple[list[int], list[int]]:
    """per_token_group_quant.cuh with kUe8m0: the least power of two that is not below the scale."""
    codes, scales = [], []
    for group in runs(row, size):
        amax = max(f32(LEAST), *(abs(Fraction(v)) for v in group))
        exponent = -127
        while Fraction(2) ** exponent < f32(amax * f32(Fraction(1, 448))):
            exponent += 1
        codes += coded(group, Fraction(2) ** -exponent, E4M3, 128)
        scales.append(exponent + 127)
    return codes, scales


def nvfp4(row: Sequence[float], global_scale: float) -> tuple[list[int], list[int]]:
    """cvt_warp_fp16_to_fp4 with reciprocals rounded to nearest; the low half of a byte first."""
    known = f32(Fraction(global_scale))
    codes, scales = [], []
    for block in runs(row, 16):
        amax = max(abs(Fraction(v)) for v in block)
        scale = nearest(f32(known * f32(amax * f32(Fraction(1, 6)))), E4M3)
        scales.append(scale)
        factor = f32(1 / f32(E4M3[scale] * f32(1 / known))) if scale else Fraction(0)
        codes += coded(block, factor, E2M1, 8)
    return [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)], scales


def fp8_values(codes: Sequence[int], scales: Sequence[Fraction], size: int) -> list[float]:
    """code * scale of its group."""
    return [
        float(f32(value_of(code, E4M3, 128) * scales[place // size]))
        for place, code in enumerate(codes)
    ]


def nvfp4_values(packed: Sequence[int], scales: Sequence[int], global_scale: float) -> list[float]:
    """code * scale of its block / global_scale."""
    codes = [half for byte in packed for half in (byte & 15, byte >> 4)]
    known = f32(Fraction(global_scale))
    return [
        float(f32(value_of(code, E2M1, 8) * E4M3[scales[place // 16]] / known))
        for place, code in enumerate(codes)
    ]
