"""The exchange plan of the running server, worked out again in each rank from its arguments."""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from sglang.srt.runtime_context import get_parallel, get_server_args, process_model_config

from sglang_minimax.layers.agreeing import Gather, common_name, group_gather
from sglang_minimax.layers.stage import architecture_here
from sglang_minimax.moe_exchange.paths import FORCEABLE
from sglang_minimax.moe_exchange.plan import ExchangePlan, plan_for
from sglang_minimax.moe_exchange.rules import VARIABLE
from sglang_minimax.patches.arguments import launch_of

#: SGLang's ModelConfig -> the plan of the server that has it. Every layer asks.
_plans: WeakKeyDictionary[Any, ExchangePlan] = WeakKeyDictionary()


def plan_here() -> ExchangePlan:
    """The plan of this server, the same on all ranks. Collective the first time on several nodes.

    Raises PathError, on every rank, where the nodes' environments ask for different paths: their
    ranks would wait for each other in different collectives.
    """
    config = process_model_config()
    if config not in _plans:
        launch = launch_of(get_server_args())
        if launch.nodes > 1:
            _agree_once(launch.moe_exchange)
        _plans[config] = plan_for(architecture_here(config.hf_config), launch)
    return _plans[config]


@cache
def _agree_once(name: str | None) -> None:
    group = get_parallel().world_group
    agree(name, group_gather("any", group.world_size, "world_group"))


def agree(name: str | None, gather: Gather[str | None]) -> None:
    """Make sure that all ranks are asked for the same path. name: what this one is asked for."""
    common_name(VARIABLE, list(FORCEABLE), gather(name))
