"""Mixture of experts: an fp32 sigmoid router with a selection bias, and SwiGLU experts."""

from __future__ import annotations

import torch
from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.layers.moe.utils import filter_moe_weight_param_global_expert
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.runtime_context import get_exec
from sglang.srt.utils import add_prefix
from torch import nn
from torch.nn import functional as F

from sglang_minimax.config import Architecture
from sglang_minimax.layers.plan import plan_here
from sglang_minimax.layers.router import Router
from sglang_minimax.layers.stage import expert_cut_here


def router_logits(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Score every expert for every token in fp32, where SGLang's TopK chooses from the scores.

    hidden_states: [tokens, hidden], any float dtype; weight: [experts, hidden] fp32.
    Returns [tokens, experts] fp32. A bf16 product would change which experts are chosen.
    """
    return F.linear(hidden_states.float(), weight)


class MiniMaxM2Gate(nn.Module):
    """The router's projection, fp32 in memory whatever the checkpoint stores."""

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(num_experts, hidden_size, dtype=torch.float32), requires_grad=False
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, experts] fp32."""
        return router_logits(hidden_states, self.weight)


class MiniMaxM2MoE(nn.Module):
    """Chooses `top_k` experts a token and adds their weighted outputs.

    Selection uses sigmoid(gate(x)) + e_score_correction_bias; the weights are the scores without
    the bias, renormalised over the chosen experts. The output may be a share of a sum over ranks,
    which the layer boundary completes.
    """

    def __init__(
        self,
        arch: Architecture,
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        plan_here()  # on all ranks, whichever dispatcher each would take
        self.gate = MiniMaxM2Gate(arch.num_experts, arch.hidden_size)
        self.e_score_correction_bias = nn.Parameter(
            torch.empty(arch.num_experts, dtype=torch.float32), requires_grad=False
        )
        self.experts = get_moe_impl_class(quant_config)(
            num_experts=arch.num_experts + get_exec().moe.ep_num_redundant_experts,
            top_k=arch.top_k,
            hidden_size=arch.hidden_size,
            # More than the model has where blocks are dealt to ranks and padded.
            intermediate_size=expert_cut_here(arch).over,
            layer_id=layer_id,
            quant_config=quant_config,
            prefix=add_prefix("experts", prefix),
        )
        self.topk = TopK(
            top_k=arch.top_k,
            layer_id=layer_id,
            renormalize=True,
            scoring_func="sigmoid",
            correction_bias=self.e_score_correction_bias,
            routed_scaling_factor=1.0,
        )
        self.topk.bind_runner_backend(self.experts.runner_backend)
        self.router = Router(self.gate, self.topk)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, hidden]. A rank without tokens still joins the dispatch."""
        if hidden_states.shape[0] == 0:
            chosen = self.topk.empty_topk_output(hidden_states.device)
        else:
            chosen = self.router(hidden_states)
        return self.experts(hidden_states, chosen)

    def get_moe_weights(self) -> list[torch.Tensor]:
        """This rank's per-expert tensors, [local experts, ...], which EPLB moves between ranks."""
        return [
            parameter.data
            for name, parameter in self.experts.named_parameters()
            if filter_moe_weight_param_global_expert(
                name, parameter, self.experts.num_local_experts
            )
        ]
