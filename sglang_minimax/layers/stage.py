"""What this rank holds of the model, read from SGLang's parallel state."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.layers.moe.utils import get_moe_runner_backend
from sglang.srt.runtime_context import get_exec, get_model, get_parallel

from sglang_minimax.config import Architecture
from sglang_minimax.layers.attention import attention_shard
from sglang_minimax.loading.files import folder_of
from sglang_minimax.loading.slots import ExpertPlaces, Stage
from sglang_minimax.topology import Cut, expert_cut, expert_range, vocabulary_rows

#: Multiple of rows that FlashInfer's TensorRT-LLM experts want (fused_moe_triton/layer.py).
TRTLLM_UNIT = 128


def architecture_here(config: Any) -> Architecture:
    """The architecture of the served checkpoint. Raises ConfigError."""
    model = get_model()
    return Architecture.from_config(config, folder_of(model.model_path, model.revision))


def expert_cut_here(arch: Architecture) -> Cut:
    """This rank's part of an expert's width."""
    parallel = get_parallel()
    unit = arch.expert_unit
    if parallel.moe_tp_size > 1:
        unit = math.lcm(unit, _runner_unit())
    return expert_cut(arch.expert_width, parallel.moe_tp_size, parallel.moe_tp_rank, unit)


def _runner_unit() -> int:
    """Lines to which SGLang pads a rank's part for the chosen runner; we deal it in these instead.

    FusedMoE rounds the width up by itself, and would then count ranks' parts with the padding.
    """
    backend = get_moe_runner_backend()
    trtllm = backend.is_flashinfer_trtllm() or backend.is_flashinfer_trtllm_routed()
    return TRTLLM_UNIT if trtllm else 1


def stage_of(arch: Architecture, layers: range) -> Stage:
    """This rank's stage, whose layers SGLang has built."""
    parallel = get_parallel()
    group = parallel.pp_group
    return Stage(
        attention=attention_shard(arch),
        layers=layers,
        embedding=_rows(arch, is_dp_attention_enabled()) if group.is_first_rank else None,
        # LogitsProcessor gathers over the attention-TP group in exactly this case.
        head=_rows(arch, parallel.enable_dp_lm_head) if group.is_last_rank else None,
        width=expert_cut_here(arch),
        experts=experts_here(arch),
        kv_scales=True,
        stored=stored_here(arch),
    )


def _rows(arch: Architecture, in_attention_group: bool) -> Cut:
    parallel = get_parallel()
    size, rank = parallel.tp_size, parallel.tp_rank
    if in_attention_group:
        size, rank = parallel.attn_tp_size, parallel.attn_tp_rank
    return Cut.even(vocabulary_rows(arch.vocab_size, size, rank), arch.vocab_size)


def experts_here(arch: Architecture) -> ExpertPlaces:
    """layer -> {expert: copies on this rank}, wherever SGLang has placed them by now."""
    stored = stored_here(arch)

    def experts(layer: int) -> Mapping[int, int]:
        return Counter(stored(layer))

    return experts


def stored_here(arch: Architecture) -> Callable[[int], Sequence[int]]:
    """layer -> the experts on this rank in the order of their storage, by now."""
    parallel = get_parallel()
    copies = arch.num_experts + get_exec().moe.ep_num_redundant_experts
    held = expert_range(copies, parallel.moe_ep_size, parallel.moe_ep_rank)

    def stored(layer: int) -> Sequence[int]:
        placement = get_global_expert_location_metadata()
        if placement is None:
            return [expert % arch.num_experts for expert in held]
        row = placement.physical_to_logical_map_cpu[layer]
        experts: list[int] = row[held.start : held.stop].tolist()
        return experts

    return stored
