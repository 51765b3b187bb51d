"""Which KV slots a request's next tokens get, in PyTorch where SGLang has kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def slots_between(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    batch_size: int,
    draft_token_num: int,
    device: Any,
) -> Tensor:
    """The slots of positions [start, end) of each request, [batch * draft_token_num] int64.

    Every request extends by `draft_token_num`, as SGLang's callers demand.
    """
    columns = start_offset.long().unsqueeze(1) + torch.arange(draft_token_num)
    return req_to_token[req_pool_indices.long().unsqueeze(1), columns].long().flatten()


def assign_draft_slots(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    out_cache_loc: Tensor,
    topk: int,
    num_cols: int,
    positions: Tensor | None = None,
    mrope: Tensor | None = None,
) -> None:
    """Write each request's `topk * num_cols` slots after its tokens, as SGLang's function."""
    if positions is not None or mrope is not None:
        raise NotImplementedError("SGLang asks for positions here on GPUs only")
    out_cache_loc.copy_(
        slots_between(
            req_pool_indices,
            req_to_token,
            seq_lens,
            seq_lens,
            len(seq_lens),
            topk * num_cols,
            out_cache_loc.device,
        )
    )


def record_slots(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    batch_size: int,
) -> None:
    """Enter new slots at positions [start, end) of each request, one after the other.

    As SGLang's `assign_req_to_token_pool_func`. out_cache_loc: [sum of end - start].
    """
    done = 0
    rows = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in rows:
        req_to_token[row, start:end] = out_cache_loc[done : done + end - start]
        done += end - start


def fill_bonus_tokens(
    accept_tokens: Tensor,
    accept_lens: Tensor,
    bonus_tokens: Tensor,
    accept_stride: int,
    batch_size: int,
) -> None:
    """Write the last accepted token of each request, as SGLang's `fill_bonus_tokens_func`.

    accept_tokens: [batch * accept_stride]; accept_lens: [batch], at least 1.
    """
    last = accept_lens.long() - 1
    bonus_tokens.copy_(
        accept_tokens.view(batch_size, accept_stride)[torch.arange(batch_size), last]
    )


def move_accepted(
    batch: Any, accept_index: Tensor, num_correct_drafts: Tensor, token_to_kv_pool_allocator: Any
) -> None:
    """Move the KV rows of accepted nodes to the front of each request's window.

    As SGLang's `move_accept_tokens_to_target_kvcache`. accept_index: [batch, depth + 1], rows of
    the batch's windows, -1 behind the last accepted one. A window may have fewer slots than that:
    a tree of few nodes need not reach its depth.
    """
    window = batch.out_cache_loc.view(len(accept_index), -1)
    accepted = accept_index >= 0
    front = window[torch.arange(window.shape[1]) < accepted.sum(dim=1, keepdim=True)]
    source = batch.out_cache_loc[accept_index[accepted].long()]
    token_to_kv_pool_allocator.get_kvcache().move_kv_cache(front, source)
