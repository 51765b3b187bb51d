"""SGLang's quantisation configs with the arithmetic of its methods replaced.

A config of ours is a subclass of SGLang's with the same name. It lets SGLang's choose a method, and
gives the chosen object a subclass of its own class, again with the same name: SGLang's weight
loaders go by the names of classes. The parameters stay as they were loaded, and weights are
dequantised whenever they are used. So there is no second copy that an update of weights, or a move
of experts, could leave behind.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import (
    FusedMoEMethodBase,
    LinearMethodBase,
    QuantizationConfig,
)
from sglang.srt.layers.quantization.unquant import (
    UnquantizedFusedMoEMethod,
    UnquantizedLinearMethod,
)
from torch.nn import functional as F

from jit_kernels.row_quant.reference import fp4_rows, fp8_rows
from sglang_minimax.errors import ConfigError
from sglang_minimax.platforms.cpu import experts
from sglang_minimax.platforms.cpu.quantised.layouts import (
    W2,
    W13,
    Layout,
    Matrix,
    input_global_scale,
    layout_of,
)

#: Attributes of SGLang's configs that are False for weights to be quantised while they are loaded.
SERIALISED = ("is_checkpoint_fp8_serialized", "is_checkpoint_nvfp4_serialized")

#: Names whose config on CUDA is another one, which also knows experts.
ON_CUDA = {"awq": "awq_marlin"}


@functools.cache
def config_class(name: str) -> type[QuantizationConfig]:
    """The config class for one of SGLang's quantisation methods, computing on the CPU.

    name: as SGLang resolved it, one of `support.QUANTIZATIONS`.
    """
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS

    original = QUANTIZATION_METHODS[ON_CUDA.get(name, name)]
    mixins: tuple[type, ...] = (_CpuConfig,)
    if name == "modelslim":
        mixins = (_FusedAttention, *mixins)
    members = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (*mixins, original), members)


class _CpuConfig:
    """What our subclasses of SGLang's configs do differently."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        if "w_bit" in config:  # as AutoAWQ writes it in a file of its own
            config = {"bits": config["w_bit"], "group_size": config.get("q_group_size"), **config}
        made = super().from_config(config)  # type: ignore[misc]
        if str(getattr(made, "kv_cache_quant_algo", "")).upper() == "FP8":
            # `--kv-cache-dtype auto` would take an FP8 cache, whose scales the attention here
            # does not apply. The scales keep their parameters under any name that is not empty.
            made.kv_cache_quant_algo = "auto"
        return made

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    def _check_scheme_supported(self, min_capability: int, error: bool = True) -> bool:
        """compressed-tensors and Quark ask for the compute capability; there is none."""
        return True

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """SGLang's method for a layer, computing with PyTorch. Raises ConfigError."""
        try:
            method = super().get_quant_method(layer, prefix)  # type: ignore[misc]
        except NotImplementedError as error:
            remedy = "use a checkpoint in another format"
            if "W8A8Int8" in str(error):
                remedy = "start with --quantization w8a8_int8"
            raise ConfigError(f"{prefix}: {str(error).rstrip('.')}; {remedy}.") from error
        if isinstance(method, (UnquantizedLinearMethod, UnquantizedFusedMoEMethod)):
            return method
        if isinstance(method, FusedMoEMethodBase):
            ours: type = _ExpertsWithTorch
        elif isinstance(method, LinearMethodBase):
            ours = _LinearWithTorch
        else:
            return method  # of a KV cache, or none
        _check(layer, method, prefix)
        chosen: type = type(method)
        method.__class__ = _combined(ours, chosen)
        return method


