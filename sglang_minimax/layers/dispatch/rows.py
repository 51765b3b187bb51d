"""How many rows each rank brings to a forward, as SGLang padded them."""

from __future__ import annotations

from typing import NamedTuple

from sglang.srt.layers.dp_attention import get_dp_global_num_tokens, is_dp_attention_enabled
from sglang.srt.runtime_context import get_parallel


class RowCounts(NamedTuple):
    """Rows of each rank of the TP group, in its order."""

    of_ranks: tuple[int, ...]

    @property
    def total(self) -> int:
        """Of all ranks."""
        return sum(self.of_ranks)

    @property
    def even(self) -> bool:
        """Whether all bring the same number."""
        return len(set(self.of_ranks)) == 1


def row_counts(rows: int) -> RowCounts:
    """What every rank brings to this forward. rows: of this rank.

    With attention DP the groups' numbers are those that SGLang gathered and padded for the forward,
    of which an attention-TP rank has an equal share; without, all ranks have as many.
    """
    parallel = get_parallel()
    if not is_dp_attention_enabled():
        return RowCounts((rows,) * parallel.tp_size)
    size = parallel.attn_tp_size
    counts = RowCounts(
        tuple(count // size for count in get_dp_global_num_tokens() for _ in range(size))
    )
    expected = counts.of_ranks[parallel.tp_rank]
    if rows != expected:
        raise RuntimeError(
            f"rank {parallel.tp_rank} has {rows} rows where the forward counts {expected}; "
            "this is a defect, start with SGLANG_MINIMAX_MOE=sglang and report it."
        )
    return counts
