"""The fused all-reduce, DeepEP v2 and routing inside kernels, against SGLang's own code."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang_minimax import ARCHITECTURE, TINY_M2
from sglang_minimax.moe_exchange import backends
from sglang_minimax.patches import communication
from tests.plugin.processes import forked

#: One of those that SGLang fuses by itself, with the plainest of conditions.
LISTED = "Qwen3MoeForCausalLM"


# --- whether the all-reduce is fused ---


def arguments_of(architecture: str, **given: Any) -> Any:
    """A server's arguments, as far as the rules look at them."""
    config = SimpleNamespace(architectures=[architecture], hidden_size=3072)
    defaults = {
        "tp_size": 8,
        "attn_dp_size": 1,
        "attn_cp_size": 1,
        "moe_dp_size": 1,
        "ep_size": 1,
        "nnodes": 1,
        "ep_join_mode": None,
        "moe_a2a_backend": "none",
        "moe_runner_backend": "auto",
        "disable_custom_all_reduce": False,
        "flashinfer_allreduce_fusion_backend": None,
        "enforce_disable_flashinfer_allreduce_fusion": False,
        "enable_deterministic_inference": False,
        "rl_on_policy_target": None,
        "_model_config": SimpleNamespace(hf_config=config, dtype=None),
    }
    return SimpleNamespace(**defaults | given)


CONDITIONS = {
    "tp_size": (1, 8),
    "attn_dp_size": (1, 2),
    "attn_cp_size": (1, 2),
    "nnodes": (1, 2),
    "ep_join_mode": (None, "scale"),
    "moe_a2a_backend": ("none", "deepep"),
    "flashinfer_allreduce_fusion_backend": (None, "trtllm"),
    "enforce_disable_flashinfer_allreduce_fusion": (False, True),
}
MACHINES: tuple[dict[str, bool], ...] = ({}, {"is_sm90": True}, {"is_sm100": True})


def every_launch() -> Iterator[tuple[dict[str, bool], dict[str, Any]]]:
    """Each combination of the conditions, on each machine."""
    for machine, values in itertools.product(MACHINES, itertools.product(*CONDITIONS.values())):
        yield machine, dict(zip(CONDITIONS, values, strict=True))


def resolved_by_us(given: dict[str, Any]) -> str | None:
    server_args = arguments_of(ARCHITECTURE, **given)
    config = server_args._model_config.hf_config
    declared = communication.fuse_all_reduce(server_args, config)
    return final(given, declared)


def resolved_by_sglang(given: dict[str, Any]) -> str | None:
    from sglang.srt.arg_groups.overrides import (
        ResolvedView,
        _flashinfer_allreduce_fusion_auto_enable,
    )

    view = ResolvedView(arguments_of(LISTED, **given))
    return final(given, _flashinfer_allreduce_fusion_auto_enable(view))


def final(given: dict[str, Any], declared: dict[str, Any]) -> str | None:
    """What is left after SGLang's _enforce_disable_allreduce_fusion, which runs last."""
    if given["enforce_disable_flashinfer_allreduce_fusion"]:
        return None
    asked = given["flashinfer_allreduce_fusion_backend"]
    return declared.get("flashinfer_allreduce_fusion_backend", asked)


def differences() -> list[tuple[Any, ...]]:
    from sglang.srt.runtime_context import override_platform

    nothing = {"is_sm90": False, "is_sm100": False, "is_blackwell": False}
    found = []
    for machine, given in every_launch():
        with override_platform(**nothing | machine):
            ours, theirs = resolved_by_us(given), resolved_by_sglang(given)
        if ours != theirs:
            found.append((machine, given, ours, theirs))
    return found


def test_our_rule_is_that_of_the_models_that_sglang_lists() -> None:
    assert differences() == []


def _wrong_fusions() -> dict[str, Callable[[Any], tuple[bool, str]]]:
    right = backends.fusion

    def but(**changed: Any) -> Callable[[Any, Any], tuple[bool, str]]:
        return lambda launch: right(replace(launch, **changed))

    return {
        "always": lambda *_: (True, ""),
        "never": lambda *_: (False, ""),
        "one rank": but(tp=8),
        "attention DP": but(dp=1),
        "nodes": but(nodes=1),
        "a2a": but(moe_a2a_backend="none"),
        "any GPU": but(hardware="cuda", capability=90),
    }


