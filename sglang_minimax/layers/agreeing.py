"""How the ranks of a group come to one answer while layers are built: which kernel they run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from sglang_minimax.errors import PathError

T = TypeVar("T")
# What each rank of the group has, in its order, to every rank: collective, and a barrier.
Gather = Callable[[T], list[T]]


#: Why the CPU gets plain PyTorch: a kernel could be interpreted there, a thousand times slower.
NO_ACCELERATOR = "no accelerator for a kernel"


def asked_for(variable: str, known: Sequence[str]) -> str | None:
    """The path that the environment asks for, None where it leaves the choice to us.

    Raises PathError where the name is not one of `known`.
    """
    name = os.environ.get(variable) or None
    if name is not None and name not in known:
        raise PathError(
            f"{variable}={name} is not known; use one of {', '.join(known)}, or unset it."
        )
    return name


def not_served(variable: str, name: str, why: str) -> PathError:
    """What ends the start where the path that was asked for does not run."""
    return PathError(f"{variable}={name}: {why}; unset it for a path that runs here.")


def group_gather(device: str, size: int, kind: str = "attn_tp_group") -> Gather[Any]:
    """Gather a picklable value over a group, through the host.

    kind: SGLang's name for the group; size: its ranks.

    Alone, and on the CPU, where ranks run the same code on the same machine and cannot differ, the
    rank's own value stands for all.
    """
    if size == 1 or device == "cpu":
        return lambda value: [value] * size
    # Here, so that the rules of agreement can be tested without SGLang.
    from sglang.srt.runtime_context import get_parallel

    group = getattr(get_parallel(), kind).cpu_group

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
