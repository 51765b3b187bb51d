"""Our dispatchers and SGLang's runners behind the backend that SGLang calls `customized`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_minimax.moe_exchange.paths import CUSTOMIZED


def ours_for_customized(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `create_moe_dispatcher(moe_runner_config, quant_method)`: ours behind our backend."""

    @functools.wraps(original)
    def create_moe_dispatcher(moe_runner_config: Any, quant_method: Any) -> Any:
        from sglang.srt.layers.moe.utils import get_moe_a2a_backend

        if not get_moe_a2a_backend().is_customized():
            return original(moe_runner_config, quant_method=quant_method)
        from sglang_minimax.layers.dispatch.factory import dispatcher_for
        from sglang_minimax.layers.plan import plan_here

        return dispatcher_for(plan_here().path, moe_runner_config)

    return create_moe_dispatcher


def runners_of_the_standard_one(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `FusedOpPool.get_fused_func(dispatch_name, runner_name)`, bound to its class.

    What our dispatchers hand to a runner is what SGLang's standard one would, so the fused function
    for no backend is the one for ours.
    """

    @functools.wraps(original)
    def get_fused_func(dispatch_name: str, runner_name: str) -> Any:
        return original("none" if dispatch_name == CUSTOMIZED else dispatch_name, runner_name)

    return get_fused_func
