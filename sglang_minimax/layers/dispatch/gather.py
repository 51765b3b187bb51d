"""Every rank's rows to all ranks before the experts, each sum back to its owner after them.

A rank routes its own rows alone. They travel with their ids and weights in one all-gather over the
TP group; each rank computes what it holds of every chosen expert; one reduce-scatter adds the
partial outputs up and leaves each rank those of its own rows. The idea of gathering quantised rows
is SGLang's FP4 all-gather (srt/layers/moe/token_dispatcher/standard.py), which this extends to FP8,
to attention-TP and to any mix of expert parallel and MoE-TP.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.distributed.device_communicators.pynccl_allocator import use_symmetric_memory
from sglang.srt.layers.dp_attention import is_allocation_symmetric
from sglang.srt.layers.moe.token_dispatcher.base import BaseDispatcher
from sglang.srt.layers.moe.token_dispatcher.standard import (
    StandardCombineInput,
    StandardDispatcher,
    StandardDispatchOutput,
)
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.runtime_context import get_parallel

from sglang_minimax.layers.dispatch.codecs import Codec
from sglang_minimax.layers.dispatch.packing import Parcel, pack, unpack
from sglang_minimax.layers.dispatch.rows import RowCounts, row_counts
from sglang_minimax.moe_exchange.payload import Payload


class GatherDispatcher(BaseDispatcher):
    """SGLang's dispatcher interface over an all-gather and a reduce-scatter."""

    def __init__(self, payload: Payload, codec: Codec, standard: StandardDispatcher) -> None:
        """standard: SGLang's, which turns global ids into those of this rank's experts."""
        super().__init__()
        self._payload = payload
        self._codec = codec
        self._standard = standard
        self.runner_backend = standard.runner_backend
        self._counts = RowCounts(())

    def dispatch(self, hidden_states: torch.Tensor, topk_output: Any) -> StandardDispatchOutput:
        """This rank's rows, [rows, hidden], and their choices -> those of all ranks."""
        self._counts = row_counts(hidden_states.shape[0])
        values, scales = self._codec.encode(hidden_states)
        parcel = Parcel(values, scales, topk_output.topk_ids, topk_output.topk_weights)
        gathered = gather_rows(pack(self._payload, parcel), self._counts)
        return deliver(
            self._standard, self._codec, unpack(self._payload, gathered, self._codec.types)
        )

    def combine(self, combine_input: StandardCombineInput) -> torch.Tensor:
        """Partial outputs of all rows, [all rows, hidden] -> complete ones of this rank's rows."""
        (outputs,) = combine_input
        return scatter_sums(outputs, self._counts)


def deliver(standard: StandardDispatcher, codec: Codec, parcel: Parcel) -> StandardDispatchOutput:
    """Rows that have arrived, as SGLang's runner wants them, with ids of this rank's experts."""
    ids, weights = parcel.ids, parcel.weights
    if get_parallel().moe_ep_size == 1:
        # SGLang marks padding with id -1, which runners expect only where experts are elsewhere.
        weights = weights.masked_fill(ids < 0, 0.0)
        ids = ids.clamp_min(0)
    hidden_states, more = codec.hand_over(parcel.values, parcel.scales)
    logits = weights.new_empty((0,))  # routing is done
    found = standard.dispatch(hidden_states, StandardTopKOutput(weights, ids, logits))
    return found._replace(**more)


def gather_rows(mine: torch.Tensor, counts: RowCounts) -> torch.Tensor:
    """The rows of all ranks of the TP group, in its order."""
    group = get_parallel().tp_group
    if group.world_size == 1:
        return mine
    with use_symmetric_memory(group, disabled=not is_allocation_symmetric()):
        everyone = mine.new_empty((counts.total, *mine.shape[1:]))
    if counts.even:
        group.all_gather_into_tensor(everyone, mine)
    else:
        group.all_gatherv(mine, sizes=list(counts.of_ranks), output=everyone)
    return everyone


def scatter_sums(outputs: torch.Tensor, counts: RowCounts) -> torch.Tensor:
    """Add up the outputs of all ranks of the TP group; each keeps the sums of its own rows."""
    group = get_parallel().tp_group
    if group.world_size == 1:
        return outputs
    mine = counts.of_ranks[group.rank_in_group]
    with use_symmetric_memory(group, disabled=not is_allocation_symmetric()):
        sums = outputs.new_empty((mine, *outputs.shape[1:]))
    if counts.even:
        group.reduce_scatter_tensor(sums, outputs.contiguous())
    else:
        group.reduce_scatterv(outputs.contiguous(), output=sums, sizes=list(counts.of_ranks))
    return sums
