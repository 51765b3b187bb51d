"""Plausible mistakes in how rows reach their experts, and sums their owners."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from sglang.srt.layers.moe.token_dispatcher.standard import (
    StandardCombineInput,
    StandardDispatchOutput,
)

from sglang_minimax.layers.dispatch import all_to_all, gather, rows
from sglang_minimax.layers.dispatch.rows import RowCounts
from tests.dispatch import test_dispatch_paths as paths
from tests.ranks import own_rank

Patch = pytest.MonkeyPatch


# --- where rows and sums go ---


def attention_tp_major(of_all: torch.Tensor, counts: RowCounts) -> torch.Tensor:
    """Rows as if the ranks were in the order [attention-TP, attention-DP]; equal shares."""
    width = gather.get_parallel().attn_tp_size
    return of_all.unflatten(0, (-1, width, counts.of_ranks[0])).transpose(0, 1).flatten(0, 2)


def scattered_attention_tp_major(patch: Patch) -> None:
    """The sums are cut up by attention-TP first, as if its ranks were far from each other."""
    original = gather.scatter_sums
    patch.setattr(
        gather,
        "scatter_sums",
        lambda outputs, counts: original(attention_tp_major(outputs, counts), counts),
    )


def gathered_attention_tp_major(patch: Patch) -> None:
    """Rows are gathered over attention-DP and then attention-TP, and scattered over TP."""
    original = gather.gather_rows
    patch.setattr(
        gather,
        "gather_rows",
        lambda mine, counts: attention_tp_major(original(mine, counts), counts),
    )


def counted_attention_tp_major(patch: Patch) -> None:
    """The ranks' numbers of rows are those of the groups, repeated as a whole."""

    def counts(of_ranks: tuple[int, ...]) -> RowCounts:
        width = rows.get_parallel().attn_tp_size
        return RowCounts(of_ranks[::width] * width)

    patch.setattr(rows, "RowCounts", counts)


def even_where_mine_is_the_mean(patch: Patch) -> None:
    """A rank calls the rows even where all of them are its own number times the ranks."""

    def even(counts: RowCounts) -> bool:
        parallel = gather.get_parallel()
        return counts.of_ranks[parallel.tp_rank] * parallel.tp_size == counts.total

    patch.setattr(RowCounts, "even", property(even))


def _sum_over(ranks: Sequence[int], outputs: torch.Tensor) -> torch.Tensor:
    """An all-reduce over some ranks of the TP group, which all ranks do at once."""
    found = gather.get_parallel().tp_group._all("all_reduce", outputs)
    return torch.stack([found[rank] for rank in ranks]).sum(0)


def _moe_tp_ranks() -> range:
    parallel = gather.get_parallel()
    width = parallel.tp_size // parallel.moe_ep_size
    return range(parallel.moe_ep_rank * width, (parallel.moe_ep_rank + 1) * width)


def _moe_ep_ranks() -> range:
    parallel = gather.get_parallel()
    width = parallel.tp_size // parallel.moe_ep_size
    return range(parallel.tp_rank % width, parallel.tp_size, width)


def _combine_after(patch: Patch, ranks: Callable[[], Sequence[int]]) -> None:
    original = gather.GatherDispatcher.combine

    def combine(self: Any, combine_input: StandardCombineInput) -> torch.Tensor:
        (outputs,) = combine_input
        return original(self, StandardCombineInput(_sum_over(ranks(), outputs)))

    patch.setattr(gather.GatherDispatcher, "combine", combine)


def added_over_moe_tp_before(patch: Patch) -> None:
    """Experts that share their width are completed first, and then added once more by all of TP."""
    _combine_after(patch, _moe_tp_ranks)


def added_over_expert_parallel_before(patch: Patch) -> None:
    """The runner reduces its results, and the combine does it again."""
    _combine_after(patch, _moe_ep_ranks)


def _scatter_over(patch: Patch, ranks: Callable[[], Sequence[int]]) -> None:
    def scatter_sums(outputs: torch.Tensor, counts: RowCounts) -> torch.Tensor:
        sums = _sum_over(ranks(), outputs)
        return sums.split(list(counts.of_ranks))[gather.get_parallel().tp_rank]

    patch.setattr(gather, "scatter_sums", scatter_sums)


