"""How the ranks of a group come to one answer while layers are built: which kernel they run.

Environments differ between machines, and so may compilers. What only one rank knows is therefore
gathered before anything depends on it: all ranks then take the same steps, or raise the same error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from jit_kernels.choice import Implementation, one_line
from sglang_minimax.errors import PathError

T = TypeVar("T")
RequestT = TypeVar("RequestT")
# What each rank of the group has, in its order, to every rank: collective, and a barrier.
Gather = Callable[[T], list[T]]


#: Why the CPU gets plain PyTorch: a kernel could be interpreted there, a thousand times slower.
NO_ACCELERATOR = "no accelerator for a kernel"


def asked_for(variable: str) -> str | None:
    """The path that this rank's environment asks for, known or not; None where it names none."""
    return os.environ.get(variable) or None


def common_name(variable: str, known: Sequence[str], found: Sequence[str | None]) -> str | None:
    """The path that the environments of all ranks ask for, None where they leave it to us.

    found: `asked_for` of each rank, gathered, so that every rank raises the same PathError where a
    name is not one of `known`, or is not that of all.
    """
    same = len(set(found)) == 1
    for rank, name in enumerate(found):
        if name is not None and name not in known:
            where = "" if same else f" on rank {rank}"
            raise PathError(
                f"{variable}={name}{where} is not known; use one of {', '.join(known)}, "
                "or unset it."
            )
    if not same:
        other = next(rank for rank, name in enumerate(found) if name != found[0])
        first, second = (found[rank] or "unset" for rank in (0, other))
        raise PathError(
            f"{variable} is {first} on rank 0 and {second} on rank {other}; "
            "set it to one name on all machines, or unset it on all."
        )
    return found[0]


def not_served(variable: str, name: str, why: str) -> PathError:
    """What ends the start where the path that was asked for does not run."""
    return PathError(f"{variable}={name}: {why}; unset it for a path that runs here.")


def group_gather(device: str, size: int, kind: str = "attn_tp_group") -> Gather[Any]:
    """Gather a picklable value over a group, through the host.

    kind: SGLang's name for the group; size: its ranks.

    Alone, and on the CPU, where no step that follows is collective and every path adds up with the
    same collectives, the rank's own value stands for all.
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


def refusal_of(implementation: Implementation[RequestT, Any], request: RequestT) -> str:
    """Why the rules keep an implementation from a request on this rank, empty where they do not.

    Raises nothing: the other ranks wait for the answer.
    """
    try:
        return implementation.refusal(request) or ""
    except Exception as error:
        return one_line(error)


def first_problem(gather: Gather[str]) -> Callable[[str], str]:
    """An `Agree` of `channel`: the first problem of any rank, with its number if not all's."""
    return lambda problem: first_of(gather(problem))


def first_of(problems: Sequence[str]) -> str:
    """The first problem of any rank, "" for none; with the rank's number if it is not all's."""
    if len(set(problems)) == 1:
        return problems[0]
    return next(f"rank {rank}: {each}" for rank, each in enumerate(problems) if each)


def device_of(weight: torch.Tensor) -> torch.device:
    """Where a layer will compute. A loader may build the model without memory, and fill it."""
    if weight.device.type != "meta":
        return weight.device
    from sglang.srt.runtime_context import get_server_args

    kind = get_server_args().device
    if kind == "cpu":
        return torch.device(kind)
    return torch.device(kind, torch.get_device_module(kind).current_device())


def kind_and_capability(device: torch.device) -> tuple[str, tuple[int, int] | None]:
    """What requests say of a device. ROCm calls its devices cuda too, but has no capability."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return device.type, torch.cuda.get_device_capability(device) if nvidia else None


def tell(logger: logging.Logger, line: str, *, failed: bool, group_rank: int) -> None:
    """Log a start-up line: once a server, and as a warning once a group where something failed.

    failed: whether something that the rules allow does not run. group_rank: in the group that
    decided. SGLang's prefix of each line names the rank.
    """
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if failed and group_rank == 0:
        logger.warning("%s", line)
    elif not failed and parallel.tp_rank == 0 and parallel.pp_rank == 0:
        logger.info("%s", line)