@pytest.mark.parametrize("wrong", _wrong_fusions())
def test_another_rule_would_show(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "fusion", _wrong_fusions()[wrong])
    assert differences() != []


def _resolved(extra: list[str], machine: dict[str, bool]) -> Any:
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.runtime_context import override_platform
    from sglang.srt.server_args import prepare_server_args

    with override_platform(**machine):
        server_args = prepare_server_args(["--model-path", str(TINY_M2), "--tp-size", "4", *extra])
        server_args.resolve_once()
        return resolving_view(server_args).flashinfer_allreduce_fusion_backend


def test_the_cpu_platform_stays_as_it_was() -> None:
    assert forked(_resolved, [], {}) is None


def test_the_override_is_one_that_sglang_asks() -> None:
    hopper = {"is_sm90": True}
    assert forked(_resolved, [], hopper) == "auto"
    assert forked(_resolved, ["--attn-dp-size", "2"], hopper) is None
    off = ["--enforce-disable-flashinfer-allreduce-fusion"]
    assert forked(_resolved, off, hopper) is None
    named = ["--flashinfer-allreduce-fusion-backend", "trtllm"]
    assert forked(_resolved, named, hopper) == "trtllm"


def test_determinism_keeps_it_apart() -> None:
    from sglang.srt.runtime_context import override_platform

    for asked in ({"enable_deterministic_inference": True}, {"rl_on_policy_target": "fsdp"}):
        server_args = arguments_of(ARCHITECTURE, **asked)
        config = server_args._model_config.hf_config
        with override_platform(is_sm90=True):
            assert communication.fuse_all_reduce(server_args, config) == {}
            assert communication.fuse_all_reduce(arguments_of(ARCHITECTURE), config) != {}


