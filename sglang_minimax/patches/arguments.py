"""What we declare and refuse while SGLang resolves a server's arguments."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sglang_minimax import ARCHITECTURE, plugin
from sglang_minimax.config import Architecture
from sglang_minimax.drafts.config import REJECTION
from sglang_minimax.errors import MinimaxError
from sglang_minimax.loading.files import check_checkpoint, folder_of
from sglang_minimax.moe_exchange import report
from sglang_minimax.moe_exchange.paths import CUSTOMIZED
from sglang_minimax.moe_exchange.plan import plan_for
from sglang_minimax.moe_exchange.rules import CPU, FREE, VARIABLE, resolved
from sglang_minimax.patches.communication import facts_of
from sglang_minimax.platforms import choice
from sglang_minimax.platforms.cpu import support as cpu_support
from sglang_minimax.support import Launch, notes, refusals

logger = logging.getLogger(__name__)

# Options that need SGLang's own way to the experts: field -> as the user wrote it.
STANDARD_ONLY = {
    "lora_paths": "--lora-paths",
    "elastic_ep_backend": "--elastic-ep-backend",
    "enable_pd_role_switch": "--enable-pd-role-switch",
    "enable_paged_experts": "--enable-paged-experts",
    "kt_weight_path": "--kt-weight-path",
}

# Options that change how drafts are made or verified: field -> as the user wrote it.
SPECULATIVE = {
    "speculative_use_rejection_sampling": REJECTION,
    "speculative_adaptive": "--speculative-adaptive",
    "enable_multi_layer_eagle": "--enable-multi-layer-eagle",
    "speculative_draft_window_size": "--speculative-draft-window-size",
}

Step = Callable[[Any], None]


def register_overrides() -> None:
    """Declare our argument values for MiniMax-M2 after SGLang's own; the last one counts."""
    from sglang.srt.arg_groups.model_override_base import register_model_override

    register_model_override(ARCHITECTURE)(leave_tf32_to_the_user)


def leave_tf32_to_the_user(server_args: Any, hf_config: Any) -> dict[str, Any]:
    """TF32 only when `--enable-tf32-matmul` asks for it.

    SGLang switches it on for the whole process whatever the user said. With 256 experts, a
    sigmoid and a bias, ten bits of mantissa in the router's product change which experts are
    chosen.
    """
    asked = bool(server_args.enable_tf32_matmul)
    if not asked:
        logger.info("sglang-minimax keeps TF32 off, so that the router is exact fp32")
    return {"enable_tf32_matmul": asked}


def register_launch_checks() -> None:
    """Wrap steps of SGLang's argument pipeline with our checks."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    from sglang_minimax.patches.drafts import check_draft

    register_resolution_hook("handle_model_specific_adjustments")(check_config_first)
    # Before SGLang's own assertions about sizes, and again when backends have had their say:
    # an all-to-all backend sets the expert-parallel size.
    register_resolution_hook("handle_data_parallelism")(check_launch_early)
    register_resolution_hook("handle_moe_kernel_config")(take_the_exchange)
    register_resolution_hook("handle_speculative_decoding")(check_draft)
    register_resolution_hook("handle_load_format")(check_launch)


def check_config_first(server_args: Any, previous: Step) -> None:
    """Read the model's configuration before SGLang decides anything by it."""
    if asked_for_ours(server_args):
        plugin.require_healthy()
        architecture_asked_for(server_args)
        check_files(server_args)
    previous(server_args)


def check_files(server_args: Any) -> None:
    """Look at the weight files of a local checkpoint before any rank is started."""
    from sglang.srt.arg_groups.model_override_base import resolving_view

    cfg = resolving_view(server_args)
    if str(cfg.load_format) not in ("auto", "safetensors"):
        return
    try:
        check_checkpoint(Path(cfg.model_path))
    except MinimaxError as error:
        raise SystemExit(f"sglang-minimax: {error}") from error


def check_launch_early(server_args: Any, previous: Step) -> None:
    """`check_launch`, unless a step that is still to come changes the sizes."""
    if asked_for_ours(server_args) and launch_of(server_args).moe_a2a_backend == "none":
        refuse_unsupported(server_args)
    previous(server_args)


