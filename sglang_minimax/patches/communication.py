"""What we declare of SGLang's own fast communication, and what the machine has for it."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from sglang_minimax import ARCHITECTURE
from sglang_minimax.moe_exchange import backends, rules
from sglang_minimax.moe_exchange.rules_runner import DEEP_GEMM
from sglang_minimax.moe_exchange.supported import PACKAGES, SLOTS, Facts
from sglang_minimax.support import Launch

logger = logging.getLogger(__name__)

# What SGLang takes where a variable is not set (environ.py, token_dispatcher/mooncake.py).
SLOTS_BY_DEFAULT = 128

# Names of DeepEP's low-latency kernels in its extension: dispatch<bool..., hidden>(...), and
# combine<bool, hidden, ...>(...), as the C++ ABI spells them.
_DISPATCH = re.compile(rb"internode_ll8dispatchI(?:Lb[01]E)*Li(\d+)E")
_COMBINE = re.compile(rb"internode_ll7combineI(?:Lb[01]E)*Li(\d+)E")


# --- the fused all-reduce ---


def register_fusion() -> None:
    """Declare the fused all-reduce for MiniMax-M2 where SGLang does for models that it lists."""
    from sglang.srt.arg_groups.overrides import register_model_override

    register_model_override(ARCHITECTURE)(fuse_all_reduce)


def fuse_all_reduce(server_args: Any, hf_config: Any) -> dict[str, Any]:
    """The backend of the fused all-reduce, for a user who named none.

    SGLang's _flashinfer_allreduce_fusion_auto_enable has a closed set of architectures; ours is
    not among them, though its layers are made of the same boundaries. What follows is SGLang's:
    --enforce-disable-flashinfer-allreduce-fusion, the workspaces, and the guards of each batch.
    """
    from sglang.srt.arg_groups.model_override_base import resolving_view

    cfg = resolving_view(server_args)
    if cfg.flashinfer_allreduce_fusion_backend is not None:
        return {}
    fused, why = backends.fusion(_shape(cfg))
    if not fused:
        return {}
    logger.info(
        "sglang-minimax fuses the all-reduce with residual add and norm %s, which has not been "
        "measured for MiniMax-M2; --enforce-disable-flashinfer-allreduce-fusion keeps them apart",
        why,
    )
    return {"flashinfer_allreduce_fusion_backend": "auto"}


def _shape(cfg: Any) -> Launch:
    """What the fusion depends on, in the words of SGLang's own predicates."""
    from sglang.srt.runtime_context import attn_dp_enabled_of, get_platform

    platform = get_platform()
    capability = 90 if platform.is_sm90 else 100 if platform.is_sm100 else None
    return Launch(
        tp=cfg.tp_size,
        # A server that joins one with attention DP may have a single group itself.
        dp=max(cfg.attn_dp_size, 1 + attn_dp_enabled_of(cfg)),
        ep=cfg.ep_size,
        nodes=cfg.nnodes,
        attention_cp=cfg.attn_cp_size,
        moe_dp=cfg.moe_dp_size,
        moe_a2a_backend=cfg.moe_a2a_backend,
        moe_exchange=os.environ.get(rules.VARIABLE) or None,
        # Determinism switches it off later (overrides._deterministic_allreduce_fusion_disable).
        no_allreduce_fusion=(
            cfg.enforce_disable_flashinfer_allreduce_fusion
            or cfg.enable_deterministic_inference
            or cfg.rl_on_policy_target is not None
        ),
        hardware=None if capability is None else "cuda",
        capability=capability,
    )


# --- DeepEP ---


def register_deepep_v2() -> None:
    """Tell SGLang that DeepEP v2 fits this model.

    Its combine adds up a row's weighted outputs on the rank that sent the row, and our layer adds
    nothing after it: with an a2a backend the boundary's output contract has no group to sum over
    (layer_boundary/factories.py, _resolve_ffn: complete = on_rank_rows). There are no shared
    experts. Rows come cut over attention-TP, which is how SGLang sizes prefill by itself, and
    intermediates in fp32 are a matter of MXFP8 experts, which this model does not have.
    """
    from sglang.srt.configs.moe_model_registry import register_deepep_v2_model

    register_deepep_v2_model(ARCHITECTURE)


def facts_of(server_args: Any) -> Facts:
    """What this machine has for the backend and the runner that the arguments name."""
    import torch
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view
    from sglang.srt.environ import envs

    cfg = resolving_view(server_args)
    backend = cfg.moe_a2a_backend
    deep_gemm = None
    if backend not in rules.FREE or cfg.moe_runner_backend == DEEP_GEMM:
        deep_gemm = _has_deep_gemm()
    if backend in rules.FREE:
        return Facts(deep_gemm=deep_gemm)
    return Facts(
        low_latency_sizes=low_latency_sizes() if backend == "deepep" else None,
        deep_gemm=deep_gemm,
        aiter=envs.SGLANG_USE_AITER.get(),
        missing=frozenset({backend} if is_missing(PACKAGES.get(backend, "")) else ()),
        bf16=model_config_of(server_args).dtype == torch.bfloat16,
        slots={name: _number(variable) for name, variable in SLOTS.items()},
    )


def is_missing(package: str) -> bool:
    """Whether a package that a backend needs is not installed; nothing is imported."""
    return bool(package) and importlib.util.find_spec(package) is None


def low_latency_sizes() -> frozenset[int] | None:
    """Hidden sizes that the installed DeepEP has low-latency kernels for, None if unknown."""
    spec = importlib.util.find_spec("deep_ep")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    # Its own extension lies in the package, or beside it in other builds.
    found = [*folder.glob("_C*.so"), *folder.parent.glob("deep_ep_cpp*.so")]
    return _sizes_of(found[0]) if found else None


@cache
def _sizes_of(extension: Path) -> frozenset[int] | None:
    """Arguments are looked at several times, and an extension has some ten megabytes."""
    return sizes_in(extension.read_bytes())


def sizes_in(extension: bytes) -> frozenset[int] | None:
    """Hidden sizes with both kernels among the symbols of an extension; None if it names none."""
    dispatch, combine = (
        {int(size) for size in kernel.findall(extension)} for kernel in (_DISPATCH, _COMBINE)
    )
    return frozenset(dispatch & combine) or None


def _has_deep_gemm() -> bool | None:
    """As layers/deep_gemm_wrapper/configurer.py has it, short of importing its kernels here."""
    from sglang.srt.environ import envs

    if not envs.SGLANG_ENABLE_JIT_DEEPGEMM.get() or is_missing("deep_gemm"):
        return False
    return None


def _number(variable: str) -> int:
    try:
        return int(os.environ.get(variable, SLOTS_BY_DEFAULT))
    except ValueError:
        return SLOTS_BY_DEFAULT
