"""A row to each rank that holds at least one of its experts, over torch.distributed.

The expert-parallel exchange that DeepEP and its like do with kernels of their own, with the
collectives that every platform has, so that dispatch and combine can be tested with the same layers
on a CPU. The sizes are known on the host alone, so it cannot be captured in a graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from sglang.srt.layers.moe.token_dispatcher.standard import (
    StandardCombineInput,
    StandardDispatcher,
    StandardDispatchOutput,
)
from sglang.srt.runtime_context import get_parallel

from sglang_minimax.layers.dispatch.codecs import Codec
from sglang_minimax.layers.dispatch.dispatcher import RowDispatcher
from sglang_minimax.moe_exchange.payload import Payload
from sglang_minimax.shards import exact_div


class Route(NamedTuple):
    """Where this rank's rows went.

    rows: [sent] int64, the row of each copy, those for rank 0 first. sent, received: copies to and
    from each rank. total: rows of this rank.
    """

    rows: torch.Tensor
    sent: list[int]
    received: list[int]
    total: int


class AllToAllDispatcher(RowDispatcher):
    """Two all-to-alls, and a third for the sizes."""

    def __init__(self, payload: Payload, codec: Codec, standard: StandardDispatcher) -> None:
        super().__init__(payload, codec, standard)
        self._route: Route | None = None

    def dispatch(self, hidden_states: torch.Tensor, topk_output: Any) -> StandardDispatchOutput:
        """This rank's rows, [rows, hidden], and their choices -> rows for this rank's experts."""
        ranks = get_parallel().tp_size
        held = exact_div(self.num_experts, ranks, "experts over ranks")
        self._route = self._agree(destinations(topk_output.topk_ids, ranks, held))
        copies = self.wrap(hidden_states, topk_output)[self._route.rows]
        return self.unwrap(exchange(copies, self._route.sent, self._route.received))

    def combine(self, combine_input: StandardCombineInput) -> torch.Tensor:
        """Outputs of the rows that came -> the sums of this rank's own rows, [rows, hidden]."""
        (outputs,) = combine_input
        route = self._route
        assert route is not None, "combine follows a dispatch"
        returned = exchange(outputs.contiguous(), route.received, route.sent)
        # Added up in fp32 in the order of the ranks, and rounded once.
        sums = returned.new_zeros((route.total, returned.shape[1]), dtype=torch.float32)
        sums.index_add_(0, route.rows, returned.float())
        return sums.to(returned.dtype)

    def _agree(self, wanted: torch.Tensor) -> Route:
        """Tell every rank how many rows it will get. wanted: [ranks, rows] bool."""
        sent = wanted.sum(1)
        received = torch.empty_like(sent)
        all_to_all_single(get_parallel().tp_group, received, sent)
        # Copies in the order of the ranks that they go to: nonzero runs over the first dimension.
        return Route(wanted.nonzero()[:, 1], sent.tolist(), received.tolist(), wanted.shape[1])


def destinations(ids: torch.Tensor, ranks: int, held: int) -> torch.Tensor:
    """[ranks, rows] bool: whether a rank, holding `held` experts, has one of a row's.

    ids: [rows, top_k], global; -1 is no expert, and a row of those goes nowhere.
    """
    owner = torch.where(ids < 0, -1, ids // held)
    return (owner[None] == torch.arange(ranks, device=ids.device)[:, None, None]).any(-1)


def exchange(rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
    """The rows that other ranks sent here, by rank. rows: [sum(sent), ...], by destination."""
    arrived = rows.new_empty((sum(received), *rows.shape[1:]))
    all_to_all_single(get_parallel().tp_group, arrived, rows, received, sent)
    return arrived


def all_to_all_single(
    group: Any,
    output: torch.Tensor,
    given: torch.Tensor,
    received: list[int] | None = None,
    sent: list[int] | None = None,
) -> None:
    """SGLang's group has this for equal shares only. received, sent: rows from and to each rank."""
    dist.all_to_all_single(output, given, received, sent, group=group.device_group)
