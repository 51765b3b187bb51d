"""MiniMax-M2 for SGLang: embedding, layers of attention and experts, head.

Covers every `MiniMaxM2ForCausalLM` checkpoint (M2, M2.1, M2.5, M2.7). The shape comes from
`config.Architecture`, what a rank owns from `topology`, the layers from `layers/`, and the weights
through `loading.strict`, which leaves no parameter unwritten and no tensor unaccounted for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
from sglang.srt.eplb.expert_location import ModelConfigForExpertLocation
from sglang.srt.layers.aux_hidden_states import AuxHiddenStateAccumulator, AuxHiddenStateList
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.layers.layer_boundary import append_stages, declare_attn, declare_ffn
from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.utils import PPMissingLayer
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, PPProxyTensors
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import (
    is_in_breakable_cuda_graph,
)
from sglang.srt.runtime_context import get_exec, get_parallel
from sglang.srt.utils import LazyValue, add_prefix, make_pp_layers
from torch import nn

from sglang_minimax.config import Architecture
from sglang_minimax.drafts.config import guessed_layers
from sglang_minimax.errors import TopologyError
from sglang_minimax.layers.attention import MiniMaxM2Attention
from sglang_minimax.layers.cut import check_layers, check_vocabulary
from sglang_minimax.layers.moe import MiniMaxM2MoE
from sglang_minimax.layers.stage import architecture_here, stage_of
from sglang_minimax.loading.headers import Headers
from sglang_minimax.loading.plan import Plan
from sglang_minimax.loading.problems import Problems
from sglang_minimax.loading.strict import StrictLoader


def stage_facts(layer_id: int) -> tuple[Any, Any]:
    """What SGLang's layer boundary needs to know of layer `layer_id` without building it."""
    return declare_attn(), declare_ffn(sparse=True, next_layer_sparse=True)


