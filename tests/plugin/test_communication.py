"""The fused all-reduce, DeepEP v2 and routing inside kernels, against SGLang's own code."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang_minimax import ARCHITECTURE, TINY_M2
from sglang_minimax.moe_exchange import backends
from sglang_minimax.patches import communication
from sglang_minimax.validation.engine_process import preload

#: One of those that SGLang fuses by itself, with the plainest of conditions.
LISTED = "Qwen3MoeForCausalLM"


def forked(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a process of its own; SGLang's state is global."""
    preload()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def child() -> None:
        try:
            there.send(function(*arguments))
        except BaseException as error:
            there.send(error)

    process = context.Process(target=child)
    process.start()
    assert here.poll(120), "no answer"
    answer = here.recv()
    process.join()
    if isinstance(answer, BaseException):
        raise answer
    return answer


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


def _wrong_fusions() -> dict[str, Callable[[Any, Any], tuple[bool, str]]]:
    right = backends.fusion

    def but(**changed: Any) -> Callable[[Any, Any], tuple[bool, str]]:
        return lambda arch, launch: right(arch, replace(launch, **changed))

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


# --- that our layers take the fused kernel ---


def _published() -> Any:
    """SGLang's runtime context of a server of four ranks."""
    from sglang.srt import runtime_context
    from sglang.srt.server_args import prepare_server_args

    server_args = prepare_server_args(["--model-path", str(TINY_M2), "--tp-size", "4"])
    server_args.resolve_once()
    runtime_context.publish(server_args, role="test")
    return runtime_context


def _group(size: int = 4) -> Any:
    # The sum of equal shares, so that what nobody has summed, or somebody twice, shows.
    ranks = list(range(size))
    return SimpleNamespace(
        world_size=size, rank_in_group=0, ranks=ranks, all_reduce=lambda x: size * x
    )


def _widths(ep: int = 1) -> dict[str, Any]:
    """A stage of four ranks as one of them has it."""
    everyone, none = _group(), _group(1)
    sizes = {"tp_size": 4, "tp_rank": 0, "attn_tp_size": 4, "attn_tp_rank": 0, "attn_dp_size": 1}
    sizes |= {"attn_cp_size": 1, "moe_dp_size": 1, "moe_ep_size": ep, "moe_tp_size": 4 // ep}
    pairs = {1: (none, everyone), 2: (_group(2), _group(2)), 4: (everyone, none)}
    groups = {"tp_group": everyone, "attn_tp_group": everyone}
    groups |= dict(zip(("moe_ep_group", "moe_tp_group"), pairs[ep], strict=True))
    return sizes | groups


def _layers(count: int, wrapped: bool = False) -> list[tuple[Any, Any]]:
    """The boundaries of our decoder layers, norms with weights of one.

    wrapped: norms that compute the same and hide what else SGLang's can do.
    """
    import torch
    from sglang.srt.layers.layer_boundary import append_stages, layer_stack
    from sglang.srt.layers.layernorm import RMSNorm

    from sglang_minimax.models.minimax_m2 import stage_facts

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = RMSNorm(8)

        def forward(self, *arguments: Any) -> Any:
            return self.norm(*arguments)

    make = Wrapped if wrapped else partial(RMSNorm, 8)
    torch.set_default_dtype(torch.float32)
    with layer_stack():
        return [
            append_stages(*zip(stage_facts(i), (make(), make()), strict=True)) for i in range(count)
        ]


def _run_layers(fuses: bool, wrapped: bool = False) -> tuple[list[str], list[float]]:
    """Which sums the fused kernel took, and the residual after three layers of identities."""
    import torch
    from sglang.srt.layers import flashinfer_comm_fusion
    from sglang.srt.layers.layer_boundary import exit as exits
    from sglang.srt.layers.layer_boundary.fusions import allreduce
    from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    taken = []

    def kernel(input_tensor: Any, residual: Any, weight: Any, eps: float, **more: Any) -> Any:
        taken.append("attention" if more["use_attn_tp_group"] else "experts")
        total = residual + 4 * input_tensor
        scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)
        return total * scale * weight, total

    flashinfer_comm_fusion.flashinfer_allreduce_residual_rmsnorm = kernel
    for module in (allreduce, exits):
        module.flashinfer_ar_fusion_applies = lambda rows: fuses
    context = _published()
    with context.get_parallel().override(**_widths()):
        layers = _layers(3, wrapped)
        hidden = torch.arange(16, dtype=torch.float32).reshape(2, 8) + 1
        batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            input_ids=torch.zeros(2),
            dp_padding_mode=None,
            can_run_tbo=False,
            residual_stream=None,
        )
        residual_batch.start(batch)
        for attention, experts in layers:
            hidden = attention.prepare(hidden, batch)
            hidden = attention.finish(hidden / 4, batch)
            hidden = experts.prepare(hidden, batch)
            hidden = experts.finish(hidden / 4, batch)
        result = residual_batch.final_norm(hidden, batch, RMSNorm(8))
    return taken, result.flatten().tolist()


def test_every_sum_but_the_last_is_left_to_the_fused_kernel() -> None:
    taken, fused = forked(_run_layers, True)
    # The last layer's sum has no layer after it; SGLang completes it at once.
    assert taken == ["attention", "experts"] * 2 + ["attention"]
    none, apart = forked(_run_layers, False)
    assert none == []
    assert fused == pytest.approx(apart, rel=1e-5)
    # A norm of another class would lose it without a word.
    none, apart = forked(_run_layers, True, True)
    assert none == []
    assert fused == pytest.approx(apart, rel=1e-5)


def _exits(ep: int) -> tuple[bool, bool]:
    from sglang.srt.layers.layer_boundary.contracts import BatchVariant

    context = _published()
    with context.get_parallel().override(**_widths(ep)):
        (_, experts), _ = _layers(2)
    facts = experts.plan.paths[BatchVariant.ORDINARY].exit
    return facts.may_defer_sum, facts.single_sum


def test_experts_that_are_cut_and_dealt_sum_at_once() -> None:
    """What `fusion_after_experts` says of --ep-size between 1 and the ranks."""
    assert forked(_exits, 1) == (True, True)
    assert forked(_exits, 4) == (True, True)
    assert forked(_exits, 2) == (True, False)


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


def _owed(backend: str) -> tuple[Any, bool]:
    """The group over which experts' outputs are summed after them, and whether rows are cut."""
    from sglang.srt.layers.layer_boundary.contracts import BatchVariant
    from sglang.srt.layers.layer_boundary.layout import TokenAxis
    from sglang.srt.layers.moe.utils import MoeA2ABackend

    context = _published()
    context.get_flags().moe.a2a_backend = MoeA2ABackend(backend)
    with context.get_parallel().override(**_widths(ep=4)):
        (_, experts), _ = _layers(2)
    path = experts.plan.paths[BatchVariant.ORDINARY]
    return path.output.group is None, TokenAxis.ATTN_TP in path.entry.input_rows.sharded


@pytest.mark.parametrize("backend", ["deepep", "deepep_v2", "mooncake", "customized"])
def test_a_dispatcher_gets_own_rows_and_its_sums_are_complete(backend: str) -> None:
    assert forked(_owed, backend) == (True, True)
    assert forked(_owed, "none") == (False, False)


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
