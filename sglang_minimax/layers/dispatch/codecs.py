"""The forms in which rows travel, made and read again by the rules of the experts' kernels.

On a GPU the functions are the runner's own, so that the expert product sees the numbers that it
would have made itself of the same row; on the CPU they are PyTorch's (jit_kernels/row_quant).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from jit_kernels.row_quant.reference import fp4_blocks, fp4_global_scale, fp8_groups
from sglang_minimax.layers.dispatch.packing import Types
from sglang_minimax.moe_exchange.paths import Rows
from sglang_minimax.moe_exchange.payload import FP4_BLOCK, FP8_GROUP


class Codec(Protocol):
    """How rows are written for transport, and handed to SGLang's runner on arrival."""

    types: Types

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[rows, hidden] in the model's dtype -> values and scales, as `types` says."""
        ...

    def hand_over(
        self, values: torch.Tensor, scales: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """What the runner gets: hidden_states, and more of SGLang's StandardDispatchOutput."""
        ...


def codec_for(rows: Rows, dtype: torch.dtype, layer: Any) -> Codec:
    """The codec of a path. dtype: the model's; layer: the experts, with their input scales."""
    if rows is Rows.FP8:
        return Fp8Codec(dtype)
    if rows is Rows.FP4:
        return Fp4Codec(layer)
    return PlainCodec(dtype)


class PlainCodec:
    """Rows as they are."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.types = Types(dtype, None)

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, None]:
        return rows, None

    def hand_over(
        self, values: torch.Tensor, scales: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        return values, {}


class Fp8Codec:
    """e4m3 with an fp32 scale for each 128 columns, as SGLang's Triton runner quantises.

    The runner takes the codes as they are (`hidden_states_pre_quant`, which it uses for
    SGLANG_OPT_MOE_QUANT_ONCE); the tensor beside them only says shape and dtype, and may become
    its output.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.types = Types(torch.float8_e4m3fn, torch.float32)

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if rows.device.type == "cpu":
            return fp8_groups(rows, FP8_GROUP)
        # The function that fused_moe_triton_kernels.invoke_fused_moe_kernel calls.
        from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_group_quant_fp8

        codes, scales = sglang_per_token_group_quant_fp8(rows.contiguous(), FP8_GROUP)
        return codes, scales

    def hand_over(
        self, values: torch.Tensor, scales: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        shape_only = values.new_empty(values.shape, dtype=self._dtype)
        return shape_only, {"hidden_states_pre_quant": (values, scales)}


class Fp4Codec:
    """e2m1 with an e4m3 scale for each 16 columns, under the checkpoint's scale of the input."""

    types = Types(torch.uint8, torch.uint8)

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if rows.device.type == "cpu":
            # The same on every rank: each holds the input scales of all experts.
            return fp4_blocks(rows, fp4_global_scale(self._layer.w13_input_scale))
        count, hidden = rows.shape
        if count == 0:  # which SGLang keeps from the kernel too
            return (
                rows.new_empty((0, hidden // 2), dtype=torch.uint8),
                rows.new_empty((0, hidden // FP4_BLOCK), dtype=torch.uint8),
            )
        from sglang.srt.layers.quantization.modelopt_quant import fp4_quantize

        codes, scales = fp4_quantize(
            rows, self._layer.w13_input_scale_quant, is_sf_swizzled_layout=False
        )
        return codes, scales.view(torch.uint8).reshape(count, hidden // FP4_BLOCK)

    def hand_over(
        self, values: torch.Tensor, scales: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        if values.device.type != "cpu" and self._layer.runner_backend.is_flashinfer_cutlass():
            from flashinfer import nvfp4_block_scale_interleave

            scales = nvfp4_block_scale_interleave(scales)
        return values, {"hidden_states_scale": scales}
