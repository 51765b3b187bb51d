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
from sglang.srt.layers.moe.token_dispatcher.standard import (
    StandardCombineInput,
    StandardDispatcher,
    StandardDispatchOutput,
)
from sglang.srt.runtime_context import get_parallel

from sglang_minimax.layers.dispatch.codecs import Codec
from sglang_minimax.layers.dispatch.dispatcher import RowDispatcher
from sglang_minimax.layers.dispatch.rows import RowCounts, row_counts
from sglang_minimax.moe_exchange.payload import Payload


class GatherDispatcher(RowDispatcher):
    """An all-gather, and a reduce-scatter."""

    def __init__(self, payload: Payload, codec: Codec, standard: StandardDispatcher) -> None:
        super().__init__(payload, codec, standard)
        self._counts = RowCounts(())

    def dispatch(self, hidden_states: torch.Tensor, topk_output: Any) -> StandardDispatchOutput:
        """This rank's rows, [rows, hidden], and their choices -> those of all ranks."""
        self._counts = row_counts(hidden_states.shape[0])
        return self.unwrap(gather_rows(self.wrap(hidden_states, topk_output), self._counts))

    def combine(self, combine_input: StandardCombineInput) -> torch.Tensor:
        """Partial outputs of all rows, [all rows, hidden] -> complete ones of this rank's rows."""
        (outputs,) = combine_input
        return scatter_sums(outputs, self._counts)


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
    """Add up the outputs of all ranks of the TP group; each keeps the sums of its own rows.

    The sums need no context for symmetric memory: SGLang combines in one (fused_moe_triton/layer.
    FusedMoE.forward_impl), and PyTorch refuses to enter the same memory pool twice.
    """
    group = get_parallel().tp_group
    if group.world_size == 1:
        return outputs
    mine = counts.of_ranks[group.rank_in_group]
    sums = outputs.new_empty((mine, *outputs.shape[1:]))
    if counts.even:
        group.reduce_scatter_tensor(sums, outputs.contiguous())
    else:
        group.reduce_scatterv(outputs.contiguous(), output=sums, sizes=list(counts.of_ranks))
    return sums
