"""How the ranks of an attention-TP group come to one answer while layers are built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
# What each rank of the group has, in its order, to every rank: collective, and a barrier.
Gather = Callable[[T], list[T]]


def group_gather(device: str, size: int) -> Gather[Any]:
    """Gather a picklable value over the attention-TP group, through the host.

    Alone, and on the CPU, where ranks run the same code on the same machine and cannot differ, the
    rank's own value stands for all.
    """
    if size == 1 or device == "cpu":
        return lambda value: [value] * size
    # Here, so that the rules of agreement can be tested without SGLang.
    from sglang.srt.runtime_context import get_parallel

    group = get_parallel().attn_tp_group.cpu_group

    def gather(value: T) -> list[T]:
        found: list[Any] = [None] * size
        torch.distributed.all_gather_object(found, value, group=group)
        return found

    return gather


def first_problem(gather: Gather[str]) -> Callable[[str], str]:
    """An `Agree` of `channel`: the first problem of any rank, with its number if not all's."""

    def agree(problem: str) -> str:
        found = gather(problem)
        if len(set(found)) == 1:
            return found[0]
        return next(f"rank {rank}: {each}" for rank, each in enumerate(found) if each)

    return agree
