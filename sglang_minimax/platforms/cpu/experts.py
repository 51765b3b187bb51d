"""Experts in plain PyTorch, for a rank that holds some of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

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
        if not is_plain(layer, moe_runner_config):
            return original(layer, x, topk_output, moe_runner_config)
        weights, ids, _ = topk_output
        return local_experts(x, layer.w13_weight, layer.w2_weight, weights, ids)

    return moe_forward_native


def is_plain(layer: Any, moe_runner_config: Any) -> bool:
    """Whether the experts are what `local_experts` computes: SwiGLU and nothing else."""
    return (
        moe_runner_config.activation == "silu"
        and moe_runner_config.gemm1_alpha is None
        and not moe_runner_config.apply_router_weight_on_input
        and getattr(layer, "w13_weight_bias", None) is None
    )


class Matrices(Protocol):
    """A tensor of [experts, out, in], or what makes one expert's matrix when it is asked for."""

    def __getitem__(self, expert: int, /) -> torch.Tensor: ...


Rounding = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Roundings:
    """What kernels for quantised experts do to [rows, columns] before each of the two products."""

    w13: Rounding | None = None
    w2: Rounding | None = None


def local_experts(
    x: torch.Tensor,
    w13: Matrices,
    w2: Matrices,
    weights: torch.Tensor,
    ids: torch.Tensor,
    roundings: Roundings | None = None,
) -> torch.Tensor:
    """The weighted sum of this rank's experts for each token, zero where it has none.

    x: [tokens, hidden]; w13: [experts, 2 * width, hidden], gate above up; w2: [experts, hidden,
    width]; weights: [tokens, k]; ids: [tokens, k], local expert or -1. Returns x's shape and dtype;
    the sum is taken in the dtype of `weights`, in the order of the experts. The second rounding
    sees the rows of all experts at once, since a scale may be common to them.
    """
    roundings = roundings or Roundings()
    rounded = roundings.w13(x) if roundings.w13 else x
    chosen = [expert for expert in ids.unique().tolist() if expert != ELSEWHERE]
    places = [(ids == expert).nonzero(as_tuple=True) for expert in chosen]
    inner = []
    for expert, (token, _) in zip(chosen, places, strict=True):
        gate, up = F.linear(rounded[token], w13[expert]).chunk(2, dim=-1)
        inner.append(F.silu(gate) * up)
    if roundings.w2 and inner:
        counts = [rows.shape[0] for rows in inner]
        inner = list(roundings.w2(torch.cat(inner)).split(counts))
    total = x.new_zeros(x.shape, dtype=weights.dtype)
    for expert, (token, slot), rows in zip(chosen, places, inner, strict=True):
        output = F.linear(rows, w2[expert])
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
