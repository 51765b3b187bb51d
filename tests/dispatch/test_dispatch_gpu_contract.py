"""What SGLang's code for GPUs asks of our dispatchers, held against that code without a GPU.

Kernels cannot run here. What stands before them can: the assertions of the runners, the pool that
finds them, what quantisation methods read of a dispatcher, and the context that combines run in.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as FilePath
from types import SimpleNamespace
from typing import Any

import pytest
import sglang.kernels.ops.moe.fused_moe_triton_kernels as kernels
import sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe as fused_moe
import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig, flashinfer_cutlass, marlin
from sglang.srt.layers.moe.moe_runner.base import FusedOpPool, PermuteMethodPool
from sglang.srt.layers.moe.moe_runner.flashinfer_cutlass import FlashInferCutlassMoeQuantInfo
from sglang.srt.layers.moe.moe_runner.triton import (
    TritonMoeQuantInfo,
    fused_experts_none_to_triton,
)
from sglang.srt.layers.moe.utils import MoeRunnerBackend

from jit_kernels.row_quant.reference import fp8_groups
from sglang_minimax.errors import PathError
from sglang_minimax.layers import exchange
from sglang_minimax.layers.dispatch import factory, gather
from sglang_minimax.layers.dispatch.codecs import Fp4Codec, Fp8Codec
from sglang_minimax.layers.dispatch.packing import word_of
from sglang_minimax.moe_exchange.paths import CUSTOMIZED, Movement, Path, Rows
from sglang_minimax.moe_exchange.payload import Payload
from sglang_minimax.moe_exchange.rules_runner import DEEP_GEMM, READERS, TORCH
from sglang_minimax.patches.dispatch import runners_of_the_standard_one
from sglang_minimax.topology import Topology
from tests.dispatch.stage import EXPERTS, HIDDEN, WIDTH, Model, Stage

GROUPS = (2, 0, 1, 3)


def dispatched(monkeypatch: pytest.MonkeyPatch, rows: Rows) -> tuple[Model, Stage, Any]:
    """What the first rank's runner gets of a gather; four ranks, one of them without rows."""
    stage = Stage(
        Topology.parse("tp=4,dp=4,ep=4"), Path(Movement.GATHER, rows), GROUPS, monkeypatch
    )
    stage.patch()
    model = Model.random(sum(GROUPS))
    stage.run(model)
    return model, stage, stage.arrived[0]


# --- the Triton runner with FP8 rows ---


class _Launched(Exception):
    """The first kernel would run now; holds its input."""


class _Kernel:
    """In place of the Triton kernel: `kernel[grid](A, ...)`."""

    def __getitem__(self, grid: Any) -> Any:
        def launch(a: torch.Tensor, *others: Any, **options: Any) -> None:
            raise _Launched(a, others[5])  # a_desc, B, b_desc, bias, C, then A_scale

        return launch


