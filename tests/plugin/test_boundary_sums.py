"""Who sums what between our layers, by SGLang's own boundaries: fused, at once, or nobody."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang_minimax import TINY_M2
from tests.plugin.processes import forked


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


# --- behind dispatchers ---


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
