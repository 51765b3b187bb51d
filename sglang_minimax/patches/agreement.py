"""All ranks say yes, or none does: the ranks of a weight update exchange what they found.

A rank of a running engine takes part in `together` once for each step of a call, whatever happens
to it in that step, so that no rank waits for another that has given up. The exchange goes over
gloo, among all ranks of a replica.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from sglang.srt.runtime_context import get_parallel

from sglang_minimax.errors import MinimaxError
from sglang_minimax.loading.problems import Problems, joined

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Step = Callable[[Problems], Result]


def together(step: Step[Result]) -> tuple[Result | None, Problems]:
    """Run one step on every rank; return its result here, and the problems of all ranks.

    step: enters what it finds in the Problems that it is given; what it raises is entered for it.
    The result is None where it raised.
    """
    problems, result = Problems(), None
    try:
        result = step(problems)
    except MinimaxError as error:
        problems.say(str(error))
    except Exception as error:
        logger.exception("weight update")
        problems.say(f"{type(error).__name__}: {error}")
    return result, agree(problems)


def reason_not_to_meet() -> str | None:
    """Why the ranks cannot agree on a call, in one sentence; None where they can."""
    parallel = get_parallel()
    if parallel.attn_dp_enabled and parallel.enable_dp_attention_local_control_broadcast:
        return (
            "--enable-dp-attention-local-control-broadcast lets attention groups hear of a weight "
            "update at different times, so that they cannot agree on it; start without that option."
        )
    return None


def agree(problems: Problems) -> Problems:
    """The problems of all ranks, the same on all of them."""
    group = get_parallel().world_group
    found: list[Any] = [None] * group.world_size
    if group.world_size == 1:
        return joined([problems])
    dist.all_gather_object(found, problems, group=group.cpu_group)
    return joined(found)