def scattered_over_attention_tp(patch: Patch) -> None:
    """Sums over the ranks that share the rows' attention, where all that hold experts belong."""

    def ranks() -> range:
        parallel = gather.get_parallel()
        first = parallel.tp_rank - parallel.tp_rank % parallel.attn_tp_size
        return range(first, first + parallel.attn_tp_size)

    _scatter_over(patch, ranks)


def scattered_over_expert_parallel(patch: Patch) -> None:
    """Sums over EP alone, although two ranks share the width of an expert."""
    _scatter_over(patch, _moe_ep_ranks)


# --- uneven rows, and ranks without any ---


def _padded_gather(mine: torch.Tensor, counts: RowCounts) -> torch.Tensor:
    """[ranks, longest, bytes]: every rank's rows and zeros behind them, in an even gather."""
    longest = max(counts.of_ranks)
    padded = mine.new_zeros((longest, *mine.shape[1:]))
    padded[: len(mine)] = mine
    everyone = mine.new_empty((longest * len(counts.of_ranks), *mine.shape[1:]))
    gather.get_parallel().tp_group.all_gather_into_tensor(everyone, padded)
    return everyone.unflatten(0, (-1, longest))


def padded_to_the_longest(patch: Patch) -> None:
    """Uneven rows are padded for an even gather, and the padding is taken out: only bytes tell."""

    def gather_rows(mine: torch.Tensor, counts: RowCounts) -> torch.Tensor:
        padded = _padded_gather(mine, counts)
        return torch.cat([each[:n] for each, n in zip(padded, counts.of_ranks, strict=True)])

    patch.setattr(gather, "gather_rows", gather_rows)


def padding_cut_off_at_the_end(patch: Patch) -> None:
    """Uneven rows are padded for an even gather, and what is too long is cut off behind all."""
    patch.setattr(
        gather,
        "gather_rows",
        lambda mine, counts: _padded_gather(mine, counts).flatten(0, 1)[: counts.total],
    )


def counts_stay_on_an_empty_rank(patch: Patch) -> None:
    """A rank without rows goes on with the numbers of the forward before when sums come back."""
    original = gather.GatherDispatcher.dispatch

    def dispatch(self: Any, hidden_states: torch.Tensor, topk_output: Any) -> Any:
        before = self._counts
        found = original(self, hidden_states, topk_output)
        if not hidden_states.shape[0] and before.of_ranks:
            self._counts = before
        return found

    patch.setattr(gather.GatherDispatcher, "dispatch", dispatch)


def counts_are_kept_by_own_rows(patch: Patch) -> None:
    """The numbers of all ranks are looked up by this rank's own: others' may have changed."""
    original = gather.row_counts
    kept = functools.cache(lambda rank, mine: original(mine))
    patch.setattr(gather, "row_counts", lambda mine: kept(own_rank(), mine))


def an_empty_rank_stays_away(patch: Patch) -> None:
    """A rank without rows returns early, although others may have rows for its experts."""
    original = all_to_all.AllToAllDispatcher.dispatch

    def dispatch(self: Any, hidden_states: torch.Tensor, topk_output: Any) -> Any:
        if not hidden_states.shape[0]:
            self._route = all_to_all.Route(torch.arange(0), [], [], 0)
            return StandardDispatchOutput(hidden_states, None, topk_output)
        return original(self, hidden_states, topk_output)

    patch.setattr(all_to_all.AllToAllDispatcher, "dispatch", dispatch)
    add_up = all_to_all.AllToAllDispatcher.combine

    def combine(self: Any, combine_input: StandardCombineInput) -> torch.Tensor:
        (outputs,) = combine_input
        return add_up(self, combine_input) if self._route.total else outputs

    patch.setattr(all_to_all.AllToAllDispatcher, "combine", combine)


def choices_in_a_gather_of_their_own(patch: Patch) -> None:
    """Rows in one collective, ids and weights in another: the same numbers, two latencies."""
    original = gather.gather_rows

    def gather_rows(mine: torch.Tensor, counts: RowCounts) -> torch.Tensor:
        at = mine.shape[1] - 8 * paths.TOP_K
        parts = (
            original(mine[:, part].contiguous(), counts) for part in (slice(at), slice(at, None))
        )
        return torch.cat(list(parts), dim=1)

    patch.setattr(gather, "gather_rows", gather_rows)


# --- from rank to rank ---


