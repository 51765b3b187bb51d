"""Which parameters of a layer make up its matrices, by the class that SGLang chose for the layer.

SGLang describes a format by the class of `layer.scheme`, or of the layer's method where there are
no schemes. `LAYOUTS` has an entry for each that we can compute with: how a matrix is dequantised,
and how the kernels round what it is multiplied with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from jit_kernels.row_quant.reference import fp4_global_scale
from sglang_minimax.platforms.cpu.quantised import activations, dequantise

Rounding = Callable[[torch.Tensor], torch.Tensor]

#: Prefixes of an expert layer's parameters; those of a linear layer have none.
W13, W2 = "w13_", "w2_"


@dataclass(frozen=True, slots=True)
class Matrix:
    """The parameters of one matrix, by name without prefix: a linear layer's, or an expert's.

    prefix: W13 or W2 of an expert layer. expert: its local index; None for all of them.
    """

    layer: Any
    method: Any
    prefix: str = ""
    expert: int | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        parameter = self.layer.get_parameter(self.prefix + name).data
        return parameter if self.expert is None else parameter[self.expert]

    def get(self, name: str) -> torch.Tensor | None:
        """The parameter, None where the layer has none of that name."""
        parameter = getattr(self.layer, self.prefix + name, None)
        return None if parameter is None else self[name]

    @property
    def scheme(self) -> Any:
        """What describes the format: a scheme, or the method where there is none."""
        return self.layer.scheme or self.method

    def rows_of_parts(self, rows: int, parts: int) -> list[int]:
        """How `rows` divide into fused matrices: query, key and value, or gate and up."""
        widths = getattr(self.layer, "logical_widths", None)
        return list(widths) if widths and len(widths) == parts else [rows // parts] * parts

    def part_scales(self, name: str, rows: int) -> torch.Tensor:
        """A scale for each fused matrix, spread over their rows: [rows, 1]."""
        scales = self[name].reshape(-1)
        return dequantise.of_parts(scales, self.rows_of_parts(rows, scales.numel()))


@dataclass(frozen=True, slots=True)
class Layout:
    """How one of SGLang's schemes is computed.

    weight: the matrix, [out, in] fp32. rounding: what the kernels do to its input, None for
    nothing. addend: what is added to the product, [out] fp32, None for nothing.
    """

    weight: Callable[[Matrix], torch.Tensor]
    rounding: Callable[[Matrix], Rounding | None] = lambda matrix: None
    addend: Callable[[Matrix], torch.Tensor | None] = lambda matrix: None


def layout_of(layer: Any, method: Any) -> Layout | None:
    """The entry of LAYOUTS for a layer, None where there is none."""
    for described in (getattr(layer, "scheme", None), *_expert_schemes(layer), method):
        layout = LAYOUTS.get(type(described).__name__)
        if layout is not None:
            return layout
    return None


def _expert_schemes(layer: Any) -> list[Any]:
    """ModelSlim's experts have a scheme for each of their two products; we know them alike."""
    schemes = [getattr(layer, name, None) for name in ("w13_scheme", "w2_scheme")]
    return schemes[:1] if type(schemes[0]) is type(schemes[1]) else []


# --- FP8 and INT8 -------------------------------------------------------------------------------


def _eight_bits(matrix: Matrix) -> torch.Tensor:
    """`weight` with scales of blocks, of channels, or one for each fused matrix."""
    weight = matrix["weight"]
    block = _block(matrix)
    if block:
        scale = matrix.get("weight_scale_inv")
        if scale is None:
            scale = matrix["weight_scale"]
        return dequantise.in_blocks(weight, scale, block)
    scale = matrix["weight_scale"]
    if scale.shape != (weight.shape[0], 1):
        scale = matrix.part_scales("weight_scale", weight.shape[0])
    return dequantise.scaled(weight, scale)


def _block(matrix: Matrix) -> list[int] | None:
    described = matrix.scheme
    block = getattr(described, "weight_block_size", None)
    return block or getattr(getattr(described, "quant_config", None), "weight_block_size", None)


