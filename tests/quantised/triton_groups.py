"""Rows quantised by SGLang's Triton kernels for groups; `test_triton_groups` runs this file.

Triton decides when it is imported whether kernels are interpreted, so this is a process of its own.
Called with two files: the rows, [rows, columns] fp32, to read, and what is written: for each kernel
the scaled and cut-off values before they become FP8, and the scales.

The kernels store into fp32 because Triton's interpreter drops the carry when it makes FP8 of a
value (triton/runtime/interpreter.py `_convert_float`: 125 becomes 64), which GPUs do not do.
"""

from __future__ import annotations

import sys

import torch
from sglang.kernels.ops.quantization import fp8_kernel

GROUP = 128
SETTINGS = {"bit8_min": -448.0, "bit8_max": 448.0, "BLOCK": GROUP, "num_warps": 1, "num_stages": 1}
LEAST = 1e-10


def fp32_scales(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`_per_token_group_quant_8bit`."""
    rows, columns = x.shape
    values, scales = torch.empty_like(x), torch.empty(rows, columns // GROUP)
    fp8_kernel._per_token_group_quant_8bit[(scales.numel(),)](
        x, values, scales, GROUP, GROUP, LEAST, **SETTINGS
    )
    return values, scales


def ue8m0_scales(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`_per_token_group_quant_8bit_colmajor` with SCALE_UE8M0; scales are powers of two in fp32."""
    rows, columns = x.shape
    values, scales = torch.empty_like(x), torch.empty(columns // GROUP, rows).t()
    fp8_kernel._per_token_group_quant_8bit_colmajor[(scales.numel(),)](
        x, values, scales, GROUP, columns, scales.stride(1), LEAST, **SETTINGS, SCALE_UE8M0=True
    )
    return values, scales


if __name__ == "__main__":
    given = torch.load(sys.argv[1])
    torch.save({"fp32": fp32_scales(given), "ue8m0": ue8m0_scales(given)}, sys.argv[2])
