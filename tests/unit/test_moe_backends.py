"""What SGLang's own communication is refused for, that remedies work, and when sums are fused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from sglang_minimax.config import Architecture
from sglang_minimax.moe_exchange import backends, supported
from sglang_minimax.moe_exchange.backends import fusion, fusion_after_experts, refusals
from sglang_minimax.moe_exchange.supported import SUPPORTED, Facts
from sglang_minimax.support import Launch


def arch(quantization: dict | None = None, **more) -> Architecture:
    given = {"quantization_config": quantization} if quantization else {}
    return Architecture.from_config({"head_dim": 128, **given, **more})


FP8 = arch({"quant_method": "fp8", "weight_block_size": [128, 128]})
FP8_TENSORS = arch({"quant_method": "fp8", "activation_scheme": "dynamic"})
BF16 = arch()
AWQ = arch({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True})
NVFP4 = arch({"quant_method": "modelopt", "quant_algo": "NVFP4"})
NARROW = arch({"quant_method": "fp8", "weight_block_size": [128, 128]}, hidden_size=1536)

HOPPER = {"hardware": "cuda", "capability": 90, "tp": 8, "ep": 8}
BLACKWELL = {**HOPPER, "capability": 100}
GROUPS = {**HOPPER, "dp": 8}
#: What the wheel has that SGLang 0.5.23 asks for, and what other builds have.
WHEEL = frozenset({2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192})
OTHER_WHEEL = WHEEL - {3072}
SLOTS = {"deepep": 128, "mooncake": 128, "nixl": 128}
HERE = Facts(low_latency_sizes=WHEEL, deep_gemm=None, bf16=True, slots=SLOTS)


def said(model: Architecture, facts: Facts = HERE, **arguments) -> list[str]:
    return list(refusals(model, Launch(**arguments), facts))


ACCEPTED = [
    (FP8, {**HOPPER, "moe_a2a_backend": "none"}),
    (AWQ, {**HOPPER, "moe_a2a_backend": "customized"}),
    (FP8, {**HOPPER, "moe_a2a_backend": "deepep"}),
    (FP8, {**GROUPS, "moe_a2a_backend": "deepep", "decode_graph_rows": 128}),
    (FP8_TENSORS, {**HOPPER, "moe_a2a_backend": "deepep", "deepep_mode": "normal"}),
    (BF16, {**HOPPER, "moe_a2a_backend": "deepep", "moe_runner_backend": "deep_gemm"}),
    (BF16, {**HOPPER, "moe_a2a_backend": "deepep", "quantization": "fp8"}),
    (NVFP4, {**BLACKWELL, "moe_a2a_backend": "deepep", "moe_runner_backend": "flashinfer_cutedsl"}),
    (FP8, {**HOPPER, "moe_a2a_backend": "deepep_v2"}),
    (BF16, {**HOPPER, "moe_a2a_backend": "deepep_v2"}),
    (FP8, {**HOPPER, "moe_a2a_backend": "mooncake", "deepep_mode": "low_latency"}),
    (FP8, {**HOPPER, "moe_a2a_backend": "nixl", "deepep_mode": "low_latency"}),
    (FP8, {**GROUPS, "moe_a2a_backend": "pplx"}),
    (FP8, {**GROUPS, "moe_a2a_backend": "flashinfer", "moe_runner_backend": "deep_gemm"}),
    (AWQ, {**HOPPER, "moe_a2a_backend": "deepep", "hardware": "ascend"}),
    (AWQ, {**HOPPER, "moe_a2a_backend": "deepep", "hardware": "cpu"}),
    (FP8, {**HOPPER, "moe_a2a_backend": "mori", "hardware": "rocm", "capability": None}),
]


@pytest.mark.parametrize(("model", "arguments"), ACCEPTED, ids=str)
def test_accepted(model, arguments):
    assert said(model, **arguments) == []


# (model, facts, launch, words of the sentence, what is changed for its remedy)
REFUSED = [
    (AWQ, HERE, {"moe_a2a_backend": "deepep"}, "AWQ in groups of 128", {"moe_a2a_backend": "none"}),
    (NVFP4, HERE, {"moe_a2a_backend": "deepep"}, "10.x", {"moe_a2a_backend": "none"}),
    (
        FP8,
        HERE,
        {"moe_a2a_backend": "deepep", "moe_runner_backend": "triton"},
        "--moe-runner-backend deep_gemm",
        {"moe_runner_backend": "deep_gemm"},
    ),
    (
        BF16,
        HERE,
        {"moe_a2a_backend": "deepep"},
        "unquantised experts",
        {"moe_runner_backend": "deep_gemm"},
    ),
    (
        BF16,
        HERE,
        {"moe_a2a_backend": "mooncake", "deepep_mode": "low_latency"},
        "FP8",
        {"moe_a2a_backend": "none"},
    ),
    (
        FP8,
        HERE,
        {"moe_a2a_backend": "mooncake"},
        "--deepep-mode low_latency",
        {"deepep_mode": "low_latency"},
    ),
    (
        FP8_TENSORS,
        HERE,
        {"moe_a2a_backend": "deepep_v2"},
        "FP8 in 128x128 blocks",
        {"moe_a2a_backend": "deepep"},
    ),
    (
        FP8,
        HERE,
        {"moe_a2a_backend": "deepep_v2", "moe_runner_backend": "triton"},
        "deep_gemm",
        {"moe_runner_backend": "auto"},
    ),
    (FP8, HERE, {"moe_a2a_backend": "megamoe"}, "other models", {"moe_a2a_backend": "none"}),
    (
        NVFP4,
        HERE,
        {"moe_a2a_backend": "flashinfer_megamoe", "capability": 100},
        "other models",
        {"moe_a2a_backend": "none"},
    ),
    (FP8, HERE, {"moe_a2a_backend": "mori"}, "rocm", {"moe_a2a_backend": "none"}),
    (FP8, HERE, {"moe_a2a_backend": "ascend_fuseep"}, "ascend", {"moe_a2a_backend": "none"}),
    (
        FP8,
        replace(HERE, low_latency_sizes=OTHER_WHEEL),
        {"moe_a2a_backend": "deepep"},
        "not for 3072; use --deepep-mode normal",
        {"deepep_mode": "normal"},
    ),
    (
        NARROW,
        HERE,
        {"moe_a2a_backend": "deepep"},
        "not for 1536",
        {"deepep_mode": "normal"},
    ),
    (
        FP8,
        replace(HERE, missing=frozenset({"deepep"})),
        {"moe_a2a_backend": "deepep"},
        "package deep_ep",
        {"moe_a2a_backend": "none"},
    ),
    (
        FP8,
        replace(HERE, deep_gemm=False),
        {"moe_a2a_backend": "deepep"},
        "needs DeepGEMM",
        {"moe_a2a_backend": "none"},
    ),
    (
        FP8,
        replace(HERE, bf16=False),
        {"moe_a2a_backend": "deepep"},
        "--dtype bfloat16",
        {"moe_a2a_backend": "none"},
    ),
    (
        FP8,
        HERE,
        {"moe_a2a_backend": "deepep", "deepep_dispatcher_output_dtype": "bf16"},
        "use fp8",
        {"deepep_dispatcher_output_dtype": "fp8"},
    ),
    (
        FP8,
        replace(HERE, slots={"deepep": 2048}),
        {"moe_a2a_backend": "deepep"},
        "at most 1024",
        {"moe_a2a_backend": "none"},
    ),
    (
        FP8,
        HERE,
        {"moe_a2a_backend": "deepep", "dp": 8, "decode_graph_rows": 256},
        "256 rows from each rank",
        {"decode_graph_rows": 128},
    ),
    (
        FP8,
        HERE,
        {"moe_a2a_backend": "deepep", "deepep_mode": "low_latency", "chunked_prefill_size": 8192},
        "1024 rows from each rank through buffers of 128; use --chunked-prefill-size 1024",
        {"chunked_prefill_size": 1024},
    ),
    (
        FP8,
        HERE,
        {"moe_a2a_backend": "nixl", "deepep_mode": "low_latency", "chunked_prefill_size": -1},
        "any number of rows",
        {"chunked_prefill_size": 1024},
    ),
    (
        FP8,
        HERE,
        {"moe_a2a_backend": "flashinfer", "moe_runner_backend": "deep_gemm", "dp": 4},
        "--attn-dp-size 8",
        {"dp": 8},
    ),
    (
        FP8,
        HERE,
        {"moe_a2a_backend": "flashinfer", "dp": 8},
        "the triton kernels do not read; use --moe-runner-backend deep_gemm",
        {"moe_runner_backend": "deep_gemm"},
    ),
    (FP8, HERE, {"moe_a2a_backend": "pplx"}, "--attn-dp-size 8", {"dp": 8}),
    (FP8, HERE, {"moe_a2a_backend": "pplx", "dp": 8, "pp": 2}, "--pp-size 1", {"pp": 1}),
]


@pytest.mark.parametrize(("model", "facts", "arguments", "words", "remedy"), REFUSED, ids=str)
def test_refused_in_one_sentence_whose_remedy_works(model, facts, arguments, words, remedy):
    launch = {**HOPPER, **arguments}
    (sentence,) = said(model, facts, **launch)
    assert words in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert not re.search(r"[.?!;] *[.?!;]", sentence)
    assert said(model, facts, **{**launch, **remedy}) == []


def test_slots_of_a_variable_are_proposed_where_there_can_be_so_many():
    few, many = (
        said(FP8, **{**GROUPS, "moe_a2a_backend": "deepep", "decode_graph_rows": rows})
        for rows in (1024, 1025)
    )
    assert "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK=1024" in few[0]
    assert "SGLANG_DEEPEP_NUM_MAX" not in many[0]
    enough = replace(HERE, slots={"deepep": 1024})
    launch = {**GROUPS, "moe_a2a_backend": "deepep", "decode_graph_rows": 1024}
    assert said(FP8, enough, **launch) == []


def test_requests_of_a_graph_may_have_several_rows_each():
    """Speculation verifies draft tokens; what is proposed counts requests again."""
    launch = {**GROUPS, "moe_a2a_backend": "deepep", "decode_graph_rows": 64 * 4}
    (sentence,) = said(FP8, **{**launch, "rows_a_request": 4})
    assert "sends 256 rows" in sentence
    assert "use --cuda-graph-max-bs-decode 32, or" in sentence
    assert said(FP8, **{**launch, "decode_graph_rows": 32 * 4, "rows_a_request": 4}) == []


def test_groups_are_said_together_with_the_runner():
    """A remedy for one of them alone would only lead to the other sentence."""
    launch = {**HOPPER, "moe_a2a_backend": "flashinfer"}
    sentences = said(FP8, **launch)
    assert [
        word in said
        for word, said in zip(("deep_gemm", "--attn-dp-size 8"), sentences, strict=True)
    ] == [
        True,
        True,
    ]
    assert said(FP8, **{**launch, "moe_runner_backend": "deep_gemm", "dp": 8}) == []


def test_an_unknown_backend_is_named_as_such():
    (sentence,) = said(FP8, **{**HOPPER, "moe_a2a_backend": "deepep2"})
    assert sentence.startswith("SGLang has no --moe-a2a-backend deepep2; use deepep, deepep_v2, ")


def test_a_runner_without_its_package_is_refused():
    absent = replace(HERE, deep_gemm=False)
    (sentence,) = said(FP8, absent, **{**HOPPER, "moe_runner_backend": "deep_gemm"})
    assert "needs DeepGEMM" in sentence
    assert said(FP8, absent, **{**HOPPER, "moe_runner_backend": "auto"}) == []
    assert said(FP8, **{**HOPPER, "moe_runner_backend": "deep_gemm"}) == []
    # It does nothing for AWQ, which runs Marlin.
    assert said(AWQ, absent, **{**HOPPER, "moe_runner_backend": "deep_gemm"}) == []


def test_rows_are_counted_after_attention_tp_has_cut_them():
    launch = {**HOPPER, "moe_a2a_backend": "deepep", "decode_graph_rows": 1024}
    assert said(FP8, **launch) == []
    assert said(FP8, **{**launch, "dp": 2, "decode_graph_rows": 1024})


def test_what_does_not_run_there_is_not_counted():
    launch = {**GROUPS, "moe_a2a_backend": "deepep", "decode_graph_rows": 1024}
    assert said(FP8, **{**launch, "disaggregation_mode": "prefill"}) == []
    assert said(FP8, **{**launch, "deepep_mode": "normal"}) == []
    launch = {**GROUPS, "moe_a2a_backend": "deepep", "deepep_mode": "low_latency"}
    assert said(FP8, **{**launch, "chunked_prefill_size": 8192})
    assert (
        said(FP8, **{**launch, "chunked_prefill_size": 8192, "disaggregation_mode": "decode"}) == []
    )


def test_nothing_is_refused_for_what_is_not_known():
    for model, arguments in ACCEPTED:
        assert list(refusals(model, Launch(**arguments))) == []
        assert said(model, Facts(), **{**arguments, "capability": None}) == []


WRONG_WAYS: list[Callable[[pytest.MonkeyPatch], None]] = [
    lambda patch: patch.setattr(backends, "SUPPORTED", SUPPORTED[1:]),
    lambda patch: patch.setattr(
        backends,
        "SUPPORTED",
        tuple(way._replace(formats=(*way.formats, "plain")) for way in SUPPORTED),
    ),
    lambda patch: patch.setattr(
        backends, "SUPPORTED", tuple(way._replace(modes=()) for way in SUPPORTED)
    ),
    lambda patch: patch.setattr(
        backends,
        "SUPPORTED",
        tuple(way._replace(runners=("triton", *way.runners)) for way in SUPPORTED),
    ),
    lambda patch: patch.setattr(backends, "MOST_SLOTS", 4096),
    lambda patch: patch.setattr(backends, "kind_of", lambda *_: supported.FP8_BLOCKS),
]


@pytest.mark.parametrize("wrong", WRONG_WAYS)
def test_a_wrong_table_is_noticed(wrong, monkeypatch):
    wrong(monkeypatch)
    accepted = all(said(model, **arguments) == [] for model, arguments in ACCEPTED)
    refused = all(
        [words in sentence for sentence in said(model, facts, **{**HOPPER, **arguments})] == [True]
        for model, facts, arguments, words, _ in REFUSED
    )
    assert not (accepted and refused)


def test_every_way_has_a_package_or_needs_none_and_names_what_sglang_has():
    for way in SUPPORTED:
        assert way.backend in supported.PACKAGES
        assert set(way.formats) <= set(supported.TITLES)
        assert set(way.modes) <= {"auto", "normal", "low_latency"}
        assert way.source.startswith(("layers/", "arg_groups/"))


# --- the fused all-reduce ---


def test_fused_without_attention_dp_on_hopper_and_blackwell():
    for capability in (90, 100, 103):
        launch = Launch(**{**HOPPER, "capability": capability})
        assert fusion(launch) == (True, "after attention and after the experts")
        assert fusion_after_experts(launch)[0]


APART = [
    {"tp": 1, "ep": 1},
    {"dp": 2},
    {"nodes": 2},
    {"capability": 89},
    {"capability": 120},
    {"capability": None},
    {"hardware": "rocm"},
    {"hardware": "cpu"},
    {"hardware": None},
    {"moe_a2a_backend": "deepep"},
    {"moe_a2a_backend": "customized"},
    {"moe_exchange": "gather"},
    {"no_allreduce_fusion": True},
    {"no_allreduce_fusion": True, "allreduce_fusion": "auto"},
    {"dp": 2, "allreduce_fusion": "auto"},
]


@pytest.mark.parametrize("arguments", APART, ids=str)
def test_apart(arguments):
    fused, why = fusion(Launch(**{**HOPPER, **arguments}))
    assert not fused
    assert why


def test_blackwell_reaches_over_nodes():
    assert fusion(Launch(**{**BLACKWELL, "nodes": 2}))[0]


@pytest.mark.parametrize(
    "arguments", [{"ep": 2}, {"attention_cp": 2}, {"moe_dp": 2, "ep": 4, "attention_cp": 2}]
)
def test_only_after_attention(arguments):
    launch = Launch(**{**HOPPER, **arguments})
    fused, why = fusion(launch)
    assert fused
    assert why.startswith("after attention; ")
    assert not fusion_after_experts(launch)[0]


def test_what_the_user_named_is_said():
    _, why = fusion(Launch(**{**HOPPER, "allreduce_fusion": "trtllm"}))
    assert "--flashinfer-allreduce-fusion-backend trtllm" in why


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"capability": 89, "allreduce_fusion": "auto"}, "9.x or 10.x"),
        ({"hardware": "rocm", "allreduce_fusion": "trtllm"}, "9.x or 10.x"),
        ({"capability": 100, "allreduce_fusion": "cutedsl"}, "use auto"),
        ({"nodes": 2, "allreduce_fusion": "auto"}, "--nnodes 2; start without"),
        ({"nodes": 2, "allreduce_fusion": "mnnvl"}, "--nnodes 2; start without"),
        ({"nodes": 2, "capability": 100, "allreduce_fusion": "trtllm"}, "use mnnvl"),
    ],
)
def test_a_fusion_that_would_die_after_loading_is_refused(arguments, words):
    (sentence,) = said(FP8, **{**HOPPER, **arguments})
    assert words in sentence
    assert sentence.endswith(".")


@pytest.mark.parametrize("asked", ["auto", "trtllm", "mnnvl"])
def test_a_fusion_that_runs_is_not(asked):
    assert said(FP8, **{**HOPPER, "allreduce_fusion": asked}) == []
    off = {"capability": 89, "allreduce_fusion": asked, "no_allreduce_fusion": True}
    assert said(FP8, **{**HOPPER, **off}) == []