def take_the_exchange(server_args: Any, previous: Step) -> None:
    """Put SGLang's backend for exchanges of others in place where the plan has one of ours.

    Here because sizes, quantisation and the model's own runner are resolved by now, and SGLang's
    assertions about runners and the first step that asks for the backend are still to come. Only
    CUDA graphs have been decided without it; SGLang's rules for them are asked again.
    """
    if asked_for_ours(server_args):
        refuse_unsupported(server_args)
        launch = launch_of(server_args)
        plan = plan_for(architecture_asked_for(server_args), launch)
        for line in report.lines(plan, launch):
            logger.info(line)
        if plan.path.is_ours:
            from sglang.srt.arg_groups.cuda_graph_hook import apply_cuda_graph_compatibility
            from sglang.srt.arg_groups.overrides import declare_resolution

            declare_resolution(server_args, "sglang-minimax", moe_a2a_backend=CUSTOMIZED)
            apply_cuda_graph_compatibility(server_args)
    previous(server_args)


def check_launch(server_args: Any, previous: Step) -> None:
    """Refuse what this model cannot do at the asked topology."""
    if asked_for_ours(server_args):
        refuse_unsupported(server_args)
        for note in notes(architecture_asked_for(server_args), launch_of(server_args)):
            logger.warning("sglang-minimax: %s", note)
    previous(server_args)


def refuse_unsupported(server_args: Any) -> None:
    """Raise SystemExit with one sentence for each reason not to start."""
    launch = launch_of(server_args)
    arch = architecture_asked_for(server_args)
    reasons = refusals(arch, launch)
    if not reasons and choice.cpu_platform_chosen():
        reasons = list(cpu_support.refusals(arch, launch))
    if reasons:
        raise SystemExit("\n".join(f"sglang-minimax: {reason}" for reason in reasons))


def asked_for_ours(server_args: Any) -> bool:
    """Whether the configured model is MiniMax-M2."""
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view
    from sglang.srt.connector import ConnectorType
    from sglang.srt.utils.common import parse_connector_type

    if parse_connector_type(resolving_view(server_args).model_path) == ConnectorType.INSTANCE:
        return False  # weights come from another server, and there is no config to read
    return ARCHITECTURE in (model_config_of(server_args).hf_config.architectures or [])


def launch_of(server_args: Any) -> Launch:
    """The arguments that bear on what is supported, resolved as far as SGLang has come."""
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view
    from sglang.srt.environ import envs

    cfg = resolving_view(server_args)
    hardware, capability = _hardware()
    backend = _backend(cfg)
    requests, rows_a_request = _decode_graph(server_args, backend)
    launch = Launch(
        tp=cfg.tp_size,
        dp=cfg.attn_dp_size,
        ep=cfg.ep_size,
        pp=cfg.pp_size,
        nodes=cfg.nnodes,
        attention_cp=cfg.attn_cp_size,
        moe_dp=cfg.moe_dp_size,
        enable_two_batch_overlap=cfg.enable_two_batch_overlap,
        enable_single_batch_overlap=cfg.enable_single_batch_overlap,
        ep_redundant=cfg.ep_num_redundant_experts,
        speculative_algorithm=(cfg.speculative_algorithm or "").upper() or None,
        speculative_options=tuple(name for f, name in SPECULATIVE.items() if getattr(cfg, f)),
        speculative_tree=_tree(cfg),
        accept_threshold_single=cfg.speculative_accept_threshold_single,
        accept_threshold_acc=cfg.speculative_accept_threshold_acc,
        verifies_sampled=_verifies_sampled(hardware),
        quantization=model_config_of(server_args).quantization,
        moe_a2a_backend=backend,
        moe_runner_backend=cfg.moe_runner_backend,
        moe_exchange=os.environ.get(VARIABLE) or None,
        enable_return_hidden_states=cfg.enable_return_hidden_states,
        enable_eplb=cfg.enable_eplb,
        init_expert_location=cfg.init_expert_location,
        hardware=hardware,
        capability=capability,
        item_bytes=model_config_of(server_args).dtype.itemsize,
        deepep_mode=cfg.deepep_mode,
        deepep_dispatcher_output_dtype=cfg.deepep_dispatcher_output_dtype,
        chunked_prefill_size=cfg.chunked_prefill_size,
        decode_graph_rows=None if requests is None else requests * rows_a_request,
        rows_a_request=rows_a_request,
        disaggregation_mode=cfg.disaggregation_mode,
        prefill_graphs=_prefill_graphs(server_args),
        allreduce_fusion=cfg.flashinfer_allreduce_fusion_backend,
        no_allreduce_fusion=(
            cfg.enforce_disable_flashinfer_allreduce_fusion or cfg.enable_deterministic_inference
        ),
        no_fp4_allgather=cfg.disable_flashinfer_cutlass_moe_fp4_allgather,
        fp4_by_token=envs.SGLANG_FLASHINFER_NVFP4_PER_TOKEN_ACTIVATION.get(),
        enable_lora=bool(cfg.enable_lora),
        enable_return_routed_experts=bool(cfg.enable_return_routed_experts),
        needs_sglang=tuple(_standard_only(cfg)),
        facts=facts_of(server_args),
    )
    return resolved(launch)