class MiniMaxM2DecoderLayer(nn.Module):
    """Pre-norm attention and experts; residuals, norms and collectives belong to the boundaries."""

    def __init__(
        self,
        arch: Architecture,
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.self_attn = MiniMaxM2Attention(
            arch, layer_id, quant_config, add_prefix("self_attn", prefix)
        )
        self.block_sparse_moe = MiniMaxM2MoE(
            arch, layer_id, quant_config, add_prefix("block_sparse_moe", prefix)
        )
        self.input_layernorm = RMSNorm(arch.hidden_size, eps=arch.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(arch.hidden_size, eps=arch.rms_norm_eps)
        attention, experts = stage_facts(layer_id)
        self.attn_boundary, self.ffn_boundary = append_stages(
            (attention, self.input_layernorm), (experts, self.post_attention_layernorm)
        )

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: ForwardBatch,
        capture: AuxHiddenStateAccumulator | None = None,
    ) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, hidden]; `capture` takes the residual before this layer."""
        hidden_states = self.attn_boundary.prepare(
            hidden_states, forward_batch, capture_gathered=capture
        )
        if not forward_batch.forward_mode.is_idle():
            hidden_states = self.self_attn(positions, hidden_states, forward_batch)
        hidden_states = self.attn_boundary.finish(hidden_states, forward_batch)

        hidden_states = self.ffn_boundary.prepare(hidden_states, forward_batch)
        hidden_states = self.block_sparse_moe(hidden_states)
        return self.ffn_boundary.finish(hidden_states, forward_batch)


class MiniMaxM2Model(nn.Module):
    """The layers of this pipeline stage, with the embedding before and the norm after them."""

    def __init__(
        self,
        arch: Architecture,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.pp_group = get_parallel().pp_group
        if self.pp_group.is_first_rank:
            self.embed_tokens = VocabParallelEmbedding(
                arch.vocab_size,
                arch.hidden_size,
                use_attn_tp_group=is_dp_attention_enabled(),
                prefix=add_prefix("embed_tokens", prefix),
            )
        else:
            self.embed_tokens = PPMissingLayer()

        def layer(idx: int, prefix: str) -> nn.Module:
            return MiniMaxM2DecoderLayer(arch, idx, quant_config, prefix)

        self.layers, self.start_layer, self.end_layer = make_pp_layers(
            arch.num_layers, layer, prefix=add_prefix("layers", prefix), stage_facts=stage_facts
        )
        if self.pp_group.is_last_rank:
            self.norm = RMSNorm(arch.hidden_size, eps=arch.rms_norm_eps)
        else:
            self.norm = PPMissingLayer(return_tuple=True)
        # Residuals to hand to a draft model: i means "before layer i", end_layer "after the last".
        self.layers_to_capture: tuple[int, ...] = ()
        self._records_experts = get_exec().moe.expert_distribution_recorder_mode is not None

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
    ) -> torch.Tensor | PPProxyTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        """input_ids, positions: [tokens] -> [tokens, hidden], and the captured residuals if any."""
        hidden_states = self._enter(input_ids, forward_batch, input_embeds, pp_proxy_tensors)
        captured = AuxHiddenStateList()
        for i in range(self.start_layer, self.end_layer):
            with self._recording(i):
                hidden_states = self.layers[i](
                    positions,
                    hidden_states,
                    forward_batch,
                    capture=captured if i in self.layers_to_capture else None,
                )
        if not self.pp_group.is_last_rank:
            return residual_batch.to_pp(hidden_states, forward_batch)
        hidden_states = residual_batch.final_norm(
            hidden_states,
            forward_batch,
            self.norm,
            capture=captured.capture if self.end_layer in self.layers_to_capture else None,
            skip_empty=True,
        )
        return (hidden_states, captured) if captured else hidden_states

    def _enter(
        self,
        input_ids: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None,
        pp_proxy_tensors: PPProxyTensors | None,
    ) -> torch.Tensor:
        """The stage's input: embedded tokens on the first one, the previous stage's output else."""
        if not self.pp_group.is_first_rank:
            boundary = self.layers[self.start_layer].attn_boundary
            return boundary.from_pp(pp_proxy_tensors, forward_batch)
        residual_batch.start(forward_batch)
        return self.embed_tokens(input_ids) if input_embeds is None else input_embeds

    def _recording(self, layer_id: int) -> AbstractContextManager[None]:
        """Tell the expert recorder which layer routes; a graph that is traced cannot enter it."""
        traced = check_cuda_graph_backend(Phase.PREFILL, Backend.TC_PIECEWISE)
        if not self._records_experts or traced or is_in_breakable_cuda_graph():
            return nullcontext()
        return get_global_expert_distribution_recorder().with_current_layer(layer_id)


class MiniMaxM2ForCausalLM(nn.Module):
    """MiniMax-M2 with its language-model head, as SGLang's model registry finds it."""

    # Which checkpoint modules one of ours packs, for quantisation configs that name theirs.
    packed_modules_mapping = {  # noqa: RUF012 (SGLang's loader may add to it)
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
        "experts": ["experts.0.w1", "experts.0.w2", "experts.0.w3"],
    }
    fall_back_to_pt_during_load = False
    # Without this SGLang reads *.bin, a pickle, where a checkpoint has no safetensors.
    allow_patterns_overrides = ["*.safetensors"]  # noqa: RUF012 (SGLang compares and may extend)

    def __init__(
        self,
        config: Any,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        """config: any form that `Architecture` reads. Raises ConfigError, TopologyError, LoadError.

        LoadError here is for weight files that are broken at sight, before memory is filled.
        """
        super().__init__()
        self.config = config
        self.arch = architecture_here(config)
        self.quant_config = quant_config
        self.pp_group = get_parallel().pp_group
        self.model = MiniMaxM2Model(self.arch, quant_config, add_prefix("model", prefix))
        self.lm_head = self._head(add_prefix("lm_head", prefix))
        self.logits_processor = LogitsProcessor(config)
        self._loader = self._strict_loader()
        self._routed_experts_weights = LazyValue(
            lambda: {
                i: self.model.layers[i].block_sparse_moe.get_moe_weights()
                for i in range(self.start_layer, self.end_layer)
            }
        )

    def _head(self, prefix: str) -> ParallelLMHead | PPMissingLayer:
        """The head of the last stage; tied weights are shared where both are cut alike."""
        if not self.pp_group.is_last_rank:
            return PPMissingLayer()
        head = ParallelLMHead(
            self.arch.vocab_size,
            self.arch.hidden_size,
            prefix=prefix,
            # LogitsProcessor gathers over the attention-TP group in exactly this case.
            use_attn_tp_group=get_parallel().enable_dp_lm_head,
        )
        embedding = self.model.embed_tokens
        both_here = self.arch.tie_word_embeddings and self.pp_group.is_first_rank
        if both_here and head.use_attn_tp_group == embedding.use_attn_tp_group:
            return head.tie_weights(embedding)
        return head

    def _strict_loader(self) -> StrictLoader:
        layers = range(self.start_layer, self.end_layer)
        check_layers(self.arch, layers)
        check_vocabulary(self.arch, "embedding", self.model.embed_tokens)
        check_vocabulary(self.arch, "head", self.lm_head)
        return StrictLoader(self, self.arch, stage_of(self.arch, layers))

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
    ) -> LogitsProcessorOutput | PPProxyTensors:
        """input_ids, positions: [tokens] -> logits on the last stage, the residual stream else."""
        output = self.model(input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors)
        if not self.pp_group.is_last_rank:
            return output
        hidden_states, captured = output if isinstance(output, tuple) else (output, None)
        return self.logits_processor(
            input_ids, hidden_states, self.lm_head, forward_batch, captured
        )

    # --- pipeline stages ---

    @property
    def start_layer(self) -> int:
        """First layer of this stage; the KV cache is sized from here."""
        return self.model.start_layer

    @property
    def end_layer(self) -> int:
        """One past the last layer of this stage."""
        return self.model.end_layer

    # --- expert placement ---

    @property
    def routed_experts_weights_of_layer(self) -> dict[int, list[torch.Tensor]]:
        """layer -> this rank's expert tensors, which a rebalance moves; read after loading."""
        return self._routed_experts_weights.value

    @classmethod
    def get_model_config_for_expert_location(cls, config: Any) -> ModelConfigForExpertLocation:
        """The numbers by which SGLang places experts."""
        arch = Architecture.from_config(config)
        return ModelConfigForExpertLocation(
            num_layers=arch.num_layers, num_logical_experts=arch.num_experts, num_groups=None
        )

    # --- draft models ---

    @property
    def capture_aux_hidden_states(self) -> bool:
        """Whether residuals are captured for a draft; SGLang's graph runners ask."""
        return bool(self.model.layers_to_capture)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding module, a placeholder on later pipeline stages."""
        return self.model.embed_tokens

    def get_embed_and_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's rows of the embedding and of the head, for a draft that shares them."""
        return self.model.embed_tokens.weight, self.lm_head.weight

    def set_embed_and_head(self, embed: nn.Parameter, head: nn.Parameter) -> None:
        """Replace both by another model's; the old tensors are released."""
        # Deleted first: what comes may be a plain tensor, which cannot replace a parameter.
        del self.model.embed_tokens.weight, self.lm_head.weight
        self.model.embed_tokens.weight = embed
        self.lm_head.weight = head

    def set_eagle3_layers_to_capture(self, layer_ids: Sequence[int] | None = None) -> None:
        """Capture the outputs of `layer_ids` (Eagle3's usual three without), the last included."""
        if layer_ids is None:
            layer_ids = guessed_layers(self.arch.num_layers)
        self._capture_outputs_of(layer_ids)

    def set_dflash_layers_to_capture(self, layer_ids: Sequence[int]) -> None:
        """Capture the outputs of `layer_ids` for a DFlash draft."""
        if layer_ids is None:
            raise ValueError(
                "DFlash needs the layer ids to capture; name them in the draft config."
            )
        self._capture_outputs_of(layer_ids)

    def _capture_outputs_of(self, layer_ids: Sequence[int]) -> None:
        if not self.pp_group.is_last_rank:
            return
        points = tuple(layer_id + 1 for layer_id in layer_ids)
        wrong = [i - 1 for i in points if not 0 <= i <= self.arch.num_layers]
        if wrong or len(set(points)) != len(points):
            raise ValueError(
                f"cannot capture the outputs of layers {list(layer_ids)}: they must be distinct "
                f"and at most {self.arch.num_layers - 1}; name them in the draft model's config."
            )
        if min(points, default=self.start_layer) < self.start_layer:
            raise TopologyError(
                f"the outputs of layers {list(layer_ids)} are wanted on the last pipeline stage, "
                f"which starts at layer {self.start_layer}; use --pp-size 1."
            )
        self.model.layers_to_capture = points

    # --- weights ---

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load (name, tensor) pairs; the first call must fill the model, later ones may be partial.

        weights: whole tensors, or `CheckpointFiles`. Returns the names of the parameters
        written. Raises LoadError, which lists what is wrong.
        """
        return self._loader.load(weights)

    def weight_problems(
        self, weights: Iterable[tuple[str, torch.Tensor]], *, complete: bool = False
    ) -> Problems:
        """What `load_weights` would refuse; nothing is written. Tensors may be on the meta device.

        complete: whether they must fill the whole model. Raises LoadError for an unreadable source.
        """
        return self._loader.problems_of(weights, complete=complete)

    def loading_plan(self, headers: Headers) -> Plan:
        """What this rank reads of the announced tensors, and everything that speaks against it."""
        return self._loader.plan(headers)

    @property
    def partly_replaced(self) -> bool:
        """Whether weights may have been written since the last load of all of them."""
        return self._loader.partial

    def demand_complete_load(self) -> AbstractContextManager[None]:
        """Inside, each `load_weights` must fill the whole model; after a failure all fail."""
        return self._loader.complete()

    def post_load_weights(self) -> None:
        """SGLang's call after it filled the parameters by itself: dummy, sharded, remote loads."""
        self._loader.filled_elsewhere()


EntryClass = MiniMaxM2ForCausalLM
