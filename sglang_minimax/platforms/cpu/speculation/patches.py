"""What takes the place of SGLang's functions for draft trees, attached by `upstream.py`.

Each is called with the original, which has no build for this platform, or is None.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from sglang_minimax.platforms.cpu.speculation import slots, trees

Function = Callable[..., Any]


def in_place_of(original: Function | None, ours: Function) -> Function:
    """`ours` under the name and signature of `original`, which has the same parameters."""

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    return functools.wraps(ours if original is None else original)(stand_in)


def build_tree(original: Function) -> Function:
    """Replace `build_tree_kernel_efficient_func`."""
    return in_place_of(original, trees.build_tree)


def verify_greedy(original: Function) -> Function:
    """Replace `verify_tree_greedy_func`."""
    return in_place_of(original, trees.verify_greedy)


def sample_by_target(original: Function | None) -> Function:
    """Replace `tree_speculative_sampling_target_only`."""
    return in_place_of(original, trees.sample_by_target)


def keep_top_k(original: Function | None) -> Function:
    """Replace `top_k_renorm_prob`."""
    return in_place_of(original, trees.keep_top_k)


def keep_top_p(original: Function | None) -> Function:
    """Replace `top_p_renorm_prob`."""
    return in_place_of(original, trees.keep_top_p)


def without_compiling(original: Function) -> Function:
    """The function that `torch.compile` wraps: Inductor would build C++ at a request's cost."""
    return inspect.unwrap(original)


def assign_draft_slots(original: Function) -> Function:
    """Replace `assign_draft_cache_locs_contiguous_func`."""
    return in_place_of(original, slots.assign_draft_slots)


def record_slots(original: Function) -> Function:
    """Replace `assign_req_to_token_pool_func`."""
    return in_place_of(original, slots.record_slots)


def fill_bonus_tokens(original: Function) -> Function:
    """Replace `fill_bonus_tokens_func`."""
    return in_place_of(original, slots.fill_bonus_tokens)


def move_accepted(original: Function) -> Function:
    """Replace `move_accept_tokens_to_target_kvcache`."""
    return in_place_of(original, slots.move_accepted)


def move_rows_natively(original: Function) -> Function:
    """Replace `MHATokenToKVPool._init_kv_copy_and_warmup`, which starts a kernel."""

    @functools.wraps(original)
    def _init_kv_copy_and_warmup(self: Any) -> None:
        self.use_native_move_kv_cache = True  # as SGLANG_NATIVE_MOVE_KV_CACHE=1 does

    return _init_kv_copy_and_warmup
