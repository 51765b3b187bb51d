"""The formats that the CPU platform computes, as their configs and matrices: one `Case` each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.quantised import matrices, rounding
from tests.quantised.layers import LAYER, Case


def compressed_tensors(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> Any:
    common = {"symmetric": True, "dynamic": False}
    group = {
        "targets": ["Linear"],
        "weights": common | weights,
        "input_activations": inputs and common | weights | {"num_bits": 8} | inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }


FLOAT8, INT8, INT4 = ({"num_bits": n, "type": t} for n, t in ((8, "float"), (8, "int"), (4, "int")))
W4 = INT4 | {"strategy": "group", "group_size": 128}
FP8 = {"quant_method": "fp8", "fmt": "float8_e4m3fn"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "lm_head": False}
NVFP4 = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "config_groups": {"group_0": {"weights": {"group_size": 16}, "targets": ["Linear"]}},
    "ignore": ["lm_head"],
}
_FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
QUARK = {
    "quant_method": "quark",
    "export": {"kv_cache_group": [], "pack_method": "reorder"},
    "global_quant_config": {
        "weight": {**_FP4, "is_dynamic": False},
        "input_tensors": {**_FP4, "is_dynamic": True},
        "output_tensors": None,
        "bias": None,
    },
    "exclude": ["lm_head"],
    "layer_quant_config": {},
    "layer_type_quant_config": {},
}
_MODULES = [f"self_attn.{name}_proj" for name in "qkvo"]
_W123 = [f"block_sparse_moe.experts.0.w{i}" for i in (1, 2, 3)]


def modelslim(attention: str) -> dict[str, str]:
    described = {f"{LAYER}.{name}.weight": attention for name in _MODULES}
    return described | {f"{LAYER}.{name}.weight": "W8A8_DYNAMIC" for name in _W123}


def _groups(x: torch.Tensor) -> torch.Tensor:
    return rounding.by_row(x, lambda row: rounding.fp8_group(row, 128))


def _tokens(x: torch.Tensor) -> torch.Tensor:
    return rounding.by_row(x, rounding.fp8_token)


def _tensor(x: torch.Tensor) -> torch.Tensor:
    return rounding.by_row(x, lambda row: rounding.fp8_given(row, rounding.largest(x)))


def _static(x: torch.Tensor) -> torch.Tensor:
    return rounding.by_row(x, lambda row: rounding.fp8_given(row, np.float32(0.0123)))


def _nvfp4(x: torch.Tensor) -> torch.Tensor:
    return rounding.by_row(x, lambda row: rounding.nvfp4(row, np.float32(1) / np.float32(0.01)))


def _int8(x: torch.Tensor) -> torch.Tensor:
    return rounding.by_row(x, rounding.int8_token)


def _ascend(x: torch.Tensor) -> torch.Tensor:
    return rounding.by_row(x, rounding.ascend_token)


def _ascend_static(x: torch.Tensor) -> torch.Tensor:
    scale, offset = np.float32(1 / 16), np.float32(3)
    return rounding.by_row(x, lambda row: rounding.ascend_given(row, scale, offset))


def _per_tensor(static: bool, shape: tuple[int, ...] = ()) -> Callable[..., matrices.Stored]:
    return lambda *a: matrices.fp8_tensor(*a, static=static, shape=shape)


_FP8_CT = "float-quantized"
_TENSOR, TOKEN = {"strategy": "tensor"}, {"strategy": "token", "dynamic": True}
INT8_CONFIG = compressed_tensors("int-quantized", INT8 | {"strategy": "channel"}, TOKEN)

CASES = {
    "fp8 blocks": Case(
        "fp8",
        FP8 | {"activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        matrices.fp8_blocks,
        _groups,
        _groups,
    ),
    "fp8 tensor dynamic": Case(
        "fp8", FP8 | {"activation_scheme": "dynamic"}, _per_tensor(False), _tokens, _tensor
    ),
    "fp8 tensor static": Case(
        "fp8", FP8 | {"activation_scheme": "static"}, _per_tensor(True), _static, _static
    ),
    "modelopt fp8": Case(
        "modelopt_fp8",
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
        _per_tensor(True),
        _static,
        _static,
    ),
    "compressed fp8 blocks": Case(
        "compressed-tensors",
        compressed_tensors(
            _FP8_CT,
            FLOAT8 | {"strategy": "block", "block_structure": [128, 128]},
            {"strategy": "group", "group_size": 128, "dynamic": True, "block_structure": None},
        ),
        lambda *a: matrices.fp8_blocks(*a, name="weight_scale"),
        _groups,
        _groups,
    ),
    "compressed fp8 channels": Case(
        "compressed-tensors",
        compressed_tensors(_FP8_CT, FLOAT8 | {"strategy": "channel"}, TOKEN),
        lambda *a: matrices.channels(*a, integer=False),
        _tokens,
        _tokens,
    ),
    "compressed fp8 tensor static": Case(
        "compressed-tensors",
        compressed_tensors(_FP8_CT, FLOAT8 | _TENSOR, _TENSOR),
        _per_tensor(True, (1,)),
        _static,
        _static,
    ),
    "compressed fp8 tensor dynamic": Case(
        "compressed-tensors",
        compressed_tensors(_FP8_CT, FLOAT8 | _TENSOR, _TENSOR | {"dynamic": True}),
        _per_tensor(False, (1,)),
        _tokens,
        _tensor,
    ),
    "compressed w4a16": Case(
        "compressed-tensors",
        compressed_tensors("pack-quantized", W4, None),
        matrices.compressed,
    ),
    "compressed w4a16 act-order": Case(
        "compressed-tensors",
        compressed_tensors("pack-quantized", W4 | {"actorder": "group"}, None),
        lambda *a: matrices.compressed(*a, ordered=True),
        sizes=(1,),
    ),
    "compressed w4a16 zero points": Case(
        "compressed-tensors",
        compressed_tensors("pack-quantized", W4 | {"symmetric": False}, None),
        lambda *a: matrices.compressed(*a, zeros=True),
        kinds=("qkv", "o"),
    ),
    "w8a8 int8": Case(
        "w8a8_int8",
        INT8_CONFIG,
        lambda *a: matrices.channels(*a, integer=True),
        _int8,
        _int8,
    ),
    "compressed int8": Case(
        "compressed-tensors",
        INT8_CONFIG,
        lambda *a: matrices.channels(*a, integer=True),
        _int8,
        kinds=("qkv", "o"),
    ),
    "awq": Case(
        "awq",
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
        matrices.awq,
        sizes=(1, 2),
    ),
    "awq as moe_wna16": Case(  # experts that Marlin cannot cut
        "awq",
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
        matrices.awq,
        kinds=("experts",),
        sizes=(8,),
    ),
    "gptq": Case(
        "gptq_marlin",
        GPTQ | {"desc_act": False},
        matrices.gptq,
    ),
    "gptq act-order": Case(
        "gptq_marlin",
        GPTQ | {"desc_act": True},
        lambda *a: matrices.gptq(*a, ordered=True),
        sizes=(1,),
    ),
    "nvfp4": Case(
        "modelopt_fp4",
        NVFP4,
        matrices.nvfp4,
        _nvfp4,
        _nvfp4,
    ),
    "nvfp4 w4a16": Case(  # its experts have scales of inputs all the same
        "modelopt_fp4", NVFP4 | {"quant_algo": "W4A16_NVFP4"}, matrices.nvfp4, kinds=("experts",)
    ),
    "mxfp4": Case("quark", QUARK, matrices.mxfp4),
    "modelslim": Case("modelslim", modelslim("W8A8_DYNAMIC"), matrices.modelslim, _ascend, _ascend),
    "modelslim static": Case(
        "modelslim",
        modelslim("W8A8"),
        matrices.modelslim_static,
        _ascend_static,
        kinds=("qkv", "o"),
        sizes=(1,),  # a rank's share of o_proj is no product: see the test of quant_bias
    ),
}