def _fp8_input(matrix: Matrix, *, dynamic: Rounding) -> Rounding:
    """Groups for blocks, the checkpoint's scale where it has one, `dynamic` otherwise.

    As on GPUs, a fused linear layer takes the largest scale of its parts, and experts that of all
    experts of the rank.
    """
    block = _block(matrix)
    if block:
        return lambda x: activations.fp8_groups(x, block[1])
    scale = Matrix(matrix.layer, matrix.method, matrix.prefix).get("input_scale")
    if scale is None:
        return dynamic
    largest = scale.max()
    return lambda x: activations.fp8_static(x, largest)


def _fp8_linear_input(matrix: Matrix) -> Rounding:
    return _fp8_input(matrix, dynamic=activations.fp8_tokens)


def _fp8_expert_input(matrix: Matrix) -> Rounding:
    """Channel scales go with a scale for each token, tensor scales with one for the batch."""
    channels = matrix.layer.get_parameter(matrix.prefix + "weight_scale").dim() == 3
    dynamic = activations.fp8_tokens if channels else activations.fp8_tensor
    return _fp8_input(matrix, dynamic=dynamic)


def _fp8_block_or_expert_input(matrix: Matrix) -> Rounding:
    return _fp8_linear_input(matrix) if _block(matrix) else _fp8_expert_input(matrix)


def _int8_input(matrix: Matrix) -> Rounding:
    return activations.int8_tokens


# --- four bits ----------------------------------------------------------------------------------


def _compressed(matrix: Matrix) -> torch.Tensor:
    """compressed-tensors; without act-order the experts' `g_idx` are there, and never filled."""
    ordered = matrix.get("weight_g_idx") if matrix.scheme.has_g_idx else None
    return dequantise.compressed(
        matrix["weight_packed"],
        matrix["weight_scale"],
        matrix.get("weight_zero_point"),
        ordered,
        bits=32 // matrix.scheme.pack_factor,
    )


def _compressed_expert(matrix: Matrix) -> torch.Tensor:
    """The same with every parameter transposed."""
    zeros = matrix.get("weight_zero_point")
    return dequantise.compressed(
        matrix["weight_packed"].transpose(-1, -2),
        matrix["weight_scale"].transpose(-1, -2),
        None if zeros is None else zeros.transpose(-1, -2),
        matrix["weight_g_idx"] if matrix.scheme.actorder == "group" else None,
        bits=matrix.scheme.num_bits,
    )


def _awq(matrix: Matrix) -> torch.Tensor:
    return dequantise.awq(matrix["qweight"], matrix["qzeros"], matrix["scales"])


def _gptq(matrix: Matrix) -> torch.Tensor:
    config = matrix.method.quant_config
    ordered = matrix["g_idx"] if config.desc_act else None
    return dequantise.gptq(
        matrix["qweight"], matrix["scales"], config.group_size, ordered, bits=config.weight_bits
    )


def _moe_wna16(matrix: Matrix) -> torch.Tensor:
    config = matrix.method.quant_config
    zeros = matrix["qzeros"] if config.has_zp else None
    return dequantise.moe_wna16(matrix["qweight"], matrix["scales"], zeros, bits=config.weight_bits)


def _nvfp4(matrix: Matrix) -> torch.Tensor:
    weight = matrix["weight"]
    scale_2 = matrix.part_scales("weight_scale_2", weight.shape[0])
    return dequantise.nvfp4(weight, matrix["weight_scale"], scale_2)


def input_global_scale(matrix: Matrix) -> torch.Tensor | None:
    """What NVFP4 rows are multiplied with before they are quantised: a scalar, fp32.

    None where they stay as they are: in W4A16 checkpoints, whose experts have scales all the same,
    and where the user asks for scales of each token, which are not imitated. As on GPUs, fused
    matrices and the experts of all ranks share the largest input scale, and so its reciprocal.
    Source: modelopt_quant.py, `process_weights_after_loading` of ModelOptFp4LinearMethod and, for
    flashinfer_cutlass and flashinfer_trtllm, of ModelOptNvFp4FusedMoEMethod.
    """
    config = matrix.method.quant_config
    if config.is_w4a16 or config.use_per_token_activation:
        return None
    scale = Matrix(matrix.layer, matrix.method, matrix.prefix).get("input_scale")
    return None if scale is None else fp4_global_scale(scale)


def _nvfp4_input(matrix: Matrix) -> Rounding | None:
    scale = input_global_scale(matrix)
    return None if scale is None else lambda x: activations.fp4_blocks(x, scale)