def sizes_changed_places(patch: Patch) -> None:
    """All-to-all is told what a rank sends where it asks for what it receives."""
    original = all_to_all.all_to_all_single

    def all_to_all_single(
        group: Any,
        output: torch.Tensor,
        given: torch.Tensor,
        received: Any = None,
        sent: Any = None,
    ) -> None:
        original(group, output, given, sent, received)

    patch.setattr(all_to_all, "all_to_all_single", all_to_all_single)


def sent_back_as_it_was_sent(patch: Patch) -> None:
    """Outputs go back by the sizes of the way there."""
    original = all_to_all.AllToAllDispatcher.combine

    def combine(self: Any, combine_input: StandardCombineInput) -> torch.Tensor:
        route = self._route
        self._route = route._replace(sent=route.received, received=route.sent)
        return original(self, combine_input)

    patch.setattr(all_to_all.AllToAllDispatcher, "combine", combine)


def _owned(patch: Patch, owner: Callable[[torch.Tensor, int, int], torch.Tensor]) -> None:
    """destinations, with another owner of an id. owner: (ids, ranks, held) -> rank or less."""

    def destinations(ids: torch.Tensor, ranks: int, held: int) -> torch.Tensor:
        found = owner(ids, ranks, held).masked_fill(ids < 0, -1)
        return (found[None] == torch.arange(ranks)[:, None, None]).any(-1)

    patch.setattr(all_to_all, "destinations", destinations)


def one_expert_off(patch: Patch) -> None:
    """The last expert of a rank is looked for on the next one."""
    _owned(patch, lambda ids, ranks, held: (ids + 1) // held)


def experts_dealt_in_turn(patch: Patch) -> None:
    """Experts are taken to be dealt to the ranks in turn, not in blocks."""
    _owned(patch, lambda ids, ranks, held: ids % ranks)


def copies_in_the_order_of_rows(patch: Patch) -> None:
    """Copies are sent row by row, cut into pieces as if those for rank 0 came first."""
    original = all_to_all.AllToAllDispatcher._agree

    def _agree(self: Any, wanted: torch.Tensor) -> Any:
        return original(self, wanted)._replace(rows=wanted.t().nonzero()[:, 0])

    patch.setattr(all_to_all.AllToAllDispatcher, "_agree", _agree)


def a_copy_for_each_expert(patch: Patch) -> None:
    """A row goes to a rank once for each chosen expert there, and each copy computes all."""

    def destinations(ids: torch.Tensor, ranks: int, held: int) -> torch.Tensor:
        owner = torch.where(ids < 0, -1, ids // held)
        return (owner[None] == torch.arange(ranks)[:, None, None]).sum(-1)

    def _agree(self: Any, wanted: torch.Tensor) -> Any:
        sent = wanted.sum(1)
        received = torch.empty_like(sent)
        all_to_all.all_to_all_single(all_to_all.get_parallel().tp_group, received, sent)
        every = torch.arange(wanted.shape[1]).repeat(wanted.shape[0])
        copies = every.repeat_interleave(wanted.flatten())
        return all_to_all.Route(copies, sent.tolist(), received.tolist(), wanted.shape[1])

    patch.setattr(all_to_all, "destinations", destinations)
    patch.setattr(all_to_all.AllToAllDispatcher, "_agree", _agree)


def _sums(patch: Patch, add: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]) -> None:
    """combine, with another way to add up. add: (blank sums, what came back, route) -> sums."""

    def combine(self: Any, combine_input: StandardCombineInput) -> torch.Tensor:
        (outputs,) = combine_input
        route = self._route
        returned = all_to_all.exchange(outputs.contiguous(), route.received, route.sent)
        return add(returned.new_zeros((route.total, returned.shape[1])), returned, route)

    patch.setattr(all_to_all.AllToAllDispatcher, "combine", combine)


def the_last_copy_counts(patch: Patch) -> None:
    """`sums[rows] += returned`, which adds one of several copies of a row."""

    def add(sums: torch.Tensor, returned: torch.Tensor, route: Any) -> torch.Tensor:
        sums[route.rows] += returned
        return sums

    _sums(patch, add)


def every_copy_rounds(patch: Patch) -> None:
    """What comes from a rank is added to the sums in the model's dtype."""

    def add(sums: torch.Tensor, returned: torch.Tensor, route: Any) -> torch.Tensor:
        for places, part in zip(
            route.rows.split(route.sent), returned.split(route.sent), strict=True
        ):
            sums[places] += part
        return sums

    _sums(patch, add)
