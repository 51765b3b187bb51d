"""The exchange plan of the running server, worked out again in each rank from its arguments."""

from __future__ import annotations

from functools import cache

from sglang.srt.runtime_context import get_server_args, process_model_config

from sglang_minimax.layers.stage import architecture_here
from sglang_minimax.moe_exchange.plan import ExchangePlan, plan_for
from sglang_minimax.patches.arguments import launch_of


@cache
def plan_here() -> ExchangePlan:
    """The plan of this server; the same on all ranks, since it depends on the arguments alone."""
    return plan_for(
        architecture_here(process_model_config().hf_config), launch_of(get_server_args())
    )
