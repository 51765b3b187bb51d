"""What we declare and refuse while SGLang resolves a server's arguments."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_minimax import ARCHITECTURE, plugin
from sglang_minimax.config import Architecture
from sglang_minimax.errors import MinimaxError
from sglang_minimax.loading.files import check_checkpoint, folder_of
from sglang_minimax.platforms import choice
from sglang_minimax.platforms.cpu import support as cpu_support
from sglang_minimax.support import Launch, notes, refusals

logger = logging.getLogger(__name__)

#: Environment variable that names a path to the experts, one of moe_exchange.paths.FORCEABLE.
MOE_EXCHANGE = "SGLANG_MINIMAX_MOE"

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
    """Wrap two steps of SGLang's argument pipeline with our checks."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    register_resolution_hook("handle_model_specific_adjustments")(check_config_first)
    # Before SGLang's own assertions about sizes, and again when backends have had their say:
    # an all-to-all backend sets the expert-parallel size.
    register_resolution_hook("handle_data_parallelism")(check_launch_early)
    register_resolution_hook("handle_load_format")(check_launch)


def check_config_first(server_args: Any, previous: Step) -> None:
    """Read the model's configuration before SGLang decides anything by it."""
    if asked_for_ours(server_args):
        plugin.require_healthy()
        _architecture_of(server_args)
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


def check_launch(server_args: Any, previous: Step) -> None:
    """Refuse what this model cannot do at the asked topology."""
    if asked_for_ours(server_args):
        refuse_unsupported(server_args)
        for note in notes(_architecture_of(server_args), launch_of(server_args)):
            logger.warning("sglang-minimax: %s", note)
    previous(server_args)


def refuse_unsupported(server_args: Any) -> None:
    """Raise SystemExit with one sentence for each reason not to start."""
    launch = launch_of(server_args)
    arch = _architecture_of(server_args)
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

    cfg = resolving_view(server_args)
    hardware, capability = _hardware()
    return Launch(
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
        speculative_algorithm=cfg.speculative_algorithm,
        quantization=model_config_of(server_args).quantization,
        moe_a2a_backend=cfg.moe_a2a_backend,
        moe_runner_backend=cfg.moe_runner_backend,
        moe_exchange=os.environ.get(MOE_EXCHANGE) or None,
        enable_return_hidden_states=cfg.enable_return_hidden_states,
        enable_eplb=cfg.enable_eplb,
        init_expert_location=cfg.init_expert_location,
        hardware=hardware,
        capability=capability,
    )


def _hardware() -> tuple[str | None, int | None]:
    """What the ranks would run on, and its compute capability times ten where it is CUDA's."""
    import torch

    if choice.cpu_platform_chosen():
        return None, None
    if torch.version.hip is not None:
        return "rocm", None
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return "cuda", 10 * major + minor
    return ("ascend", None) if hasattr(torch, "npu") else (None, None)


def _architecture_of(server_args: Any) -> Architecture:
    from sglang.srt.arg_groups.model_override_base import model_config_of

    config = model_config_of(server_args)
    try:
        folder = folder_of(config.model_path, config.revision)
        return Architecture.from_config(config.hf_config, folder)
    except MinimaxError as error:
        raise SystemExit(f"sglang-minimax: {error}") from error