class _FusedAttention:
    """ModelSlim's config, which learns what `qkv_proj` is made of on NPUs only."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        parts = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
        self.packed_modules_mapping: dict[str, Any]
        self.packed_modules_mapping.setdefault("model", parts)
        return super().get_quant_method(layer, prefix)  # type: ignore[misc]


def _check(layer: torch.nn.Module, method: Any, prefix: str) -> None:
    config: Any = getattr(method, "quant_config", None)
    if any(getattr(config, name, True) is False for name in SERIALISED):
        raise ConfigError(
            f"{config.get_name()} would quantise {prefix} while it is loaded, which needs a GPU; "
            "on the CPU platform use a checkpoint that is quantised already, or start without "
            "--quantization."
        )
    layout = layout_of(layer, method)
    scheme = getattr(layer, "scheme", None) or method
    if layout is None or getattr(method, "use_mxfp8", False):
        raise ConfigError(
            f"{prefix} is quantised as {type(scheme).__name__}, which the CPU platform cannot "
            "compute; see docs/cpu-platform.md for the formats that it can, or use a GPU."
        )
    if getattr(scheme, "input_symmetric", True) is False:
        raise ConfigError(
            f"{prefix} has asymmetric activations, which SGLang's kernels do not compute either; "
            "use a checkpoint with symmetric ones."
        )


@functools.cache
def _combined(ours: type, original: type) -> type:
    """A subclass of `original`, by the same name, with the members of `ours`.

    With `original` as its only base, it may become the class of a living object.
    """
    members: dict[str, Any] = {}
    for base in reversed(ours.__mro__[:-1]):
        members |= {name: value for name, value in vars(base).items() if name[:2] != "__"}
    members |= {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (original,), members)


class _AsLoaded:
    """Parameters stay as SGLang's loaders filled them, so they can be loaded again at any time."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing is repacked."""

    def restore_weights_before_loading(self, layer: torch.nn.Module) -> None:
        """Nothing was repacked."""


class _LinearWithTorch(_AsLoaded):
    """A linear layer's method."""

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[..., in] -> [..., out], in x's dtype."""
        layout, matrix = _layout(layer, self), Matrix(layer, self)
        rounding, addend = layout.rounding(matrix), layout.addend(matrix)
        rows = x.reshape(-1, x.shape[-1])
        if rounding is not None:
            rows = rounding(rows)
        product = F.linear(rows, layout.weight(matrix).to(x.dtype), bias)
        if addend is not None:
            product = product + addend.to(x.dtype)
        return product.reshape(*x.shape[:-1], -1)


class _ExpertsWithTorch(_AsLoaded):
    """An expert layer's method."""

    runner = None

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        """No runner of SGLang's: `apply` takes standard top-k with local ids."""
        if not experts.is_plain(layer, moe_runner_config):
            raise ConfigError(
                f"{layer.layer_name}: the CPU platform computes quantised experts with SwiGLU and "
                "without biases only; use a GPU."
            )

    def get_moe_runner_backend(self, layer: torch.nn.Module) -> None:
        """None declares what `create_moe_runner` says."""

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        """This rank's share of the experts' weighted sum, in the model's dtype.

        Rows that come quantised have the rounding of the first product behind them.
        """
        from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

        weights, ids, _ = dispatch_output.topk_output
        layout = _layout(layer, self)
        arrived = _arrived(dispatch_output, layer, self)
        x = dispatch_output.hidden_states if arrived is None else arrived
        first, second = (layout.rounding(Matrix(layer, self, p)) for p in (W13, W2))
        output = experts.local_experts(
            x,
            _Experts(layer, self, W13, layout, x.dtype),
            _Experts(layer, self, W2, layout, x.dtype),
            weights,
            ids,
            experts.Roundings(first if arrived is None else None, second),
        )
        return StandardCombineInput(hidden_states=output)


def _arrived(dispatch_output: Any, layer: Any, method: Any) -> torch.Tensor | None:
    """The values of rows that travelled quantised, [rows, hidden]; None for plain ones.

    FP8 rows lie beside a tensor in the model's dtype, which says how many they are: some kernels
    pad the codes to a multiple of four rows. FP4 rows stand in its place, so their dtype is the one
    that the layer was built for; their scales are in the order of the columns.
    """
    x = dispatch_output.hidden_states
    if dispatch_output.hidden_states_pre_quant is not None:
        codes, scales = (part[: x.shape[0]] for part in dispatch_output.hidden_states_pre_quant)
        return fp8_rows(codes, scales).to(x.dtype)
    if dispatch_output.hidden_states_scale is not None:
        factor = input_global_scale(Matrix(layer, method, W13))
        assert factor is not None, "rows travel in FP4 only where the experts round them so"
        return fp4_rows(x, dispatch_output.hidden_states_scale, factor).to(layer.params_dtype)
    return None


class _Experts:
    """An expert layer's matrices by local index, dequantised when they are asked for."""

    def __init__(
        self, layer: torch.nn.Module, method: Any, prefix: str, layout: Layout, dtype: torch.dtype
    ) -> None:
        self._make = lambda expert: layout.weight(Matrix(layer, method, prefix, expert)).to(dtype)

    def __getitem__(self, expert: int) -> torch.Tensor:
        return self._make(expert)


def _layout(layer: torch.nn.Module, method: Any) -> Layout:
    layout = layout_of(layer, method)
    assert layout is not None, "checked by get_quant_method"
    return layout