def _mxfp4(matrix: Matrix) -> torch.Tensor:
    return dequantise.mxfp4(matrix["weight"], matrix["weight_scale"])


# --- ModelSlim ----------------------------------------------------------------------------------


def _modelslim(matrix: Matrix) -> torch.Tensor:
    if matrix.get("deq_scale") is None:
        return dequantise.scaled(matrix["weight"], matrix["weight_scale"], matrix["weight_offset"])
    scale = _deq_scale(matrix) / matrix["input_scale"].float()
    return dequantise.scaled(matrix["weight"], scale[:, None])


def _deq_scale(matrix: Matrix) -> torch.Tensor:
    """[out] fp32; for fp16 models it is stored as the bits of fp32 in int64."""
    scale = matrix["deq_scale"]
    return scale.to(torch.int32).view(torch.float32) if scale.dtype == torch.int64 else scale


def _modelslim_input(matrix: Matrix) -> Rounding:
    scale, offset = matrix.get("input_scale"), matrix.get("input_offset")
    if scale is None or offset is None:
        return activations.ascend_tokens
    return lambda x: activations.ascend_static(x, scale, offset)


def _modelslim_addend(matrix: Matrix) -> torch.Tensor | None:
    """What `quant_bias` holds beyond the correction for the input's offset, times `deq_scale`.

    `quant_bias` is the whole matrix's and added by one rank; the correction is each rank's own.
    """
    bias, offset = matrix.get("quant_bias"), matrix.get("input_offset")
    if bias is None or offset is None:
        return None
    correction = matrix["weight"].sum(1, dtype=torch.int32) * offset.to(torch.int32)
    whole = bias if _adds_bias(matrix.layer) else torch.zeros_like(bias)
    return (whole + correction).float() * _deq_scale(matrix)


def _adds_bias(layer: Any) -> bool:
    """Whether this rank adds what belongs to all columns: any, where only rows are cut."""
    from sglang.srt.layers.linear import RowParallelLinear

    if not isinstance(layer, RowParallelLinear) or layer.tp_group is None:
        return True
    return layer.tp_group.rank_in_group == 0


_FP8_LINEAR = Layout(_eight_bits, _fp8_linear_input)
_FP8_EXPERTS = Layout(_eight_bits, _fp8_block_or_expert_input)
_INT8 = Layout(_eight_bits, _int8_input)
_NVFP4 = Layout(_nvfp4, _nvfp4_input)
_MODELSLIM = Layout(_modelslim, _modelslim_input, _modelslim_addend)

#: class name of a scheme or method of SGLang's -> its layout.
LAYOUTS: dict[str, Layout] = {
    "Fp8LinearMethod": _FP8_LINEAR,
    "Fp8MoEMethod": _FP8_EXPERTS,
    "ModelOptFp8LinearMethod": _FP8_LINEAR,
    "ModelOptFp8MoEMethod": _FP8_EXPERTS,
    "CompressedTensorsW8A8Fp8": _FP8_LINEAR,
    "CompressedTensorsW8A8Fp8MoE": _FP8_EXPERTS,
    "CompressedTensorsW8A16Fp8": Layout(_eight_bits),
    "CompressedTensorsW8A8Int8": _INT8,
    "W8A8Int8LinearMethod": _INT8,
    "W8A8Int8MoEMethod": _INT8,
    "CompressedTensorsWNA16": Layout(_compressed),
    "CompressedTensorsWNA16MoE": Layout(_compressed_expert),
    "AWQLinearMethod": Layout(_awq),
    "AWQMoEMethod": Layout(_awq),
    "MoeWNA16Method": Layout(_moe_wna16),
    "GPTQMarlinLinearMethod": Layout(_gptq),
    "GPTQMarlinMoEMethod": Layout(_gptq),
    "ModelOptFp4LinearMethod": _NVFP4,
    "ModelOptNvFp4FusedMoEMethod": _NVFP4,
    "QuarkW4A4MXFP4": Layout(_mxfp4),
    "QuarkW4A4MXFp4MoE": Layout(_mxfp4),
    "ModelSlimW8A8Int8": _MODELSLIM,
    "ModelSlimW8A8Int8MoE": _MODELSLIM,
}
