"""SGLang's own MiniMax-M2 in the same engine, for comparisons in the same run."""

from __future__ import annotations

import os

import torch

from sglang_minimax.moe_exchange.paths import SGLANG
from sglang_minimax.moe_exchange.rules import VARIABLE


def serve_intree() -> None:
    """A `before` for EngineProcess: the in-tree class with its own exchange, in place of ours.

    Its QK norm calls two Triton kernels that assert CUDA. On a machine without a GPU they are
    replaced by the same arithmetic in PyTorch (srt/models/minimax_m2.py of 0.5.23, kernels
    `rmsnorm_sumsq_kernel_serial` and `rmsnorm_apply_kernel_serial`); all else runs as released.
    """
    from sglang.srt.models import minimax_m2

    from sglang_minimax.layers import attention, moe
    from sglang_minimax.models import minimax_m2 as ours
    from sglang_minimax.patches import model_loader, model_registry

    os.environ[VARIABLE] = SGLANG.name
    model_loader.is_ours = lambda *_: False
    model_registry.our_model_class = lambda: minimax_m2.MiniMaxM2ForCausalLM
    # What the harness watches inside the ranks is then the in-tree model too.
    ours.MiniMaxM2ForCausalLM = minimax_m2.MiniMaxM2ForCausalLM
    ours.MiniMaxM2DecoderLayer = minimax_m2.MiniMaxM2DecoderLayer
    attention.MiniMaxM2Attention = minimax_m2.MiniMaxM2Attention
    moe.MiniMaxM2MoE = minimax_m2.MiniMaxM2MoE
    if not torch.cuda.is_available():
        minimax_m2.rms_sumsq_serial = _sumsq
        minimax_m2.rms_apply_serial = _apply


def _sumsq(x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
    """[tokens, n1], [tokens, n2] -> [2 * tokens, padded to 4]: the rows' sums of squares."""
    sums = torch.cat([x.float().square().sum(-1) for x in (x1, x2)])
    return torch.nn.functional.pad(sums, (0, -len(sums) % 4))


def _apply(
    x1: torch.Tensor,
    x2: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    sum_sq: torch.Tensor,
    tp_world: int = 1,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    def scaled(x: torch.Tensor, weight: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(sums[:, None] / x.shape[1] / tp_world + eps)
        return (x.float() * scale * weight.float()).to(x.dtype)

    tokens = len(x1)
    return scaled(x1, w1, sum_sq[:tokens]), scaled(x2, w2, sum_sq[tokens : 2 * tokens])
