"""Plausible mistakes in how rows move, which need SGLang around them to show.

Those that show without it are in `tests/dispatch/mistakes.py`. Each function plants one, as those
of `mistakes`, where the catalogue is.
"""

from __future__ import annotations

from typing import Any

import torch


def _swap_first_and_last(rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Two ranks' rows changed places, as far as both have any: those that get requests at once."""
    first, *rest, last = rows.split(sizes)
    common = min(len(first), len(last))
    return torch.cat([last[:common], first[common:], *rest, first[:common], last[common:]])


def uneven_chunks_in_the_wrong_order() -> None:
    """reduce_scatterv hands two ranks each other's rows."""
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    original = GroupCoordinator.reduce_scatterv

    def reduce_scatterv(self: Any, input_: torch.Tensor, output: Any = None, sizes: Any = None):
        even = [len(input_) // self.world_size] * self.world_size
        return original(
            self, _swap_first_and_last(input_, sizes or even), output=output, sizes=sizes
        )

    GroupCoordinator.reduce_scatterv = reduce_scatterv


def even_chunks_in_the_wrong_order() -> None:
    """reduce_scatter_tensor hands the ranks their rows from the last to the first."""
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    original = GroupCoordinator.reduce_scatter_tensor

    def reduce_scatter_tensor(self: Any, output: torch.Tensor, input: torch.Tensor) -> None:
        original(self, output, torch.cat(input.chunk(self.world_size)[::-1]))

    GroupCoordinator.reduce_scatter_tensor = reduce_scatter_tensor


def summed_again_at_the_boundary() -> None:
    """What the combine has added up already is all-reduced behind the layer, as without DP."""
    from sglang_minimax.models import minimax_m2

    original = minimax_m2.append_stages

    def append_stages(*args: Any, **kwargs: Any) -> Any:
        from sglang.srt.distributed import tensor_model_parallel_all_reduce

        attention, experts = original(*args, **kwargs)
        finish = experts.finish

        def finish_sum(hidden: torch.Tensor, *rest: Any, **kw: Any) -> Any:
            return finish(tensor_model_parallel_all_reduce(hidden), *rest, **kw)

        experts.finish = finish_sum
        return attention, experts

    minimax_m2.append_stages = append_stages


def combined_over_attention_tp() -> None:
    """Outputs are scattered where their rows came from, without what other groups computed."""
    from sglang.srt.runtime_context import get_parallel

    from sglang_minimax.layers.dispatch import gather

    def scatter_sums(outputs: torch.Tensor, counts: Any) -> torch.Tensor:
        parallel = get_parallel()
        first = parallel.attn_dp_rank * parallel.attn_tp_size
        before = sum(counts.of_ranks[:first])
        mine = counts.of_ranks[parallel.tp_rank]
        of_group = outputs[before : before + mine * parallel.attn_tp_size]
        sums = outputs.new_empty((mine, outputs.shape[1]))
        parallel.attn_tp_group.reduce_scatter_tensor(sums, of_group.contiguous())
        return sums

    gather.scatter_sums = scatter_sums


def rows_in_the_order_of_attention_tp() -> None:
    """Sums are cut up by attention-TP first, then by attention-DP."""
    from sglang.srt.runtime_context import get_parallel

    from sglang_minimax.layers.dispatch import gather

    original = gather.scatter_sums

    def scatter_sums(outputs: torch.Tensor, counts: Any) -> torch.Tensor:
        width = get_parallel().attn_tp_size
        shares = outputs.split(list(counts.of_ranks))
        ordered = [shares[at] for place in range(width) for at in range(place, len(shares), width)]
        return original(torch.cat(ordered), counts)

    gather.scatter_sums = scatter_sums


def counts_of_the_forward_before() -> None:
    """A rank without rows does not look at the numbers of the others again."""
    from sglang_minimax.layers.dispatch import gather

    original = gather.GatherDispatcher.dispatch

    def dispatch(self: Any, hidden_states: torch.Tensor, topk_output: Any) -> Any:
        before = self._counts
        found = original(self, hidden_states, topk_output)
        if not len(hidden_states) and before.of_ranks:
            self._counts = before
        return found

    gather.GatherDispatcher.dispatch = dispatch  # type: ignore[method-assign]


def counts_without_padding() -> None:
    """The ranks' numbers are those of tokens, not of rows as SGLang padded them."""
    from sglang_minimax.layers.dispatch import rows
    from sglang_minimax.models.minimax_m2 import MiniMaxM2ForCausalLM

    original = MiniMaxM2ForCausalLM.forward

    def forward(
        self: Any, input_ids: Any, positions: Any, batch: Any, *rest: Any, **kw: Any
    ) -> Any:
        rows.get_dp_global_num_tokens = lambda: batch.original_global_num_tokens_cpu
        return original(self, input_ids, positions, batch, *rest, **kw)

    MiniMaxM2ForCausalLM.forward = forward  # type: ignore[assignment,method-assign]


def padded_for_an_even_gather() -> None:
    """Uneven rows are gathered with whatever lies behind them, and taken out again afterwards."""
    from sglang.srt.runtime_context import get_parallel

    from sglang_minimax.layers.dispatch import gather

    def gather_rows(mine: torch.Tensor, counts: Any) -> torch.Tensor:
        longest = max(counts.of_ranks)
        padded = mine.new_empty((longest, mine.shape[1]))
        padded[: len(mine)] = mine
        everyone = mine.new_empty((longest * len(counts.of_ranks), mine.shape[1]))
        get_parallel().tp_group.all_gather_into_tensor(everyone, padded)
        shares = zip(everyone.split(longest), counts.of_ranks, strict=True)
        return torch.cat([share[:rows] for share, rows in shares])

    gather.gather_rows = gather_rows
