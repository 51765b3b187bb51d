"""Replacements for questions about the GPU that SGLang asks while it builds a quantised layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

#: Ten times the compute capability at which SGLang takes the formats' ordinary layouts.
CAPABILITY = 80


def marlin_is_there(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_check_marlin_supported`; types and group sizes are still checked."""

    @functools.wraps(original)
    def _check_marlin_supported(
        quant_type: Any, group_size: Any, has_zp: bool, device_capability: Any = None
    ) -> Any:
        return original(quant_type, group_size, has_zp, CAPABILITY)

    return _check_marlin_supported


def awq_is_there(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `MoeWNA16Config.__init__`, which computes with a compute capability of None for AWQ.

    For GPTQ it asks for none, and does the same otherwise.
    """

    @functools.wraps(original)
    def __init__(self: Any, linear_quant_method: str, *args: Any, **kwargs: Any) -> None:
        if linear_quant_method != "awq":
            original(self, linear_quant_method, *args, **kwargs)
            return
        original(self, "gptq", *args, **kwargs)
        self.linear_quant_method, self.use_marlin = "awq", False

    return __init__


def any_device(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `ModelOptNvFp4FusedMoEMethod.__init__`, which wants SM80 or later."""

    @functools.wraps(original)
    def __init__(self: Any, quant_config: Any) -> None:
        self.quant_config = quant_config
        self._lora_marlin = False
        self.enable_flashinfer_trtllm_moe = False
        self.use_flashinfer_trtllm_weight_layout = False
        self._cache_permute_indices = {}

    return __init__


def no_kernel(original: type) -> type:
    """Replace `NPUW8A8Int8MoEMethod`, whose parts look up operators of torch_npu."""

    class NPUW8A8Int8MoEMethod:
        """The experts' kernel on NPUs, which is never called here."""

    return NPUW8A8Int8MoEMethod
