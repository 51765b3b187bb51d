"""Experts in plain PyTorch, for a rank that holds some of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

#: What the dispatcher writes for an expert of another rank, and for padding.
ELSEWHERE = -1


def skip_experts_elsewhere(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap `moe_forward_native(layer, x, topk_output, moe_runner_config)`.

    SGLang's function counts experts with a scatter that fails on id -1. Plain SwiGLU experts run
    here; what has biases or another activation keeps SGLang's.
    """

    @functools.wraps(original)
    def moe_forward_native(
        layer: Any, x: torch.Tensor, topk_output: Any, moe_runner_config: Any
    ) -> torch.Tensor:
        plain = (
            moe_runner_config.activation == "silu"
            and moe_runner_config.gemm1_alpha is None
            and not moe_runner_config.apply_router_weight_on_input
            and getattr(layer, "w13_weight_bias", None) is None
        )
        if not plain:
            return original(layer, x, topk_output, moe_runner_config)
        weights, ids, _ = topk_output
        return local_experts(x, layer.w13_weight, layer.w2_weight, weights, ids)

    return moe_forward_native


def local_experts(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum of this rank's experts for each token, zero where it has none.

    x: [tokens, hidden]; w13: [experts, 2 * width, hidden], gate above up; w2: [experts, hidden,
    width]; weights: [tokens, k]; ids: [tokens, k], local expert or -1. Returns x's shape and dtype;
    the sum is taken in the dtype of `weights`, in the order of the experts.
    """
    total = x.new_zeros(x.shape, dtype=weights.dtype)
    for expert in ids.unique().tolist():
        if expert == ELSEWHERE:
            continue
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], w13[expert]).chunk(2, dim=-1)
        output = F.linear(F.silu(gate) * up, w2[expert])
        total.index_add_(0, token, output.to(total.dtype) * weights[token, slot, None])
    return total.to(x.dtype)


def mask_padding(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `mask_dp_pad_moe_topk_ids(topk_ids)`, a Triton kernel, with the same in PyTorch."""

    @functools.wraps(original)
    def mask_dp_pad_moe_topk_ids(topk_ids: torch.Tensor) -> None:
        from sglang.srt.layers.dp_attention import _DpGatheredBufferWrapper as Buffer

        counts = Buffer.get_dp_global_num_tokens_gpu()  # [DP ranks]: rows that are tokens
        width = Buffer.get_local_dp_buffer_len()
        if counts is None or width <= 0 or topk_ids.shape[0] != counts.shape[0] * width:
            return
        row = torch.arange(width)
        topk_ids.view(-1, width, topk_ids.shape[1])[row >= counts[:, None]] = ELSEWHERE

    return mask_dp_pad_moe_topk_ids