def _decode_graph(server_args: Any, backend: str) -> tuple[int | None, int]:
    """(requests, rows of each) of decode's largest CUDA graph in an attention-DP group.

    None where there are no graphs, or nobody asks: only SGLang's backends count slots. Its own
    sum, as for DeepEP v2: no graph is for more requests than may run.
    """
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.arg_groups.moe_hook import _decode_graph_dispatch_tokens_per_rank
    from sglang.srt.model_executor.cuda_graph_config import Backend

    graphs = resolving_view(server_args).cuda_graph_config
    known = hasattr(graphs, "decode") and graphs.decode.backend != Backend.DISABLED
    if backend in FREE or not known:
        return None, 1
    return _decode_graph_dispatch_tokens_per_rank(server_args)


def _prefill_graphs(server_args: Any) -> bool:
    """Whether SGLang would capture CUDA graphs of prefill by itself, as resolved so far."""
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase

    graphs = resolving_view(server_args).cuda_graph_config
    asked = (Phase.PREFILL, "backend") in getattr(server_args, "_cuda_graph_config_locked", ())
    return hasattr(graphs, "prefill") and graphs.prefill.backend == Backend.BREAKABLE and not asked


def _tree(cfg: Any) -> tuple[int, int, int] | None:
    """(steps, branches, verified tokens) of a draft tree, None until SGLang has chosen them."""
    sizes = (
        cfg.speculative_num_steps,
        cfg.speculative_eagle_topk,
        cfg.speculative_num_draft_tokens,
    )
    return None if None in sizes else sizes


def _standard_only(cfg: Any) -> Iterator[str]:
    for name, option in STANDARD_ONLY.items():
        if getattr(cfg, name):
            yield option
    if cfg.dwdp_size > 1:
        yield f"--dwdp-size {cfg.dwdp_size}"
    # SGLang then tells a rank the rows of its own group alone (utils.common.require_mlp_tp_gather).
    if cfg.moe_dense_tp_size is not None and cfg.enable_dp_lm_head:
        yield f"--moe-dense-tp-size {cfg.moe_dense_tp_size} with --enable-dp-lm-head"


def _backend(cfg: Any) -> str:
    """--moe-a2a-backend as SGLang will have it (overrides._a2a_backend_overrides)."""
    if cfg.enable_waterfill and cfg.moe_a2a_backend not in ("deepep", "megamoe"):
        return "deepep"
    return cfg.moe_a2a_backend


def _hardware() -> tuple[str | None, int | None]:
    """What the ranks would run on, and its compute capability times ten where it is CUDA's."""
    import torch

    if choice.cpu_platform_chosen():
        return CPU, None
    if torch.version.hip is not None:
        return "rocm", None
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return "cuda", 10 * major + minor
    return ("ascend", None) if hasattr(torch, "npu") else (None, None)


def _verifies_sampled(hardware: str | None) -> bool:
    """Whether SGLang has its kernel for sampling along a draft tree; elsewhere it always has."""
    if hardware != "ascend":
        return True
    from sglang.kernels.ops.speculative import verify_sampling

    return verify_sampling.tree_speculative_sampling_target_only is not None


def architecture_asked_for(server_args: Any) -> Architecture:
    """The model's architecture. Raises SystemExit, with one sentence, where it is none of ours."""
    from sglang.srt.arg_groups.model_override_base import model_config_of

    config = model_config_of(server_args)
    try:
        folder = folder_of(config.model_path, config.revision)
        return Architecture.from_config(config.hf_config, folder)
    except MinimaxError as error:
        raise SystemExit(f"sglang-minimax: {error}") from error
