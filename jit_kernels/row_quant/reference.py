"""Quantised rows in plain PyTorch: codes and scales, and the values that they stand for.

The arithmetic is that of the kernels on GPUs, in fp32 and in their order, since it decides ties;
where they multiply with a reciprocal instead of dividing, so do we. What we do not imitate is the
hardware's approximate division and reciprocal, which may differ in the last bit. Where that bit
decides between two codes, or two scales, ours is the one that exact division chooses.

Everything takes bf16, fp16 or fp32 in [..., columns], zero rows included, and treats each row
alone. A NaN stays one: it comes back from the decoded group.
"""

from __future__ import annotations

import itertools
import math
from enum import StrEnum

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
#: 1/448 rounded to fp32, as the group kernel multiplies with it.
FP8_MAX_INVERSE = torch.tensor(1.0).div(FP8_MAX).item()
#: What the group kernel takes for the maximum of zeros.
LEAST = 1e-10
#: Exponent that fp32 and ue8m0 store for 1.
BIAS = 127

#: Values of the 4-bit float E2M1 (OCP Microscaling Formats 1.0, table 5); bit 3 is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: 1/6 rounded to fp32.
E2M1_MAX_INVERSE = torch.tensor(1.0).div(E2M1[-1]).item()
FP4_BLOCK = 16


def _e2m1_bounds() -> tuple[float, ...]:
    """The least fp32 that rounds to each code above 0: halfway, or behind it for odd codes."""
    halfway = [(low + high) / 2 for low, high in itertools.pairwise(E2M1)]
    behind = torch.nextafter(torch.tensor(halfway), torch.tensor(math.inf)).tolist()
    return tuple(
        b if code % 2 else h for code, (h, b) in enumerate(zip(halfway, behind, strict=True), 1)
    )


_BOUNDS = _e2m1_bounds()


class ScaleRule(StrEnum):
    """What the scale of an FP8 group is: what fits it best, or the power of two above."""

    FP32 = "fp32"
    UE8M0 = "ue8m0"


def fp8_groups(
    x: torch.Tensor, size: int = 128, scales: ScaleRule = ScaleRule.FP32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., columns] e4m3 and scales [..., columns / size] of groups of `size` columns.

    The scales are fp32, or uint8 for UE8M0: the biased exponent of a power of two. They are factors
    that give the values back. Raises ValueError where the columns do not come in groups.
    Source: sglang/kernels/jit/csrc/gemm/per_token_group_quant.cuh; for UE8M0 also `cast_to_ue8m0`
    and `inv_scale_ue8m0` of deepseek_v4/fp8_utils.cuh. With UE8M0 that kernel multiplies fp16 in
    fp16, where the factor overflows for groups whose largest value is below 448 * 2**-16; ours
    stays in fp32. With FP32 its division is an approximate one.
    """
    groups = _grouped(x, size)
    largest = groups.abs().amax(-1, keepdim=True).clamp(min=LEAST)
    factors = largest * FP8_MAX_INVERSE
    if scales is ScaleRule.FP32:
        # `448 / largest` would be computed as a product with the reciprocal, rounding twice.
        multipliers = torch.full_like(largest, FP8_MAX) / largest
        stored = factors
    else:
        exponents = _exponents_above(factors)
        multipliers = _power_of_two(-exponents)
        stored = (exponents + BIAS).to(torch.uint8)
    return _to_fp8(groups * multipliers).flatten(-2), stored.squeeze(-1)


def fp8_rows(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The values of `fp8_groups`' codes and scales, of either rule: [..., columns] fp32."""
    if scales.dtype == torch.uint8:
        scales = _power_of_two(scales.to(torch.int32) - BIAS)
    return (codes.float().unflatten(-1, (scales.shape[-1], -1)) * scales[..., None]).flatten(-2)


