"""Plausible wrong versions of our dispatchers, each with the test that fails with it.

A mistake patches our modules as somebody might have written them; `test_dispatch_mistakes` runs the
named test of `test_dispatch_paths` without it and with it. What needs SGLang's layer boundary to go
wrong is in `tests/engine/mistakes.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import BrokenBarrierError
from typing import Any

import pytest

from sglang_minimax.moe_exchange.paths import Rows
from tests.dispatch import mistakes_in_moving as moving
from tests.dispatch import mistakes_in_rows as in_rows
from tests.dispatch import test_dispatch_paths as paths

#: What a comparison of numbers says.
NUMBERS = "Tensor-likes are not close!"
#: What ranks say that would wait for each other in a server.
CALLS = "at once"
UNEVEN = "tp=4,dp=4,ep=4", (5, 0, 1, 2)
computes = paths.test_a_path_computes_the_layer
changes = paths.test_a_batch_that_changes_its_shape_every_step
counts_bytes = paths.test_a_gather_gives_what_the_plan_says
chooses = paths.test_choices_are_those_of_the_rows_before_they_are_rounded
sends_once = paths.test_an_all_to_all_sends_a_row_once_to_each_rank_that_needs_it


@dataclass(frozen=True, slots=True)
class Mistake:
    """plant: the patch. check: the test that fails with it, run with `case` as its arguments.

    error, words: how it fails.
    """

    plant: Callable[[pytest.MonkeyPatch], None]
    check: Callable[..., None]
    case: tuple[Any, ...] = ()
    words: str = NUMBERS
    error: type[Exception] = AssertionError

    @property
    def name(self) -> str:
        return self.plant.__name__


MISTAKES = (
    Mistake(moving.scattered_attention_tp_major, computes, ("gather", "tp=4,dp=2,ep=4", (4, 4))),
    Mistake(moving.gathered_attention_tp_major, computes, ("gather", "tp=4,dp=2,ep=4", (4, 4))),
    Mistake(
        moving.counted_attention_tp_major,
        computes,
        ("gather", "tp=4,dp=2,ep=4", (2, 6)),
        "rows where the forward counts",
        RuntimeError,
    ),
    Mistake(moving.even_where_mine_is_the_mean, computes, ("gather", *UNEVEN), CALLS),
    Mistake(moving.added_over_moe_tp_before, computes, ("gather", "tp=4,ep=2", (4,))),
    Mistake(moving.added_over_expert_parallel_before, computes, ("gather", "tp=4,ep=4", (4,))),
    Mistake(moving.scattered_over_attention_tp, computes, ("gather", "tp=4,dp=2", (6, 2))),
    Mistake(moving.scattered_over_expert_parallel, computes, ("gather", "tp=4,dp=2,ep=2", (2, 4))),
    Mistake(
        moving.padded_to_the_longest,
        counts_bytes,
        (*UNEVEN, Rows.PLAIN),
        "('all_gather_into_tensor', 5240) != ('all_gatherv', 5240)",
    ),
    Mistake(moving.padding_cut_off_at_the_end, computes, ("gather", *UNEVEN)),
    Mistake(in_rows.weights_of_padding_stay, paths.test_padding_is_worth_nothing, (), "gather"),
    Mistake(in_rows.ids_of_padding_stay, paths.test_padding_is_worth_nothing, (), "gather: id -1"),
    Mistake(
        in_rows.one_scale_for_the_batch,
        paths.test_one_that_marks_padding_gives_it_nothing,
        (),
        "gather-fp8",
    ),
    Mistake(moving.counts_stay_on_an_empty_rank, changes, ("gather", "tp=4,dp=4,ep=4"), CALLS),
    Mistake(moving.counts_are_kept_by_own_rows, changes, ("gather", "tp=4,dp=4,ep=4"), CALLS),
    Mistake(
        moving.an_empty_rank_stays_away, computes, ("all-to-all", *UNEVEN), "", BrokenBarrierError
    ),
    Mistake(in_rows.scales_in_another_order, computes, ("gather-fp8", "tp=4,dp=2,ep=4", (4, 4))),
    Mistake(
        in_rows.scales_gathered_by_column, computes, ("gather-fp8", "tp=4,dp=4,ep=4", (3, 3, 3, 3))
    ),
    Mistake(in_rows.routed_on_rounded_rows, chooses, ("gather-fp8",), "torch.equal"),
    Mistake(
        in_rows.ids_in_one_byte,
        paths.test_padding_is_worth_nothing,
        (),
        "index 255 is out of bounds",
        IndexError,
    ),
    Mistake(
        in_rows.ids_among_the_weights, computes, ("gather", *UNEVEN), "is out of bounds", IndexError
    ),
    Mistake(in_rows.weights_in_bf16, computes, ("gather", *UNEVEN)),
    Mistake(
        in_rows.ids_of_all_ranks, computes, ("gather", *UNEVEN), "is out of bounds", IndexError
    ),
    Mistake(in_rows.weights_of_a_rank_sum_to_one, computes, ("gather", *UNEVEN)),
    Mistake(
        moving.choices_in_a_gather_of_their_own,
        counts_bytes,
        (*UNEVEN, Rows.PLAIN),
        "('all_gatherv', 5120) != ('all_gatherv', 5240)",
    ),
    Mistake(in_rows.scale_of_the_whole_row, computes, ("gather-fp8", *UNEVEN)),
    Mistake(
        in_rows.scale_that_rounds_instead_of_the_one_that_gives_back,
        computes,
        ("gather-fp8", *UNEVEN),
    ),
    Mistake(
        in_rows.rounded_on_arrival,
        counts_bytes,
        (*UNEVEN, Rows.FP8),
        "('all_gatherv', 5240) != ('all_gatherv', 1440)",
    ),
    Mistake(
        in_rows.fp4_scale_of_own_experts, paths.test_fp4_rows_are_under_one_scale_of_all_experts
    ),
    Mistake(in_rows.fp4_scale_upside_down, computes, ("gather-fp4", *UNEVEN)),
    Mistake(
        moving.sizes_changed_places, computes, ("all-to-all", *UNEVEN), "split_sizes", RuntimeError
    ),
    Mistake(
        moving.sent_back_as_it_was_sent,
        computes,
        ("all-to-all", *UNEVEN),
        "split_sizes",
        RuntimeError,
    ),
    Mistake(moving.one_expert_off, computes, ("all-to-all", *UNEVEN)),
    Mistake(moving.experts_dealt_in_turn, computes, ("all-to-all", *UNEVEN)),
    Mistake(moving.copies_in_the_order_of_rows, computes, ("all-to-all", *UNEVEN)),
    Mistake(moving.a_copy_for_each_expert, computes, ("all-to-all", *UNEVEN)),
    Mistake(
        moving.a_copy_for_each_expert,
        sends_once,
        (),
        "('all_to_all_single', 6288) != ('all_to_all_single', 5240)",
    ),
    Mistake(moving.the_last_copy_counts, computes, ("all-to-all", *UNEVEN)),
    Mistake(
        moving.every_copy_rounds, paths.test_a_sum_of_copies_is_rounded_once, (), "torch.equal"
    ),
)
