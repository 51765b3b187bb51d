"""From quantised parameters, in the layout that SGLang's `create_weights` gives them, to weights.

One function a format. Each returns [..., out, in] in fp32, computed in fp32 exactly as its formula
says; `...` are dimensions of experts that the parameters share. PyTorch only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jit_kernels.row_quant.reference import e2m1_values

#: Column of each of the 8 nibbles of an AWQ word, lowest bits first (AutoAWQ, `AWQ_ORDER`).
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
NVFP4_GROUP = 16
MXFP4_GROUP = 32


def scaled(
    weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None = None
) -> torch.Tensor:
    """(weight - offset) * scale, where scale and offset broadcast: [..., out, 1] for channels.

    FP8 and INT8 of compressed-tensors, ModelOpt and AutoFP8, and ModelSlim, whose offset is zero.
    """
    values = weight.float()
    if offset is not None:
        values = values - offset.float()
    return values * scale.float()


def of_parts(scales: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Scales of fused matrices, [..., parts], as one for each of their rows: [..., out, 1]."""
    counts = torch.tensor(rows, device=scales.device)
    return scales.float().repeat_interleave(counts, -1)[..., None]


def in_blocks(weight: torch.Tensor, scale: torch.Tensor, block: Sequence[int]) -> torch.Tensor:
    """weight * scale of its block; weight [..., out, in], scale [..., ceil(out/r), ceil(in/c)].

    block: (r, c). DeepSeek's FP8, whose `weight_scale_inv` is a factor in spite of its name.
    """
    rows, columns = weight.shape[-2:]
    scale = scale.float().repeat_interleave(block[0], -2)[..., :rows, :]
    scale = scale.repeat_interleave(block[1], -1)[..., :columns]
    return weight.float() * scale


def compressed(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    bits: int = 4,
) -> torch.Tensor:
    """(q - zero) * scale of the group, of compressed-tensors `pack-quantized`.

    packed: [..., out, in * bits / 32] int32, lowest bits first, each value stored as
    q + 2**(bits - 1). scale: [..., out, groups]. zero_point: [..., out * bits / 32, groups] int32,
    stored in the same way but packed along the rows; None for zeros. group_index: [..., in], the
    group of each column; None for equal groups in order.
    Source: compressed_tensors 0.18, compressors/pack_quantized.
    """
    half = 1 << (bits - 1)
    values = _unpacked(packed, -1, bits) - half
    groups = _group_of_columns(values.shape[-1], scale.shape[-1], group_index, packed.device)
    scale = _pick(scale.float(), groups)
    if zero_point is None:
        return values.float() * scale
    zeros = _unpacked(zero_point, -2, bits) - half
    return (values - _pick(zeros, groups)).float() * scale


def awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(q - zero) * scale of the group, of AutoAWQ's GEMM version, 4 bits.

    qweight: [..., in, out / 8] int32; qzeros: [..., groups, out / 8]; scales: [..., groups, out].
    Source: AutoAWQ awq/utils/packing_utils.py; SGLang's moe_wna16.py `convert_awq_tensor`.
    """
    values = _unpacked(qweight, -1, 4, AWQ_COLUMNS)
    zeros = _unpacked(qzeros, -1, 4, AWQ_COLUMNS)
    repeats = values.shape[-2] // scales.shape[-2]
    centred = values - zeros.repeat_interleave(repeats, -2)
    return (centred.float() * scales.float().repeat_interleave(repeats, -2)).transpose(-1, -2)


def gptq(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    group_index: torch.Tensor | None = None,
    bits: int = 4,
) -> torch.Tensor:
    """(q - 2**(bits - 1)) * scale of the group, of symmetric GPTQ.

    qweight: [..., in * bits / 32, out] int32, lowest bits first; scales: [..., groups, out], of
    which the first in / group_size are read. group_size: -1 for one group of all. group_index:
    [..., in], the group of each column (`desc_act`). `qzeros` of a symmetric checkpoint say the
    same as the constant, and Marlin never reads them.
    Source: GPTQModel `qlinear`; SGLang's gptq_marlin.py.
    """
    values = _unpacked(qweight, -2, bits) - (1 << (bits - 1))
    columns = values.shape[-2]
    if group_index is None:
        size = columns if group_size == -1 else group_size
        group_index = torch.arange(columns, device=qweight.device) // size
    scale = _pick(scales.float().transpose(-1, -2), group_index.long())
    return values.float().transpose(-1, -2) * scale


def moe_wna16(
    qweight: torch.Tensor, scales: torch.Tensor, qzeros: torch.Tensor | None = None, bits: int = 4
) -> torch.Tensor:
    """(q - zero) * scale of the group, as SGLang converts AWQ and GPTQ experts for Triton.

    qweight: [..., out, in * bits / 8] uint8, lowest bits first; scales: [..., out, groups];
    qzeros: [..., out * bits / 8, groups] uint8, packed along the rows; None for 2**(bits - 1).
    Source: SGLang's moe_wna16.py, kernels/ops/moe/fused_moe_triton_kernels.py.
    """
    values = _unpacked(qweight, -1, bits, width=8)
    repeats = values.shape[-1] // scales.shape[-1]
    if qzeros is None:
        centred = values - (1 << (bits - 1))
    else:
        centred = values - _unpacked(qzeros, -2, bits, width=8).repeat_interleave(repeats, -1)
    return centred.float() * scales.float().repeat_interleave(repeats, -1)


def nvfp4(weight: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """e2m1 * scale of 16 columns * scale_2.

    weight: [..., out, in / 2] uint8, the even column in the low half; scale: [..., out, in / 16]
    FP8 E4M3, not swizzled; scale_2: fp32 that broadcasts over scale, [..., out, 1] for fused ones.
    Source: TensorRT Model Optimizer NVFP4QTensor; SGLang's dequantization.py.
    """
    factors = scale.float() * scale_2.float()
    return e2m1_values(weight) * factors.repeat_interleave(NVFP4_GROUP, -1)


def mxfp4(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """e2m1 * 2**(scale - 127) of 32 columns.

    weight: [..., out, in / 2] uint8, the even column in the low half; scale: [..., out, in / 32]
    uint8, E8M0; 255 is not a number.
    Source: OCP Microscaling Formats 1.0; AMD Quark export.
    """
    exponent = scale.to(torch.int32)
    factors = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - 127)
    factors = factors.masked_fill(exponent == 255, torch.nan)
    return e2m1_values(weight) * factors.repeat_interleave(MXFP4_GROUP, -1)


def _unpacked(
    words: torch.Tensor,
    dim: int,
    bits: int,
    columns: Sequence[int] | None = None,
    width: int = 32,
) -> torch.Tensor:
    """The unsigned values in `words` along `dim` (-1 or -2), int32.

    columns: where in its run each value of a word goes, lowest bits first; None for in order.
    width: bits of a word that are read.
    """
    words = words.to(torch.int32)
    count, mask = width // bits, (1 << bits) - 1
    order = sorted(range(count), key=columns.__getitem__) if columns else range(count)
    values = [(words >> (bits * place)) & mask for place in order]
    return torch.stack(values, dim).flatten(dim - 1, dim)


def _group_of_columns(
    columns: int, groups: int, group_index: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    if group_index is not None:
        return group_index.long()
    return torch.arange(columns, device=device) // (columns // groups)


def _pick(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """[..., out, groups] -> [..., out, in]: the value of each column's group, groups [..., in]."""
    index = groups.unsqueeze(-2).expand(*values.shape[:-1], groups.shape[-1])
    return values.gather(-1, index)
