"""Which implementation of the attention prologue a group of ranks runs, and the line that says so.

All ranks of a group must run the same one: a rank that exchanges sums inside a kernel would wait
for ever for one that reduces them with a collective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from jit_kernels.qk_norm_rope import op
from jit_kernels.qk_norm_rope.op import Choice, KernelUnavailable, Request
from sglang_minimax.layers.agreeing import (
    NO_ACCELERATOR,
    Gather,
    asked_for,
    common_name,
    first_of,
    first_problem,
    not_served,
    refusal_of,
)

if TYPE_CHECKING:
    from jit_kernels.qk_norm_rope.channel import Channel

VARIABLE = "SGLANG_MINIMAX_QK_NORM"

#: The implementation that exchanges sums inside its kernel, over a channel.
EXCHANGING = "cuda"

Chooser = Callable[[Request, str | None], Choice]


class Opening(NamedTuple):
    """A channel over the group, or why there is none, and whether that is because opening failed.

    The same on all ranks.
    """

    channel: Channel | None
    reason: str
    failed: bool = False


# Opens a channel. Collective.
Opener = Callable[[], Opening]


class Prepared(NamedTuple):
    """What a group runs.

    request: as it was decided, with `no_exchange` filled in. channel: None where the choice needs
    none. failed: whether a faster implementation that the rules allow does not run.
    """

    choice: Choice
    request: Request
    channel: Channel | None
    failed: bool


def forced() -> str | None:
    """The implementation that this rank's environment asks for, None where it names none."""
    return asked_for(VARIABLE)


def prepare(
    request: Request,
    name: str | None,
    gather: Gather[Any],
    opener: Opener,
    chooser: Chooser = op.choose,
) -> Prepared:
    """Choose for a request without a K/V write, and open a channel if it takes one. Collective.

    name: as `forced` returns it on this rank. Raises PathError, on every rank, where the ranks'
    names differ, or where what they ask for does not run.
    """
    # First of all: what follows is collective too, and which steps there are depends on this.
    found = gather((name, _refusal(request)))
    name = common_name(VARIABLE, op.names(), [asked for asked, _ in found])
    refusals = [refusal for _, refusal in found]
    opening = Opening(None, first_of(refusals), failed=len(set(refusals)) > 1)
    if _exchanges(request) and name in (None, EXCHANGING):
        if not opening.reason:
            opening = opener()
        if name is not None and opening.reason:
            raise not_served(VARIABLE, name, opening.reason)
        request = replace(request, no_exchange=opening.reason)
    choice = choose_together(request, name, gather, chooser)
    channel = opening.channel
    if channel is not None and choice.name != EXCHANGING:
        channel.close()
        channel = None
    chosen_by_us = name is None and request.device != "cpu"
    failed = chosen_by_us and (opening.failed or passed_over(request, choice.name))
    return Prepared(choice, request, channel, failed)


def _exchanges(request: Request) -> bool:
    """Whether the request is one for which ranks would exchange sums: the same on all ranks."""
    return request.group_size > 1 and request.device == "cuda"


def _refusal(request: Request) -> str:
    """Why this rank cannot run the kernel that exchanges sums; empty where it can, or need not."""
    if not _exchanges(request):
        return ""
    return next((refusal_of(x, request) for x in op.IMPLEMENTATIONS if x.name == EXCHANGING), "")


def passed_over(request: Request, name: str) -> bool:
    """Whether the rules allow a faster implementation than `name`: then one has failed."""
    order = op.names()
    return any(allowed(request, each) for each in order[: order.index(name)])


def allowed(request: Request, name: str) -> bool:
    """Whether the rules of the implementation called `name` allow the request on this rank."""
    return any(not refusal_of(x, request) for x in op.IMPLEMENTATIONS if x.name == name)


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


def store_failure(name: str, reason: str) -> str:
    """Where the rules allow a K/V write and a rank cannot prepare it."""
    return f"Attention prologue: {name} cannot store K and V: {reason}"


def store_summary(choice: Choice, reason: str) -> str:
    """The second half of it, once the KV pool is known."""
    if reason:
        return f"Attention prologue: SGLang stores K and V itself: {reason}"
    return f"Attention prologue: {choice.name} stores K and V in the same call"