def packed_ue8m0(scales: torch.Tensor) -> torch.Tensor:
    """Four ue8m0 scales in each int32, lowest byte first, as DeepGEMM takes them.

    scales: [rows, groups] uint8. Returns [rows, ceil(groups / 4)] int32 whose rows lie next to each
    other, each column in room for a multiple of 4 rows; bytes behind the last group are zero.
    Source: `create_per_token_group_quant_fp8_output_scale` of sglang/kernels/ops/quantization/
    fp8_kernel.py and `ScaleStoreArgs` of per_token_group_quant.cuh.
    """
    rows, groups = scales.shape
    words, room = -(-groups // 4), -(-rows // 4) * 4
    padded = scales.new_zeros(rows, words * 4)
    padded[:, :groups] = scales
    packed = torch.empty(words, room, dtype=torch.int32, device=scales.device).t()[:rows]
    return packed.copy_(padded.view(torch.int32))


def fp4_global_scale(input_scales: torch.Tensor) -> torch.Tensor:
    """What FP4 rows are multiplied with: a scalar, fp32.

    input_scales: the checkpoint's, of all matrices and experts that read the rows; the largest
    counts, as in SGLang (modelopt_quant.py, process_weights_after_loading).
    """
    return 1 / input_scales.max().float()


def fp4_blocks(
    x: torch.Tensor, global_scale: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., columns / 2] uint8 and scales [..., columns / 16] uint8 of NVFP4.

    A byte holds two e2m1 codes, the even column in the low half; a scale is the bits of the e4m3
    nearest to global_scale * largest / 6, in the order of the columns (not swizzled). Halfway goes
    to the even code, and what a scale cut off at 448 leaves too large becomes 6. A block whose
    scale is zero has codes of zero, as one of zeros; flashinfer's are then those of x / 0, and as
    little worth. global_scale: one fp32 number. Raises ValueError where the columns do not come in
    blocks.
    Source: flashinfer, `cvt_warp_fp16_to_fp4` of tensorrt_llm/kernels/quantization_utils.cuh, which
    `fp4_quantize` runs. Its three reciprocals, of 6, of global_scale and of the product of scale
    and the latter, are `rcp.approx.ftz`: a value whose quotient lies within a few units in the last
    place of halfway between two codes may get the other code there, and a block the neighbouring
    scale. With FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH they are exact, but 1/6 and global_scale are
    multiplied first, which may also end in the neighbouring scale.
    """
    blocks = _grouped(x, FP4_BLOCK)
    factor = _scalar(global_scale, x)
    largest = blocks.abs().amax(-1, keepdim=True)
    scales = _to_fp8(factor * (largest * E2M1_MAX_INVERSE))
    known = scales.float()
    multipliers = torch.where(known == 0, 0.0, 1 / (known * (1 / factor)))
    codes = _to_e2m1(blocks * multipliers).flatten(-2)
    return codes[..., ::2] | codes[..., 1::2] << 4, scales.squeeze(-1).view(torch.uint8)


def fp4_rows(
    codes: torch.Tensor, scales: torch.Tensor, global_scale: float | torch.Tensor
) -> torch.Tensor:
    """The values of `fp4_blocks`' codes and scales: [..., columns] fp32, rounded once.

    The product of code and scale is exact; the division by global_scale is not.
    """
    blocks = e2m1_values(codes).unflatten(-1, (scales.shape[-1], -1))
    values = blocks * scales.view(FP8).float()[..., None]
    return (values / _scalar(global_scale, codes)).flatten(-2)


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    """[..., n / 2] uint8, the even column in the low half -> [..., n] fp32."""
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    return values[nibbles.long()]


def _grouped(x: torch.Tensor, size: int) -> torch.Tensor:
    if x.shape[-1] % size:
        raise ValueError(f"{x.shape[-1]} columns do not come in groups of {size}")
    return x.float().unflatten(-1, (-1, size))


def _to_fp8(values: torch.Tensor) -> torch.Tensor:
    """The nearest FP8 numbers, ties to even, saturating."""
    return values.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _to_e2m1(values: torch.Tensor) -> torch.Tensor:
    """One code a byte: the nearest, ties to the even code, saturating; zeros keep their sign."""
    bounds = torch.tensor(_BOUNDS, device=values.device)
    magnitudes = torch.bucketize(values.abs(), bounds, right=True).to(torch.uint8)
    return magnitudes | values.signbit().to(torch.uint8) << 3


def _exponents_above(factors: torch.Tensor) -> torch.Tensor:
    """int32 exponents of the least powers of two that are not below the fp32 factors."""
    bits = factors.view(torch.int32)
    stored = (bits >> 23) + (bits & 0x7FFFFF != 0)
    return stored.clamp(max=255) - BIAS  # 255 is infinity or NaN in fp32, NaN in ue8m0


def _power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)


def _scalar(number: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(number, dtype=torch.float32, device=like.device).reshape(())
