"""Which implementation of the attention prologue a group of ranks runs, and the line that says so.

All ranks of a group must run the same one: a rank that exchanges sums inside a kernel would wait
for ever for one that reduces them with a collective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from jit_kernels.qk_norm_rope import op
from jit_kernels.qk_norm_rope.op import Choice, KernelUnavailable, Request
from sglang_minimax.layers.agreeing import (
    NO_ACCELERATOR,
    Gather,
    asked_for,
    first_problem,
    not_served,
)

if TYPE_CHECKING:
    from jit_kernels.qk_norm_rope.channel import Channel

VARIABLE = "SGLANG_MINIMAX_QK_NORM"

#: The implementation that exchanges sums inside its kernel, over a channel.
EXCHANGING = "cuda"

Chooser = Callable[[Request, str | None], Choice]
# Opens a channel over the group, collectively, or says why there is none.
Opener = Callable[[], "tuple[Channel | None, str]"]


def forced() -> str | None:
    """The implementation that the environment asks for, None where it leaves the choice to us."""
    return asked_for(VARIABLE, op.names())


def prepare(
    request: Request,
    name: str | None,
    gather: Gather[tuple[str, str]],
    opener: Opener,
    chooser: Chooser = op.choose,
) -> tuple[Choice, Request, Channel | None]:
    """Choose for a request without a K/V write, and open a channel if it takes one. Collective.

    name: as in `choose_together`. Returns the choice, the request as it was decided (with
    `no_exchange` filled in), and the channel, None where the choice needs none.
    """
    channel = None
    if _may_exchange(request, name):
        channel, reason = opener()
        request = replace(request, no_exchange=reason)
    choice = choose_together(request, name, gather, chooser)
    if channel is not None and choice.name != EXCHANGING:
        channel.close()
        channel = None
    return choice, request, channel


def _may_exchange(request: Request, name: str | None) -> bool:
    if request.group_size == 1 or request.device != "cuda" or name not in (None, EXCHANGING):
        return False
    found = [each for each in op.IMPLEMENTATIONS if each.name == EXCHANGING]
    return bool(found) and found[0].refusal(request) is None


def choose_together(
    request: Request,
    name: str | None,
    gather: Gather[tuple[str, str]],
    chooser: Chooser = op.choose,
) -> Choice:
    """Return the fastest implementation that every rank of the group can run. Collective.

    name: the only one to consider, or None. Raises PathError, on every rank, where a rank
    cannot run it.
    """
    if name is not None:
        forced_choice = only(request, name, gather, chooser)
        if isinstance(forced_choice, str):
            raise not_served(VARIABLE, name, forced_choice)
        return forced_choice
    order = op.names()
    if request.device == "cpu":
        return replace(chooser(request, order[-1]), why=NO_ACCELERATOR)
    mine = chooser(request, None)
    while True:
        found = gather((mine.name, mine.why))
        slowest, why = max(found, key=lambda each: order.index(each[0]))
        if all(each[0] == slowest for each in found):
            return mine
        rank = [each[0] for each in found].index(slowest)
        try:
            mine = chooser(request, slowest)
        except KernelUnavailable:  # not here either: the last in the list serves everything
            mine = chooser(request, order[-1])
        mine = replace(mine, why=f"rank {rank}: {why}")


def only(
    request: Request,
    name: str,
    gather: Gather[tuple[str, str]],
    chooser: Chooser = op.choose,
) -> Choice | str:
    """Return the implementation called `name` where every rank can run it, else why not.

    Collective; the same kind of answer on all ranks, and the same sentence.
    """
    problem, choice = "", None
    try:
        choice = chooser(request, name)
    except KernelUnavailable as error:
        problem = str(error)
    agree = first_problem(lambda mine: [why for _, why in gather((name, mine))])
    common = agree(problem)
    return common if choice is None or common else choice


def summary(choice: Choice, request: Request, no_rotation: str) -> str:
    """The start-up line, as long as there is no KV pool yet."""
    fused = "norm alone" if no_rotation else "norm and rotation in one call"
    elsewhere = f"; SGLang rotates: {no_rotation}" if no_rotation else ""
    return (
        f"Attention prologue: {choice.name} on {request.device}, attention-TP "
        f"{request.group_size} ({choice.why}): {fused}{elsewhere}"
    )


def store_summary(choice: Choice, reason: str) -> str:
    """The second half of it, once the KV pool is known."""
    if reason:
        return f"Attention prologue: SGLang stores K and V itself: {reason}"
    return f"Attention prologue: {choice.name} stores K and V in the same call"