def first_product(monkeypatch: pytest.MonkeyPatch, came: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales as they reach the kernel of the first product, through all assertions."""
    held = EXPERTS // 4
    monkeypatch.setattr(kernels, "fused_moe_kernel", _Kernel())
    monkeypatch.setattr(kernels, "is_arch_support_pdl", lambda: False)
    # Registered for GPUs alone; what it wraps runs anywhere.
    function = inspect.unwrap(fused_moe.inplace_fused_experts)
    monkeypatch.setattr(fused_moe, "inplace_fused_experts", function)
    block = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 128}
    none = torch.zeros(16, dtype=torch.int32)
    monkeypatch.setattr(
        fused_moe,
        "_prepare_fused_moe_run",
        lambda *_, **__: (block, None, False, False, none, none, none),
    )
    monkeypatch.setattr(
        fused_moe,
        "get_exec",
        lambda: SimpleNamespace(moe=SimpleNamespace(enable_fused_moe_sum_all_reduce=False)),
    )
    weights = TritonMoeQuantInfo(
        w13_weight=torch.zeros(held, 2 * WIDTH, HIDDEN, dtype=torch.float8_e4m3fn),
        w2_weight=torch.zeros(held, HIDDEN, WIDTH, dtype=torch.float8_e4m3fn),
        use_fp8_w8a8=True,
        w13_scale=torch.ones(held, -(-2 * WIDTH // 128), HIDDEN // 128),
        w2_scale=torch.ones(held, HIDDEN // 128, 1),
        block_shape=[128, 128],
    )
    config = MoeRunnerConfig(num_experts=EXPERTS, num_local_experts=held, inplace=True)
    with pytest.raises(_Launched) as launched:
        fused_experts_none_to_triton(came, weights, config)
    return launched.value.args


def test_the_triton_runner_multiplies_with_the_rows_that_travelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _, came = dispatched(monkeypatch, Rows.FP8)
    codes, scales = first_product(monkeypatch, came)
    wanted, wanted_scales = fp8_groups(model.hidden)
    assert torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(scales, wanted_scales)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda q, s: (q.view(torch.uint8), s),  # NCCL's view of FP8
        lambda q, s: (q.t().contiguous().t(), s),
        lambda q, s: (q[1:], s[1:]),
        lambda q, s: (q, None),
        lambda q, s: (q, s[:, :1]),
    ],
)
def test_the_triton_runner_notices_rows_in_another_form(
    monkeypatch: pytest.MonkeyPatch, spoil: Any
) -> None:
    _, _, came = dispatched(monkeypatch, Rows.FP8)
    spoiled = came._replace(hidden_states_pre_quant=spoil(*came.hidden_states_pre_quant))
    with pytest.raises(AssertionError):
        first_product(monkeypatch, spoiled)


def test_the_triton_runner_may_write_over_what_lies_beside_fp8_rows() -> None:
    """It has the output's shape and dtype, and shares nothing with the codes."""
    codes, scales = fp8_groups(torch.randn(3, HIDDEN))
    beside, more = Fp8Codec(torch.bfloat16).hand_over(codes, scales)
    before = codes.view(torch.uint8).clone()
    beside.fill_(-1)
    assert beside.shape == codes.shape
    assert beside.dtype == torch.bfloat16
    assert beside.is_contiguous()
    assert torch.equal(more["hidden_states_pre_quant"][0].view(torch.uint8), before)


@pytest.mark.parametrize("backend", [MoeRunnerBackend.DEEP_GEMM, MoeRunnerBackend.MARLIN])
def test_a_runner_that_would_not_look_at_fp8_rows_is_refused(backend: MoeRunnerBackend) -> None:
    config = SimpleNamespace(
        params_dtype=torch.bfloat16,
        layer=SimpleNamespace(is_draft=False),
        runner_backend=backend,
    )
    with pytest.raises(PathError, match=f"{backend.value} kernels do not read FP8 rows"):
        factory.dispatcher_for(Path(Movement.GATHER, Rows.FP8), config)


def test_experts_of_a_draft_get_plain_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "StandardDispatcher", lambda config: config)
    config = SimpleNamespace(
        params_dtype=torch.bfloat16,
        hidden_size=HIDDEN,
        top_k=2,
        layer=SimpleNamespace(is_draft=True),
        runner_backend=MoeRunnerBackend.TRITON,
    )
    made: Any = factory.dispatcher_for(Path(Movement.GATHER, Rows.FP8), config)
    assert made._payload.rows is Rows.PLAIN


# --- FlashInfer's CUTLASS runner with FP4 rows ---


