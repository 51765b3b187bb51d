"""The exchange plan, against rules that are stated here a second time, by hand and otherwise.

`RUNS`, `READS` and `GOLDEN` say what SGLang 0.5.23 does and what we take, written from its sources;
`complaints` says of any launch and plan what must not be. A planted wrong rule must raise one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from sglang_minimax import legality
from sglang_minimax.moe_exchange import backends, report, rules, rules_runner
from sglang_minimax.moe_exchange.paths import CUSTOMIZED, FORCEABLE, Movement, Rows
from sglang_minimax.moe_exchange.plan import Combine, ExchangePlan, default_of_sglang, plan_for
from sglang_minimax.support import Launch, refusals
from sglang_minimax.topology import Topology
from tests.unit.moe_launches import (
    DP2,
    DP8,
    EP8,
    FORMS,
    GPUS,
    READS,
    RUNS,
    TABLE,
    Case,
    architecture,
    case,
    example,
)

# --- what must not be ---


def complaints(each: Case) -> Iterator[str]:
    """What is wrong with the plan of a launch that is not refused, or with its refusal."""
    launch, reasons = each.launch, refusals(each.arch, each.launch)
    if not reasons:
        yield from about_plan(each, plan_for(each.arch, launch))
        return
    if launch.moe_exchange is None and launch.moe_a2a_backend == "none":
        yield from about_refusal(each)
    if any("\n" in reason or not reason.endswith(".") for reason in reasons):
        yield "not a sentence"


def about_refusal(each: Case) -> Iterator[str]:
    """A launch that asks for no path and no backend is refused for its sizes or kernels alone."""
    launch, runner = each.launch, each.launch.moe_runner_backend
    if legality.refusals(each.arch, launch) or runner != "auto":
        return
    kernels = each.gpu == "cpu" or RUNS[each.checkpoint][each.gpu] is not None
    cut = each.checkpoint == "awq" and launch.tp != launch.ep
    half = RUNS[each.checkpoint].get(each.gpu) == "flashinfer_cutlass"
    if kernels and not cut and not (half and launch.ep not in (1, launch.tp)):
        yield "refused, though SGLang runs it"


def about_plan(each: Case, plan: ExchangePlan) -> Iterator[str]:
    launch, path = each.launch, plan.path
    rows = path.rows.value
    if launch.moe_exchange is not None and path.name != launch.moe_exchange:
        yield "another path than was asked for"
    if path.is_ours:
        if rows not in READS.get(plan.runner, ()):
            yield f"{rows} rows for {plan.runner}"
        if each.checkpoint not in FORMS[rows]:
            yield f"{rows} rows for {each.checkpoint} experts"
        if each.gpu == "rocm" or launch.tp == 1 or launch.moe_a2a_backend != "none":
            yield "ours where SGLang must be left alone"
        if path.movement is Movement.ALL_TO_ALL and (each.gpu, launch.ep) != ("cpu", launch.tp):
            yield "an all-to-all on a GPU, or of parts of experts"
    by_default = launch.moe_exchange is None and launch.moe_a2a_backend == "none"
    if by_default:
        left = path.is_ours or launch.dp == 1 or each.gpu == "rocm" or plan.runner not in READS
        if not left:
            yield "no gather with attention DP"
        if launch.dp == 1 and path.name != "sglang":
            yield "something else than SGLang's without attention DP"
        if path.is_ours and path.rows is Rows.PLAIN:
            better = {form for form in ("fp8", "fp4") if each.checkpoint in FORMS[form]}
            if better & READS[plan.runner]:
                yield "more bytes than need be"
    if launch.moe_a2a_backend != "none" and path.name != launch.moe_a2a_backend:
        yield "the backend that was asked for does not run"
    yield from about_runner(each, plan)
    yield from about_combine(each, plan)
    again = plan_for(each.arch, replace(launch, moe_a2a_backend=CUSTOMIZED))
    if path.is_ours and (again.path, again.payload, again.runner) != (
        path,
        plan.payload,
        plan.runner,
    ):
        yield "a rank would work out another plan"
    yield from about_bytes(each, plan)


def about_runner(each: Case, plan: ExchangePlan) -> Iterator[str]:
    launch = each.launch
    if launch.moe_runner_backend != "auto" or launch.moe_a2a_backend != "none":
        return
    expected = "torch" if each.gpu == "cpu" else RUNS[each.checkpoint][each.gpu]
    if plan.runner != expected:
        yield f"{plan.runner} runs, not {expected}"


def about_combine(each: Case, plan: ExchangePlan) -> Iterator[str]:
    launch, combine = each.launch, plan.combine
    if plan.path.movement is Movement.GATHER and combine is not Combine.REDUCE_SCATTER:
        yield "a gather without a reduce-scatter"
    if (combine is Combine.ALL_TO_ALL) != (
        plan.path.movement in (Movement.ALL_TO_ALL, Movement.BACKEND)
    ):
        yield "an all-to-all on one side only"
    fused = (
        plan.path.name == "sglang"
        and launch.tp > launch.dp == 1
        and (each.gpu == "sm100" or (each.gpu == "sm90" and launch.nodes == 1))
        and launch.ep in (1, launch.tp)
    )
    if (combine is Combine.FUSED) != fused:
        yield f"{combine}, where fused is {fused}"


def about_bytes(each: Case, plan: ExchangePlan) -> Iterator[str]:
    """By default never more bytes than SGLang, but for ids and weights of plain rows."""
    launch = each.launch
    if launch.moe_exchange is not None or plan.path.movement is Movement.BACKEND:
        return
    topology = Topology(launch.tp, launch.dp, launch.ep, launch.pp, launch.nodes)
    sglangs = default_of_sglang(each.arch, launch)
    for _, batch in report.batches(topology):
        ours, theirs = (report.per_token(each, topology, batch) for each in (plan, sglangs))
        assert ours is not None
        assert theirs is not None
        choices = 8 * each.arch.top_k if plan.path.is_ours else 0
        if ours > theirs + choices:
            yield f"{ours} B a token, where SGLang has {theirs}"


# --- the table ---


def test_the_table() -> None:
    found = [(each, list(complaints(each))) for each in TABLE]
    assert [(each, said) for each, said in found if said] == []
    legal = [each for each in TABLE if not refusals(each.arch, each.launch)]
    assert len(legal) > 1000
    assert len(TABLE) - len(legal) > 1000
    names = {plan_for(each.arch, each.launch).path.name for each in legal}
    assert names == {*FORCEABLE, "deepep"}


# checkpoint, GPU, arguments -> path, runner, combine; or words of the refusal.
Row = tuple[str, str, dict[str, Any], tuple[str, str, str] | str]
RS, AR, FUSED, A2A, NONE = (
    *(str(each) for each in (Combine.REDUCE_SCATTER, Combine.ALL_REDUCE, Combine.FUSED)),
    *(str(each) for each in (Combine.ALL_TO_ALL, Combine.NONE)),
)
CUTLASS, ROUTED = "flashinfer_cutlass", "flashinfer_trtllm_routed"
GOLDEN: tuple[Row, ...] = (
    # Without attention DP.
    ("fp8", "sm90", {"tp": 1}, ("sglang", "triton", NONE)),
    ("fp8", "sm90", {"tp": 8}, ("sglang", "triton", FUSED)),
    ("fp8", "sm90", EP8, ("sglang", "triton", FUSED)),
    ("fp8", "sm90", {"tp": 8, "ep": 2}, ("sglang", "triton", AR)),
    ("fp8", "sm90", {**EP8, "nodes": 2}, ("sglang", "triton", AR)),
    ("nvfp4", "sm100", {**EP8, "nodes": 2}, ("sglang", ROUTED, FUSED)),
    ("nvfp4", "sm120", EP8, ("sglang", CUTLASS, AR)),
    ("bf16", "rocm", {"tp": 8}, ("sglang", "triton", AR)),
    ("fp8", "sm90", {**EP8, "no_allreduce_fusion": True}, ("sglang", "triton", AR)),
    # With it.
    ("fp8", "sm90", DP8, ("gather-fp8", "triton", RS)),
    ("fp8", "sm90", DP2, ("gather-fp8", "triton", RS)),
    ("fp8", "sm120", {"tp": 8, "dp": 8}, ("gather-fp8", "triton", RS)),
    ("fp8", "cpu", DP2, ("gather-fp8", "torch", RS)),
    ("fp8", "rocm", DP8, ("sglang", "triton", RS)),
    ("fp8", "sm90", {**DP8, "moe_runner_backend": "deep_gemm"}, ("gather", "deep_gemm", RS)),
    (
        *("fp8", "sm100", {**DP8, "moe_runner_backend": "flashinfer_trtllm"}),
        ("gather", "flashinfer_trtllm", RS),
    ),
    ("fp8-tensor", "sm90", DP8, ("gather", "triton", RS)),
    ("fp8-narrow", "sm90", DP8, ("gather", "triton", RS)),
    ("ct-channel", "sm90", DP8, ("gather", "triton", RS)),
    ("bf16", "sm80", DP8, ("gather", "triton", RS)),
    ("bf16", "cpu", DP8, ("gather", "torch", RS)),
    ("bf16", "sm90", {**DP8, "quantization": "fp8"}, ("gather", "triton", RS)),
    ("awq", "sm90", DP8, ("gather", "marlin", RS)),
    ("nvfp4", "sm90", DP8, ("gather", "marlin", RS)),
    ("nvfp4", "sm100", DP2, ("gather-fp4", ROUTED, RS)),
    ("nvfp4", "sm120", DP2, ("gather-fp4", CUTLASS, RS)),
    ("nvfp4", "sm100", {**DP8, "moe_runner_backend": CUTLASS}, ("gather-fp4", CUTLASS, RS)),
    ("nvfp4-w4a16", "sm100", DP8, ("gather", ROUTED, RS)),
    ("nvfp4", "cpu", DP2, ("gather-fp4", "torch", RS)),
    (
        *("nvfp4", "sm100", {**DP8, "moe_runner_backend": "flashinfer_trtllm"}),
        ("gather-fp4", "flashinfer_trtllm", RS),
    ),
    ("nvfp4", "sm100", {**DP8, "fp4_by_token": True}, ("gather", ROUTED, RS)),
    ("fp8", "sm90", {**DP8, "moe_runner_backend": "hpc_ops"}, ("sglang", "hpc_ops", RS)),
    (
        *("nvfp4", "sm100", {**DP8, "moe_runner_backend": "flashinfer_cutedsl"}),
        ("sglang", "flashinfer_cutedsl", RS),
    ),
    # What SGLang's methods make of a runner that they do not have.
    ("bf16", "sm90", {**DP8, "moe_runner_backend": "marlin"}, ("gather", "triton", RS)),
    ("awq", "sm90", {**DP8, "moe_runner_backend": "triton"}, ("gather", "marlin", RS)),
    # What keeps SGLang's own.
    ("fp8", "sm90", {**DP8, "enable_lora": True}, ("sglang", "triton", RS)),
    ("fp8", "sm90", {**DP8, "enable_return_routed_experts": True}, ("sglang", "triton", RS)),
    ("fp8", "sm90", {**DP8, "needs_sglang": ("--dwdp-size 8",)}, ("sglang", "triton", RS)),
    ("fp8", "sm90", {**DP8, "speculative_algorithm": "DSPARK"}, ("sglang", "triton", RS)),
    ("fp8", "sm90", {**DP8, "speculative_algorithm": "EAGLE3"}, ("gather-fp8", "triton", RS)),
    (
        *("fp8", "sm90", {"tp": 8, "dp": 2, "ep": 4, "attention_cp": 2, "moe_dp": 2}),
        ("sglang", "triton", RS),
    ),
    # What was asked for.
    ("fp8", "sm90", {**DP8, "moe_exchange": "sglang"}, ("sglang", "triton", RS)),
    ("fp8", "sm90", {**EP8, "moe_exchange": "gather-fp8"}, ("gather-fp8", "triton", RS)),
    ("fp8", "cpu", {**EP8, "moe_exchange": "all-to-all-fp8"}, ("all-to-all-fp8", "torch", A2A)),
    ("fp8", "sm90", {**EP8, "moe_a2a_backend": "deepep"}, ("deepep", "deep_gemm", A2A)),
    ("fp8", "sm90", {"tp": 8, "moe_a2a_backend": "deepep"}, ("deepep", "deep_gemm", A2A)),
    # What cannot be.
    (
        *("fp8", "sm90", {**DP8, "moe_exchange": "gather-fp4"}),
        "128x128 blocks; use SGLANG_MINIMAX_MOE=gather-fp8, or use SGLANG_MINIMAX_MOE=gather.",
    ),
    (
        *("nvfp4", "sm100", {**DP8, "fp4_by_token": True, "moe_exchange": "gather-fp4"}),
        "PER_TOKEN_ACTIVATION scales each row by itself",
    ),
    ("fp8-tensor", "sm100", {**DP8, "moe_runner_backend": ROUTED}, "which means triton here"),
    ("ct-channel", "sm100", {**DP8, "moe_runner_backend": "flashinfer_trtllm"}, "means triton"),
    ("fp8-tensor", "sm90", {"tp": 8, "moe_runner_backend": "cutlass"}, "has no kernels for FP8"),
    ("bf16", "sm90", {**EP8, "moe_runner_backend": "hpc_ops"}, "has no kernels for BF16"),
    ("bf16", "sm80", {**EP8, "moe_runner_backend": CUTLASS}, "no kernels for compute capability 8"),
    ("fp8", "sm90", {**EP8, "moe_runner_backend": "aiter"}, "has no kernels for cuda"),
    ("fp8", "rocm", {**EP8, "moe_runner_backend": "deep_gemm"}, "has no kernels for rocm"),
    ("nvfp4-w4a16", "sm120", {**DP8, "moe_exchange": "gather-fp4"}, "without one"),
    ("fp8-narrow", "sm90", {**DP8, "moe_exchange": "gather-fp8"}, "hidden size 3136"),
    (
        *("fp8", "sm90", {**DP8, "moe_runner_backend": "deep_gemm", "moe_exchange": "gather-fp8"}),
        "use --moe-runner-backend triton, or use SGLANG_MINIMAX_MOE=gather.",
    ),
    ("nvfp4", "sm90", {**DP8, "moe_exchange": "gather-fp4"}, "the marlin kernels cannot take FP4"),
    ("fp8", "cpu", {"tp": 8, "ep": 4, "moe_exchange": "all-to-all"}, "use --ep-size 8"),
    ("fp8", "sm90", {**EP8, "moe_exchange": "all-to-all"}, "use SGLANG_MINIMAX_MOE=gather"),
    ("fp8", "sm90", {**EP8, "moe_exchange": "gather-fp9"}, "gather-fp9 names no path"),
    (
        *("fp8", "sm90", {**EP8, "moe_exchange": "gather", "moe_a2a_backend": "deepep"}),
        "start without --moe-a2a-backend deepep",
    ),
    ("fp8", "rocm", {**DP8, "moe_exchange": "gather"}, "not on rocm; unset SGLANG_MINIMAX_MOE."),
    ("fp8", "sm90", {"tp": 1, "moe_exchange": "gather"}, "nothing to exchange"),
    ("fp8", "sm90", {**DP8, "moe_runner_backend": CUTLASS}, "auto, which means triton here"),
    ("nvfp4", "sm120", {"tp": 8, "ep": 4}, "use --ep-size 8"),
    ("nvfp4", "sm90", {**EP8, "moe_runner_backend": CUTLASS}, "capability 9.0"),
    ("fp8", "sm90", {**EP8, "moe_runner_backend": "cutlass"}, "all ranks have all of them"),
)


def mismatch(row: Row) -> str | None:
    """How a launch differs from its row, None where it does not."""
    checkpoint, gpu, arguments, expected = row
    each = case(checkpoint, gpu, **arguments)
    reasons = refusals(each.arch, each.launch)
    if isinstance(expected, str):
        fits = len(reasons) == 1 and expected in reasons[0]
        return None if fits else f"refused with {reasons}"
    if reasons:
        return f"refused with {reasons}"
    plan = plan_for(each.arch, each.launch)
    assert all((plan.why, plan.runner_why, plan.combine_why))
    found = plan.path.name, plan.runner, str(plan.combine)
    return None if found == expected else f"{found}"


@pytest.mark.parametrize("row", GOLDEN, ids=str)
def test_golden(row: Row) -> None:
    assert mismatch(row) is None


def test_int4_experts_of_compressed_tensors_run_what_sglang_would_choose() -> None:
    """By GPU, runner and group: CompressedTensorsConfig.get_moe_scheme."""

    def said(words: str, gpu: str, runner: str) -> str:
        arch = architecture(example(f"`compressed-tensors`, `pack-quantized`, {words}"))
        launch = Launch(
            **DP8, **GPUS[gpu], quantization=arch.recipe.method, moe_runner_backend=runner
        )
        return "refused" if refusals(arch, launch) else plan_for(arch, launch).runner

    assert said("group", "sm90", "auto") == "marlin"
    assert said("group", "sm90", "triton") == "triton"
    assert said("group", "sm100", "auto") == "triton"
    assert said("group", "sm100", "marlin") == "marlin"
    assert said("channel", "sm100", "auto") == "marlin"
    assert said("channel", "sm90", "triton") == "refused"
    assert said("`actorder: group`", "sm90", "triton") == "refused"


# --- wrong rules ---


def _more_readers(rows: Rows, runner: str) -> dict[Rows, tuple[str, ...]]:
    return {**rules_runner.READERS, rows: (*rules_runner.READERS[rows], runner)}


def _none(*_: Any) -> Iterator[Any]:
    return iter(())


CHOOSE, RUNNER_OF = rules.choose, rules_runner.runner_of
# Wrong rule -> (module, name, value) of what is planted.
WRONG: dict[str, tuple[Any, str, Any]] = {
    "DeepGEMM reads FP8 rows": (rules_runner, "READERS", _more_readers(Rows.FP8, "deep_gemm")),
    "Marlin reads FP4 rows": (rules_runner, "READERS", _more_readers(Rows.FP4, "marlin")),
    "HPC-Ops takes rows that nobody has tried": (
        *(rules_runner, "READERS"),
        _more_readers(Rows.PLAIN, "hpc_ops"),
    ),
    "weights laid out by the backend do not matter": (
        *(rules_runner, "READERS"),
        _more_readers(Rows.PLAIN, "flashinfer_cutedsl"),
    ),
    "FP8 of any kind for kernels of blocks": (rules_runner, "_FP8_BLOCKS_ONLY", ()),
    "any GPU for any kernel": (rules_runner, "_runs_on", lambda *_: True),
    "any family for any kernel": (rules_runner, "_ASSERTED", {}),
    "FP8 of any kind has groups": (
        *(rules_runner, "has_fp8_blocks"),
        lambda arch: arch.recipe.method == "fp8",
    ),
    "NVFP4 weights are enough for FP4 rows": (
        *(rules_runner, "has_fp4_inputs"),
        lambda arch: arch.recipe.name == "nvfp4",
    ),
    "hidden sizes in halves of a group": (rules, "FP8_GROUP", 64),
    "ours on any hardware": (rules, "_place", _none),
    "ours with everything": (rules, "_features", _none),
    "all-to-all anywhere": (rules, "_all_to_all", _none),
    "rows of any form": (rules, "_rows", _none),
    "ours beside DeepEP": (rules, "FREE", ("none", CUSTOMIZED, "deepep")),
    "a rank takes our backend for another": (rules, "FREE", ("none",)),
    "ours without attention DP": (
        *(rules, "choose"),
        lambda arch, launch: CHOOSE(arch, replace(launch, dp=max(launch.dp, 2))),
    ),
    "never ours": (
        *(rules, "choose"),
        lambda arch, launch: CHOOSE(arch, replace(launch, dp=1)),
    ),
    "what was asked for is forgotten": (
        *(rules, "choose"),
        lambda arch, launch: CHOOSE(arch, replace(launch, moe_exchange=None)),
    ),
    "one runner for all": (
        *(rules_runner, "runner_of"),
        lambda arch, launch: rules_runner.Runner("triton", "always"),
    ),
    "the runner that was asked for, whatever the format": (
        *(rules_runner, "runner_of"),
        lambda arch, launch: RUNNER_OF(arch, launch)._replace(
            name=RUNNER_OF(arch, launch).name
            if launch.moe_runner_backend == "auto"
            else launch.moe_runner_backend
        ),
    ),
    "DeepEP feeds the triton kernels": (rules_runner, "_DEEP_GEMM_FOR_FP8", ()),
    "runners are not refused": (rules_runner, "_against", lambda arch, launch: None),
    "always fused": (backends, "fusion_after_experts", lambda launch: (True, "always")),
    "never fused": (backends, "fusion_after_experts", lambda launch: (False, "never")),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_rule_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*WRONG[wrong])

    def passes(each: Case) -> bool:
        try:
            return not any(complaints(each))
        except ValueError:  # no payload of such a form
            return False

    assert not (all(map(passes, TABLE[::5])) and all(mismatch(row) is None for row in GOLDEN))
