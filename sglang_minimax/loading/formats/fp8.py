"""FP8 (e4m3) with one fp32 scale for each block, or for each matrix.

Stored, for a matrix [out, in]:
  weight            [out, in]                      F8_E4M3
  blocks:           weight_scale_inv [out/128, in/128]; it multiplies, its name notwithstanding
  one for each:     weight_scale (); with static activations input_scale () as well
Source: SGLang layers/quantization/fp8.py (Fp8Config, Fp8MoEMethod), utils.py (is_layer_skipped) and
modelopt_quant.py (ModelOptFp8Config); the published MiniMax-M2 checkpoints (blocks); AutoFP8 and
TensorRT Model Optimizer exports (one for each matrix).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_minimax.errors import ConfigError
from sglang_minimax.loading.formats.base import (
    COLUMNS,
    ROWS,
    SCALE_TYPES,
    Axis,
    Format,
    Kernel,
    Recipe,
    StoredTensor,
)
from sglang_minimax.loading.formats.nvfp4 import modelopt_skips
from sglang_minimax.loading.formats.skips import Skips, entries, inside

FP8 = frozenset({"F8_E4M3"})
WEIGHT = StoredTensor("weight", (Axis(ROWS), Axis(COLUMNS)), FP8)

# Triton multiplies e4m3 from Ada on; weights of older GPUs would need Marlin, which SGLang has for
# the attention projections only.
_FP8_SOURCE = "layers/quantization/fp8.py"
KERNELS: tuple[Kernel, ...] = (
    Kernel("cuda", "triton", _FP8_SOURCE, since=89),
    Kernel("cuda", "deep_gemm", _FP8_SOURCE, since=90),
    Kernel("rocm", "triton", _FP8_SOURCE),
)
# SGLang does not run ModelOpt checkpoints on ROCm (configs/model_config.py).
MODELOPT_KERNELS: tuple[Kernel, ...] = (
    Kernel("cuda", "triton", "layers/quantization/modelopt_quant.py", since=89),
)


def block_scale(kind: str, rows: int, columns: int) -> StoredTensor:
    """One scale for each block of rows x columns; blocks at the edge may be smaller."""
    axes = (Axis(ROWS, per=rows), Axis(COLUMNS, per=columns))
    return StoredTensor(kind, axes, SCALE_TYPES, scale=True, padding=1)


def blocks(rows: int, columns: int, kind: str = "weight_scale_inv") -> Format:
    """FP8 with one scale, called `kind`, for each block of rows x columns."""
    title = f"FP8 in {rows}x{columns} blocks"
    return Format("fp8-blocks", title, (WEIGHT, block_scale(kind, rows, columns)))


def per_tensor(static: bool) -> Format:
    """FP8 with one scale for each matrix. static: and one for its input."""
    scale = StoredTensor("weight_scale", (), SCALE_TYPES, scale=True)
    of_input = StoredTensor("input_scale", (), SCALE_TYPES, scale=True, shared=True, equal=True)
    if static:
        return Format(
            "fp8-tensor-static", "FP8 per tensor, static inputs", (WEIGHT, scale, of_input)
        )
    return Format("fp8-tensor", "FP8 per tensor", (WEIGHT, scale))


def block_sides(block: object, key: str) -> tuple[int, int]:
    """The two sides of a block. Raises ConfigError for one that is none."""
    if not isinstance(block, (list, tuple)) or len(block) != 2:
        raise ConfigError(
            f"config: {key} is {block!r}, but it must name two numbers such as [128, 128]; correct "
            "quantization_config in config.json."
        )
    for side in block:
        if isinstance(side, bool) or not isinstance(side, int) or side < 1:
            raise ConfigError(
                f"config: {key} is {block!r}, but both numbers must be at least 1; correct "
                "quantization_config in config.json."
            )
    rows, columns = block
    return rows, columns


def read(config: Mapping[str, Any]) -> Recipe | None:
    """The recipe of `quant_method: fp8` and of ModelOpt's FP8. Raises ConfigError."""
    if config.get("quant_method") == "fp8":
        return _fp8(config)
    # hf_quant_config.json has everything under one key, beside the name of its producer.
    inner = config.get("quantization")
    nested = isinstance(inner, Mapping) and "quant_algo" not in config
    section: Mapping[str, Any] = inner if nested and isinstance(inner, Mapping) else config
    modelopt = config.get("quant_method") in (None, "modelopt", "modelopt_fp8")
    if modelopt and section.get("quant_algo") == "FP8":
        left, form = modelopt_skips(section, nested), per_tensor(static=True)
        return Recipe("modelopt-fp8", "modelopt_fp8", form, left, MODELOPT_KERNELS)
    return None


def _fp8(config: Mapping[str, Any]) -> Recipe:
    fmt = config.get("fmt")
    if fmt not in (None, "e4m3", "float8_e4m3fn"):
        raise ConfigError(
            f"config: fmt is {fmt!r}, but SGLang's FP8 kernels read e4m3; quantise the checkpoint "
            "to float8_e4m3fn."
        )
    scheme, block = config.get("activation_scheme"), config.get("weight_block_size")
    left = _skips(config)
    if scheme not in (None, "static", "dynamic"):
        raise ConfigError(
            f"config: activation_scheme is {scheme!r}, but it must be static or dynamic; correct "
            "quantization_config in config.json."
        )
    if block is None:
        if scheme is None:
            raise ConfigError(
                "config: quantization_config of FP8 has neither weight_block_size nor "
                "activation_scheme, so that it does not say which scales there are; add what the "
                "checkpoint was quantised with."
            )
        static = scheme == "static"
        return Recipe("fp8-static" if static else "fp8", "fp8", per_tensor(static), left, KERNELS)
    rows, columns = block_sides(block, "weight_block_size")
    if scheme == "static":
        raise ConfigError(
            f"config: activation_scheme is 'static' with blocks of {rows}x{columns}, but SGLang "
            "runs blocks with dynamic activations only; quantise the checkpoint with dynamic ones."
        )
    return Recipe("fp8-blocks", "fp8", blocks(rows, columns), left, KERNELS)


def _skips(config: Mapping[str, Any]) -> Skips:
    """Modules as is_layer_skipped reads them: by name on the boundaries of parts.

    `model.` in front and a dot behind make no difference. It asks for q_proj, k_proj and v_proj,
    not for qkv_proj, and takes any matrix of a layer's experts for all of them.
    """
    key = "ignored_layers" if "ignored_layers" in config else "modules_to_not_convert"
    listed = tuple(each.removeprefix("model.").rstrip(".") for each in entries(config, key))
    skips = Skips(listed, linear=_linear, shards=inside, stacked=_stacked)
    skips.check(key, inside)
    return skips


def _linear(entry: str, module: str) -> bool:
    return not module.endswith("qkv_proj") and inside(entry, module)


def _stacked(entry: str, module: str) -> bool:
    return inside(entry, module) or ("experts" in entry and module in f"model.{entry}")