def test_the_cutlass_runner_reads_rows_and_makes_output_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, _, came = dispatched(monkeypatch, Rows.FP4)
    empty = torch.empty(0)
    info = FlashInferCutlassMoeQuantInfo("fp4", empty, empty)
    x, scales, dtype, columns = flashinfer_cutlass._prepare_input(came, info, MoeRunnerConfig())
    assert (x.dtype, tuple(x.shape)) == (torch.uint8, (sum(GROUPS), HIDDEN // 2))
    assert scales is not None
    assert (scales.dtype, tuple(scales.shape)) == (torch.uint8, (sum(GROUPS), HIDDEN // 16))
    assert scales.is_contiguous()
    assert (dtype, columns) == (torch.bfloat16, HIDDEN)


def test_no_rows_never_reach_the_fp4_kernel() -> None:
    """On a device that is no CPU; the layer's scales, which only the kernel reads, are missing."""
    rows = torch.empty((0, HIDDEN), dtype=torch.bfloat16, device="meta")
    codes, scales = Fp4Codec(SimpleNamespace()).encode(rows)
    assert (codes.dtype, tuple(codes.shape)) == (torch.uint8, (0, HIDDEN // 2))
    assert (scales.dtype, tuple(scales.shape)) == (torch.uint8, (0, HIDDEN // 16))
    with pytest.raises(AttributeError):
        Fp4Codec(SimpleNamespace()).encode(rows.new_empty((1, HIDDEN)))


# --- how runners are found ---


def _names() -> set[str]:
    return {name for names in READERS.values() for name in names} - {TORCH, DEEP_GEMM}


@pytest.mark.parametrize("name", sorted(_names()))
def test_a_runner_that_the_plan_allows_is_found_for_our_backend(name: str) -> None:
    assert marlin.MarlinMoeQuantInfo  # registered when imported
    assert FusedOpPool._fused_funcs.get((CUSTOMIZED, name)) is None, "SGLang has it by now"
    original = FusedOpPool._fused_funcs.get(("none", name))
    found = runners_of_the_standard_one(FusedOpPool.get_fused_func)(CUSTOMIZED, name)
    assert found is not None
    assert found is original


def test_deep_gemm_takes_the_standard_dispatchers_output() -> None:
    import sglang.srt.layers.moe.moe_runner.deep_gemm

    assert sglang.srt.layers.moe.moe_runner.deep_gemm
    assert ("standard", DEEP_GEMM) in PermuteMethodPool._pre_permute_methods


# --- what else SGLang reads of a dispatcher ---


def read_of_dispatchers() -> set[str]:
    """Names in `layer.dispatcher.<name>` in SGLang's quantisation methods and expert layers."""
    import sglang.srt.layers.quantization as quantization

    package = FilePath(quantization.__file__).parent
    files = [*package.rglob("*.py"), FilePath(inspect.getfile(FusedMoE))]
    return {
        node.attr
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "dispatcher"
    }


def test_our_dispatchers_have_what_quantisation_methods_read() -> None:
    wanted = read_of_dispatchers() - {"expert_mask_gpu"}  # AITER's, on ROCm
    assert {"local_expert_mapping", "num_experts", "set_quant_config"} <= wanted
    missing = {name for name in wanted if not hasattr(gather.GatherDispatcher, name)}
    assert not missing


def test_the_mapping_of_experts_is_the_standard_dispatchers() -> None:
    standard = SimpleNamespace(num_experts=8, local_expert_mapping=None, runner_backend=None)
    ours = gather.GatherDispatcher(Payload(Rows.PLAIN, 128, 2), Fp8Codec(torch.float32), standard)
    assert ours.num_experts == 8
    assert ours.local_expert_mapping is None
    standard.local_expert_mapping = torch.arange(8)  # as its first dispatch makes it
    assert ours.local_expert_mapping is standard.local_expert_mapping


# --- symmetric memory ---


class _Pool:
    """PyTorch's rule: "beginAllocateToPool: already recording to mempool_id"."""

    def __init__(self) -> None:
        self.entered = 0
        self._inside = False

    @contextmanager
    def __call__(self, *_: Any, **__: Any) -> Iterator[None]:
        if self._inside:
            raise RuntimeError("already recording")
        self._inside = True
        self.entered += 1
        try:
            yield
        finally:
            self._inside = False


def test_sglang_combines_inside_its_context_for_symmetric_memory() -> None:
    """What the next test stands on."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(FusedMoE.forward_impl)))
    contexts = [node for node in ast.walk(tree) if isinstance(node, ast.With)]
    combines = [
        node
        for node in contexts
        if any("self.dispatcher.combine" in ast.unparse(each) for each in node.body)
    ]
    assert len(combines) == 1
    assert "use_symmetric_memory" in ast.unparse(combines[0].items[0])


@pytest.mark.parametrize("plant", [False, True])
def test_no_memory_pool_is_entered_twice(monkeypatch: pytest.MonkeyPatch, plant: bool) -> None:
    stage = Stage(Topology.parse("tp=2,dp=2"), Path(Movement.GATHER), (2, 2), monkeypatch)
    stage.patch()
    pools = [_Pool(), _Pool()]
    monkeypatch.setattr(
        gather, "use_symmetric_memory", lambda group, **_: pools[group.rank_in_group]()
    )
    scatter = gather.scatter_sums

    def in_context(outputs: torch.Tensor, counts: Any) -> torch.Tensor:
        rank = gather.get_parallel().tp_rank
        with pools[rank]():
            if not plant:
                return scatter(outputs, counts)
            with gather.use_symmetric_memory(gather.get_parallel().tp_group):
                return scatter(outputs, counts)

    monkeypatch.setattr(gather, "scatter_sums", in_context)
    if plant:
        with pytest.raises(RuntimeError, match="already recording"):
            stage.run(Model.random(4))
        return
    stage.run(Model.random(4))
    assert [pool.entered for pool in pools] == [2, 2]  # the gathered rows, and SGLang's


# --- kernels that wait for peers ---


@pytest.mark.parametrize(
    ("changes", "variable", "alone"),
    [
        ({}, "0", True),
        ({"backend": "none"}, "0", True),
        ({"backend": "deepep"}, "0", False),
        ({"pp_size": 2}, "0", False),
        ({"enable_eplb": True}, "0", False),
        ({"disaggregation_mode": "decode"}, "0", False),
        ({}, "1", False),
    ],
)
def test_nothing_waits_for_a_peer_beside_a_forward_with_ours(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], variable: str, alone: bool
) -> None:
    monkeypatch.setenv("SGLANG_NCCL_ALL_GATHER_IN_OVERLAP_SCHEDULER_SYNC_BATCH", variable)
    arguments = {
        "pp_size": 1,
        "enable_eplb": False,
        "disaggregation_mode": "null",
        "backend": CUSTOMIZED,
    }
    arguments |= changes
    backend = arguments.pop("backend")
    assert exchange._alone(SimpleNamespace(**arguments), backend) is alone


# --- copies ---


@pytest.mark.parametrize("rows", Rows)
def test_rows_of_the_published_sizes_are_copied_eight_bytes_at_a_time(rows: Rows) -> None:
    assert word_of(Payload(rows, 3072, 8)) is torch.int64


def test_words_never_cut_a_part() -> None:
    assert word_of(Payload(Rows.FP8, 128, 3)) is torch.int32
    assert word_of(Payload(Rows.FP8, 128, 3, scale_bytes=1)) is torch.uint8
