"""Attention over draft trees, beside SGLang's `torch_native` backend.

That backend knows causal attention over a request's own slots, for batches without padding.
Speculation needs three more kinds:

- verify: the target reads a request's tokens and the tree behind them, by the tree's mask.
- draft decode: each branch of a request reads its tokens and the branch's own slots so far.
- draft extend: the tokens that were verified, causal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class Reads:
    """What consecutive rows read: `slots` [kv] int64, of those `mask` [rows, kv] if any."""

    rows: int
    slots: Tensor
    mask: Tensor | None = None


def attend(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    reads: list[Reads],
    output: Tensor,
    scaling: float | None,
) -> Tensor:
    """Softmax attention of [rows, heads, head_dim] query rows, each over what it reads.

    k_cache, v_cache: [slots, KV heads, head_dim]; query heads share KV heads in groups. Rows
    behind the last of `reads` are padding: their output is zero, since garbage could be NaN.
    """
    start = 0
    for read in reads:
        rows = slice(start, start + read.rows)
        key, value = (cache[read.slots].to(query.dtype) for cache in (k_cache, v_cache))
        output[rows] = scaled_dot_product_attention(
            query[rows].transpose(0, 1).unsqueeze(0),
            key.transpose(0, 1).unsqueeze(0),
            value.transpose(0, 1).unsqueeze(0),
            attn_mask=read.mask,
            scale=scaling,
            enable_gqa=True,
        )[0].transpose(0, 1)
        start += read.rows
    output[start:] = 0
    return output


def verify_reads(batch: ForwardBatch, req_to_token: Tensor) -> list[Reads]:
    """What each request's tree reads: its tokens, then of the tree what the mask says.

    The mask is flat: for each request [nodes, tokens + nodes].
    """
    info = batch.spec_info
    nodes, reads, start = info.draft_token_num, [], 0
    for row, length in _requests(batch)[: len(info.draft_token) // nodes]:  # the rest is padding
        width = length + nodes
        mask = info.custom_mask[start : start + nodes * width].view(nodes, width)
        reads.append(Reads(nodes, req_to_token[row, :width].long(), mask))
        start += nodes * width
    return reads


def extend_reads(batch: ForwardBatch, req_to_token: Tensor) -> list[Reads]:
    """What the verified tokens of each request read: all before them, and each other causally."""
    reads = []
    for (row, length), rows in zip(_requests(batch), batch.extend_seq_lens.tolist(), strict=True):
        mask = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
        reads.append(Reads(rows, req_to_token[row, :length].long(), mask))
    return reads


def _requests(batch: ForwardBatch) -> list[tuple[int, int]]:
    """(row of the slot table, tokens) of each request."""
    return list(zip(batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), strict=True))


class TreeAttention(TorchNativeAttnBackend):
    """`torch_native` that also verifies trees: the target's backend, the draft's to extend."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Work out once a batch what is read; a draft's batch comes before it is padded."""
        super().init_forward_metadata(forward_batch)
        table, mode = self.req_to_token_pool.req_to_token, forward_batch.forward_mode
        self.forward_metadata = None
        if mode.is_target_verify():
            self.forward_metadata = verify_reads(forward_batch, table)
        elif mode.is_draft_extend_v2():
            self.forward_metadata = extend_reads(forward_batch, table)

    def _run_sdpa_forward_extend(
        self, query: Tensor, output: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any, **kw: Any
    ) -> Tensor:
        if self.forward_metadata is None:
            return super()._run_sdpa_forward_extend(query, output, k_cache, v_cache, *rest, **kw)
        return attend(query, k_cache, v_cache, self.forward_metadata, output, kw["scaling"])


class DraftStep(TorchNativeAttnBackend):
    """The backend of one step of drafting; its container says what each branch reads."""

    reads: list[Reads]

    def _run_sdpa_forward_decode(
        self, query: Tensor, output: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any, **kw: Any
    ) -> Tensor:
        return attend(query, k_cache, v_cache, self.reads, output, kw["scaling"])


class DraftSteps(AttentionBackend):
    """The backends of all steps but the last, whose tokens nobody drafts from.

    Named and shaped as SGLang's multi-step backends: `attn_backends`, and one
    `init_forward_metadata` for all of them.
    """

    def __init__(self, runner: Any, topk: int, steps: int) -> None:
        super().__init__()
        self.topk, self.steps = topk, steps
        self.attn_backends = [DraftStep(runner) for _ in range(steps - 1)]
        self.req_to_token_pool = runner.req_to_token_pool

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Split the slots of a batch by branch and step: [batch, topk, steps]."""
        own = forward_batch.out_cache_loc.view(-1, self.topk, self.steps).long()
        table = self.req_to_token_pool.req_to_token
        before = [table[row, :length].long() for row, length in _requests(forward_batch)]
        for step, backend in enumerate(self.attn_backends):
            backend.reads = [
                Reads(1, torch.cat((slots, own[request, branch, : step + 1])))
                for request, slots in enumerate(before)
                for branch in range(self.topk)
            ]

    def forward_decode(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("each step has a backend of its own")

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> Tensor:
        raise NotImplementedError("each step has a backend of its own")
