"""Round activations as SGLang's kernels do before they multiply: quantised, and back again.

Each function takes [tokens, columns] in any float dtype and returns the same shape and dtype. The
arithmetic is the kernel's, in fp32: where it multiplies by a reciprocal instead of dividing, so do
we, since that decides ties. Only the compiler's approximate division, where it uses one, is not
imitated: it may differ in the last bit. What also travels between ranks as codes is rounded by way
of them, with `jit_kernels.row_quant.reference`. PyTorch only.
"""

from __future__ import annotations

import torch

from jit_kernels.row_quant import reference as rows
from jit_kernels.row_quant.reference import FP8, FP8_MAX, LEAST

INT8_MAX = 127.0


def fp8_groups(x: torch.Tensor, size: int) -> torch.Tensor:
    """FP8 with a scale for each token and `size` columns, of block-quantised weights.

    fp32 scales. Raises ValueError where the columns do not come in groups.
    """
    return rows.fp8_rows(*rows.fp8_groups(x, size)).to(x.dtype)


def fp4_blocks(x: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """NVFP4: e2m1 with a scale for 16 columns under the checkpoint's for all, a scalar.

    Raises ValueError where the columns do not come in blocks.
    """
    return rows.fp4_rows(*rows.fp4_blocks(x, global_scale), global_scale).to(x.dtype)


def fp8_tokens(x: torch.Tensor) -> torch.Tensor:
    """FP8 with a scale for each token.

    Source: sglang/kernels/jit/csrc/gemm/per_token_quant_fp8.cuh.
    """
    return _fp8(x, x.float().abs().amax(-1, keepdim=True) / FP8_MAX)


def fp8_tensor(x: torch.Tensor) -> torch.Tensor:
    """FP8 with one scale for all tokens of the batch, so that a token depends on the others.

    Source: sglang/kernels/jit/csrc/gemm/per_tensor_quant_fp8.cuh.
    """
    return _fp8(x, x.float().abs().amax() / FP8_MAX) if x.numel() else x


def fp8_static(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """FP8 with the checkpoint's scale, a scalar; what is larger than 448 of it is cut off.

    Source: per_tensor_quant_fp8.cuh, `kIsStatic`.
    """
    return _fp8(x, scale.float())


def int8_tokens(x: torch.Tensor) -> torch.Tensor:
    """INT8 with a scale for each token; halves are rounded away from zero.

    Source: sglang/kernels/ops/quantization/int8_kernel.py `_per_token_quant_int8`.
    """
    values = x.float()
    largest = values.abs().amax(-1, keepdim=True).clamp(min=LEAST)
    scaled = values * _quotient(INT8_MAX, largest)
    whole = scaled.trunc()
    # Adding a half first would round 0.49999997 up.
    whole = whole + scaled.sign() * ((scaled - whole).abs() >= 0.5)
    return (whole * (largest / INT8_MAX)).to(x.dtype)


def ascend_tokens(x: torch.Tensor) -> torch.Tensor:
    """INT8 with a scale for each token; halves are rounded to even.

    Source: documentation of `npu_dynamic_quant`, whose kernel is not public.
    """
    values = x.float()
    scale = values.abs().amax(-1, keepdim=True) / INT8_MAX
    rounded = (values / scale).round().nan_to_num()  # a token of zeros
    return (rounded * scale).to(x.dtype)


def ascend_static(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """INT8 with the checkpoint's scale and offset, scalars.

    Source: documentation of `npu_quantize`, which gets the scale's reciprocal.
    """
    shifted = (x.float() * (1 / scale.float())).round() + offset.float()
    return ((shifted.clamp(-128, 127) - offset.float()) * scale.float()).to(x.dtype)


def _quotient(number: float, tensor: torch.Tensor) -> torch.Tensor:
    """number / tensor; PyTorch's operator would multiply with the reciprocal, rounding twice."""
    return torch.full_like(tensor, number) / tensor


def _fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    # One of the two kernels of per-token scales divides by zero for a token of zeros, and its
    # clamp turns what comes out into a finite number; times the scale, which is zero, it is zero.
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return (_to_fp8(x.float() * inverse) * scale).to(x.dtype)


def _to_fp8(values: torch.Tensor) -> torch.Tensor:
    """The nearest FP8 numbers, ties to even, saturating."""
    return values.clamp(-FP8_MAX, FP8_MAX).to(FP8).float()