@pytest.mark.parametrize("kernels", ["trtllm", "mnnvl"])
def test_the_sums_of_the_qk_norm_do_not_go_through_its_workspace(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the fusion on, other sums over attention-TP may take its kernels (_fi_workspace_hint).

    Two fp32 numbers a token must not: TensorRT-LLM's workspace is for bf16, and MNNVL's kernel
    fails for rows that are not in whole vectors.
    """
    import torch
    from sglang.srt.layers import flashinfer_comm_fusion

    key = (None, None)
    manager = SimpleNamespace(
        initialized=True,
        workspace=True,
        world_size=4,
        group=key,
        backend=kernels,
        max_token_num=2048,
        hidden_dim=3072,
        dtype=torch.bfloat16,
        use_fp32_lamport=False if kernels == "trtllm" else None,
        is_buffer_size_sufficient=lambda **_: True,
    )
    patch = monkeypatch.setattr
    patch(flashinfer_comm_fusion, "_flashinfer_allreduce_unavailable", False)
    patch(flashinfer_comm_fusion, "_flashinfer_comm", object())
    patch(flashinfer_comm_fusion, "_get_workspace_manager", lambda _: manager)

    def goes(rows: torch.Tensor) -> bool:
        return flashinfer_comm_fusion.can_use_flashinfer_allreduce(
            rows, use_attn_tp_group=True, expected_world_size=4, expected_group_key=key
        )

    assert goes(torch.empty(5, 3072, dtype=torch.bfloat16))
    assert not goes(torch.empty(5, 2, dtype=torch.float32))


# --- DeepEP ---


def _registered() -> list[bool]:
    import sglang.srt.arg_groups.moe_hook as hook
    from sglang.srt.configs.moe_model_registry import model_supports_deepep_v2

    found = []
    for name in (ARCHITECTURE, "MiniMaxM1ForCausalLM"):
        config = SimpleNamespace(architectures=[name])
        server_args = SimpleNamespace(
            model_path="a", _model_config=SimpleNamespace(hf_config=config)
        )
        found.append(model_supports_deepep_v2(config))
        try:
            hook.validate_deepep_v2_model_architecture(server_args)
        except ValueError:
            found.append(False)
        else:
            found.append(True)
    return found


def test_deepep_v2_is_registered_before_arguments_are_checked() -> None:
    assert forked(_registered) == [True, True, False, False]


def test_deepep_v2_rows_are_sized_as_sglang_does() -> None:
    """Rows of a prefill chunk are cut over attention-TP, so no size of our own is declared."""
    from sglang.srt.configs.moe_model_registry import (
        _policy_of,
        model_deepep_v2_prefill_dispatch_tokens,
        model_requires_fp32_silu_mul,
    )

    config = SimpleNamespace(architectures=[ARCHITECTURE])
    assert _policy_of(config) is not None
    assert not model_requires_fp32_silu_mul(config)
    sized = model_deepep_v2_prefill_dispatch_tokens(config, None, ceiling=8, default_tokens=3)
    assert sized == 3


def symbol(kernel: str, size: int) -> bytes:
    return f"_ZN7deep_ep12internode_ll{len(kernel)}{kernel}ILb0ELb1ELi{size}EEEvPv\0".encode()


def test_sizes_are_those_of_both_kernels() -> None:
    both = symbol("dispatch", 3072) + symbol("combine", 3072) + symbol("combine", 4096)
    assert communication.sizes_in(both) == {3072}
    assert communication.sizes_in(symbol("dispatch", 3072)) is None
    assert communication.sizes_in(b"combine_overlappableILb0ELi3072E") is None
    assert communication.sizes_in(b"") is None


def test_the_wheel_that_sglang_asks_for_has_our_hidden_size() -> None:
    sizes = communication.low_latency_sizes()
    if sizes is None:
        pytest.skip("DeepEP is not installed")
    assert {3072, 4096, 7168} <= sizes
    assert 1536 not in sizes


def test_facts_come_from_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK", "256")
    monkeypatch.setattr(communication, "is_missing", lambda package: package == "deep_ep")
    monkeypatch.setattr(communication, "low_latency_sizes", lambda: frozenset({1}))
    server_args = arguments_of(ARCHITECTURE, moe_a2a_backend="deepep")
    server_args._model_config.dtype = torch.float16
    facts = communication.facts_of(server_args)
    assert facts.low_latency_sizes == {1}
    assert facts.missing == {"deepep"}
    assert facts.bf16 is False
    assert facts.slots["deepep"] == 256
    assert facts.slots["nixl"] == 128
    server_args.moe_a2a_backend = "none"
    assert communication.facts_of(server_args) == backends.UNKNOWN
    monkeypatch.setattr(communication, "is_missing", lambda package: package == "deep_gemm")
    server_args.moe_runner_backend = "deep_gemm"
    assert communication.facts_of(server_args).deep_gemm is False


# --- routing inside kernels ---


def _bypasses(**changed: Any) -> bool:
    import torch
    from sglang.srt.layers.moe.topk import TopKConfig, _can_bypass_trtllm_routing
    from sglang.srt.layers.moe.utils import RoutingMethodType

    given = {
        "top_k": 8,
        "layer_id": 0,
        "renormalize": True,
        "scoring_func": "sigmoid",
        "correction_bias": torch.zeros(16),
        "routed_scaling_factor": 1.0,
    }
    config = TopKConfig(**given | changed)
    config.routing_method_type = RoutingMethodType.MiniMax2
    return _can_bypass_trtllm_routing(config)


def test_no_kernel_of_sglang_routes_for_this_model() -> None:
    """TopK chooses for every runner, so that no routing method is declared.

    When this fails, SGLang hands logits to FlashInfer's kernel for MiniMax2 by itself: see
    docs/deepep.md on what to declare then.
    """
    from sglang.srt.layers.moe.topk import TopKConfig, _can_bypass_trtllm_routing
    from sglang.srt.layers.moe.utils import RoutingMethodType

    assert not _bypasses()
    plain = TopKConfig(top_k=8, layer_id=0, renormalize=True, scoring_func="sigmoid")
    plain.routing_method_type = RoutingMethodType.SigmoidRenorm
    assert _can_bypass_trtllm_routing(plain)  # the predicate does say yes to other models


def test_flashinfer_knows_the_routing_by_the_same_number() -> None:
    enums = pytest.importorskip("flashinfer.tllm_enums")
    from sglang.srt.layers.moe.utils import RoutingMethodType

    assert int(enums.RoutingMethodType.MiniMax2) == int(RoutingMethodType.MiniMax2) == 7
