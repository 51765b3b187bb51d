"""What is refused at launch, and that the remedy in each sentence is accepted."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch

from sglang_minimax.config import Architecture
from sglang_minimax.legality import OPTIONS, REDUNDANT
from sglang_minimax.loading.formats.base import Kernel, Names
from sglang_minimax.loading.formats.fp8 import blocks
from sglang_minimax.moe_exchange.supported import Facts
from sglang_minimax.support import Launch, notes, refusals

FP8 = Architecture.from_config(
    {
        "head_dim": 128,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
)
BF16 = Architecture.from_config({"head_dim": 128})


def only(arch: Architecture, **arguments) -> str:
    (sentence,) = refusals(arch, Launch(**arguments))
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


ACCEPTED = [
    {},
    {"tp": 4},
    {"tp": 8, "ep": 8},
    {"tp": 8, "ep": 2},
    {"tp": 8, "dp": 8, "ep": 8},
    {"tp": 16, "ep": 16},
    {"tp": 16, "dp": 4, "ep": 16},
    {"tp": 4, "pp": 62},
    {"tp": 4, "speculative_algorithm": "EAGLE3"},
    {"tp": 4, "quantization": "fp8"},
    {"tp": 16, "attention_cp": 2, "ep": 16},
    {"tp": 8, "ep": 8, "ep_redundant": 32, "moe_a2a_backend": "deepep"},
]


@pytest.mark.parametrize("arguments", ACCEPTED, ids=str)
def test_accepted(arguments):
    assert refusals(FP8, Launch(**arguments)) == []


def test_bf16_has_no_blocks_to_cut():
    assert refusals(BF16, Launch(tp=8)) == []
    assert refusals(BF16, Launch(tp=16)) == []


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16, 24, 48])
def test_blocks_of_an_expert_are_dealt_to_any_number_of_ranks(tp):
    """Eight ranks would cut 192 of 1536 rows each; 24 have more ranks than the 12 blocks."""
    assert refusals(FP8, Launch(tp=tp)) == []


def test_plain_experts_beside_fp8_attention_have_no_blocks_to_deal():
    experts = "model.layers.0.block_sparse_moe.experts"
    plain = replace(FP8.recipe, plain=Names((experts,)))
    arch = replace(FP8, recipe=plain, expert_width=1000)
    assert "expert width 1000 is not divisible over 16 ranks" in only(arch, tp=16)
    assert refusals(replace(arch, recipe=FP8.recipe), Launch(tp=16)) == []


def test_illegal_attention_sizes_name_the_nearest_and_the_data_parallel_way():
    sentence = only(BF16, tp=12)
    assert sentence.endswith("; use --attn-dp-size 3, or --tp-size 8 or 16.")
    assert refusals(BF16, Launch(tp=12, dp=3)) == []


def test_data_parallel_attention_changes_the_size_that_counts():
    # 32 ranks cannot share 48 heads, 32 / 2 can.
    assert "32" in only(BF16, tp=32, ep=32)
    assert refusals(BF16, Launch(tp=32, ep=32, dp=2)) == []
    assert only(BF16, tp=8, dp=3) == (
        "--attn-dp-size 3 does not divide --tp-size 8; "
        "use --attn-dp-size 2 or 4, or --tp-size 6 or 12."
    )


def test_experts_that_do_not_divide():
    assert "--ep-size 4" in only(BF16, tp=12, dp=12, ep=5)
    sentence = only(BF16, tp=24, ep=24)
    assert "24 does not divide 256 experts" in sentence
    # 16 divides the experts, but not the ranks.
    assert sentence.endswith("; use --ep-size 8, or --ep-num-redundant-experts 8.")
    assert refusals(BF16, Launch(tp=24, ep=24, ep_redundant=8)) == []
    assert refusals(BF16, Launch(tp=24, ep=8)) == []


def test_expert_width_that_does_not_divide():
    wide = replace(BF16, expert_width=1000)
    assert only(wide, tp=16) == (
        "expert width 1000 is not divisible over 16 ranks; "
        "use --ep-size 2, or --tp-size 8, or --ep-size 16 for whole experts."
    )


def test_a_kv_head_smaller_than_a_block_needs_another_checkpoint():
    """On one rank, too: k lies under q and above v, and a block would cover both."""
    assert only(replace(FP8, head_dim=32, num_heads=4, num_kv_heads=1)).endswith(
        "use a BF16 checkpoint."
    )


def test_small_heads_may_cut_a_block():
    small = replace(FP8, head_dim=32, num_heads=16, num_kv_heads=4)
    assert refusals(small, Launch()) == []
    assert only(small, tp=2).startswith(
        "attention-TP size 2 leaves 64 rows of k_proj a rank, which cuts a block of 128 (FP8 in "
        "128x128 blocks); use "
    )
    attention = Names(tuple(f"self_attn.{part}_proj" for part in "qkvo"))
    assert refusals(replace(small, recipe=replace(FP8.recipe, plain=attention)), Launch(tp=2)) == []


@pytest.mark.parametrize(
    ("block", "heads", "said"),
    [
        ((192, 32), (8, 8), "128 rows of q_proj"),
        ((128, 32), (16, 4), "64 rows of k_proj"),
        ((32, 192), (8, 4), "128 columns of o_proj"),
    ],
)
def test_each_projection_of_attention_keeps_its_blocks_whole(block, heads, said):
    recipe = replace(FP8.recipe, quantised=blocks(*block))
    arch = replace(FP8, recipe=recipe, head_dim=32, num_heads=heads[0], num_kv_heads=heads[1])
    assert f"leaves {said} a rank, which cuts a block of {max(block)}" in only(arch, tp=2)


def test_columns_on_a_single_rank_may_end_in_a_part_of_a_block():
    recipe = replace(FP8.recipe, quantised=blocks(32, 192))
    arch = replace(FP8, recipe=recipe, head_dim=32, num_heads=8, num_kv_heads=4)
    assert refusals(arch, Launch(tp=1)) == []


def test_pipeline():
    assert "--pp-size 62 or less" in only(BF16, pp=63)
    for algorithm in ("EAGLE3", "DFLASH"):
        assert "--pp-size 1" in only(BF16, pp=2, speculative_algorithm=algorithm)
    assert refusals(BF16, Launch(pp=2)) == []


def test_no_more_tokens_than_a_tree_drafts():
    """By SGLang's own choice of the best: one more token is one that torch.topk does not find."""
    from sglang.srt.speculative.eagle_utils import organize_draft_results as organize

    def chosen(steps: int, topk: int, tokens: int) -> bool:
        scores = [torch.rand(1, 1 if step == 0 else topk, topk) for step in range(steps)]
        parents = [torch.zeros(1, topk, dtype=torch.long)] * steps
        flat = [each.flatten(1).long() for each in scores]
        try:
            organize(scores, flat, parents, tokens)
        except RuntimeError:
            return False
        return True

    for steps, topk in ((1, 2), (2, 2), (3, 4)):
        most = 1 + topk + (steps - 1) * topk**2
        assert chosen(steps, topk, most)
        assert not chosen(steps, topk, most + 1)
        launch = Launch(speculative_algorithm="EAGLE3", speculative_tree=(steps, topk, most))
        assert refusals(BF16, launch) == []
        more = {"speculative_tree": (steps, topk, most + 1)}
        assert f"use {most} or fewer" in only(BF16, speculative_algorithm="EAGLE3", **more)
    # SGLang itself makes a chain as long as its steps.
    assert refusals(BF16, Launch(speculative_tree=(3, 1, 9))) == []


def test_a_loose_verification_is_said():
    eagle = Launch(speculative_algorithm="EAGLE3")
    for name in ("single", "acc"):
        launch = replace(eagle, **{f"accept_threshold_{name}": 0.5})
        (note,) = [each for each in notes(BF16, launch) if "would not have sampled" in each]
        assert f"--speculative-accept-threshold-{name} 0.5," in note
        assert note.count("threshold") == 1
    assert not any("threshold" in note for note in notes(BF16, eagle))


def test_where_sampled_requests_are_not_verified():
    """ROCm answers them greedily; an NPU without the kernel ends at the first one."""
    switch = "--speculative-use-rejection-sampling"
    sentence = only(BF16, hardware="rocm", speculative_algorithm="EAGLE3")
    assert f"start with {switch}" in sentence
    assert "--speculative-eagle-topk 1" in sentence
    assert "whole vocabulary" in sentence
    sampled = Launch(hardware="rocm", speculative_algorithm="EAGLE3", speculative_options=(switch,))
    assert refusals(BF16, sampled) == []
    assert refusals(BF16, Launch(hardware="rocm")) == []
    for hardware in ("cuda", "cpu", "ascend"):
        assert refusals(BF16, Launch(hardware=hardware, speculative_algorithm="EAGLE3")) == []
    none = {"hardware": "ascend", "verifies_sampled": False}
    sentence = only(BF16, speculative_algorithm="EAGLE3", **none)
    assert "sgl_kernel_npu of this machine" in sentence
    assert refusals(BF16, Launch(**none)) == []


def test_overlap_and_formats():
    assert "without --enable-two-batch-overlap" in only(BF16, enable_two_batch_overlap=True)
    assert "without --enable-single-batch-overlap" in only(BF16, enable_single_batch_overlap=True)
    assert "awq" in only(BF16, quantization="awq")


def test_a_runner_that_routes_by_a_softmax():
    sentence = only(BF16, moe_runner_backend="triton_kernel")
    assert sentence.endswith("use --moe-runner-backend auto or triton.")
    for runner in ("auto", "triton"):
        assert refusals(BF16, Launch(moe_runner_backend=runner)) == []


def test_several_reasons_are_all_said():
    assert len(refusals(BF16, Launch(tp=5, pp=99, enable_two_batch_overlap=True))) == 4
    # Blocks of FP8 experts are dealt to five ranks, too.
    assert len(refusals(FP8, Launch(tp=5, pp=99, enable_two_batch_overlap=True))) == 3


@pytest.mark.parametrize("field", ["tp", "dp", "ep", "pp"])
def test_no_ranks(field):
    option = {"dp": "--attn-dp-size"}.get(field, f"--{field}-size")
    assert any(f"{option} 0" in said for said in refusals(BF16, Launch(**{field: 0})))


@pytest.mark.parametrize("arch", [FP8, BF16], ids=["fp8", "bf16"])
def test_every_proposed_launch_is_accepted(arch):
    """What a refusal proposes removes that refusal; a --tp-size removes those of the other, too."""
    tried = 0
    for tp in (*range(1, 17), 24, 32, 72):
        for dp, ep in itertools.product((1, 2, 3, 8), (1, 2, 5, 8, 72)):
            launch = Launch(tp=tp, dp=dp, ep=ep)
            for sentence in refusals(arch, launch):
                for changes in proposals(sentence):
                    said = refusals(arch, replace(launch, **changes))
                    assert sentence not in said
                    assert said == [] or "tp" not in changes
                    tried += 1
    assert tried > 500


def proposals(sentence: str) -> list[dict[str, int]]:
    """The sizes that a sentence tells the user to change, one alternative an entry."""
    names = {option: name for name, option in OPTIONS.items()} | {REDUNDANT: "ep_redundant"}
    found = []
    for part in sentence.split("; use ")[1].split(", or "):
        settings = re.findall(r"(--[a-z-]+) (\d+)(?: or (\d+))?", part)
        if " with " in part:
            found.append({names[option]: int(size) for option, size, _ in settings})
        else:
            found += [{names[o]: int(n)} for o, *sizes in settings for n in sizes if n]
    return found


def test_proposals_are_read_as_meant() -> None:
    assert proposals("no; use --ep-size 2 or 4, or --tp-size 6.") == [
        {"ep": 2},
        {"ep": 4},
        {"tp": 6},
    ]
    assert proposals("no; use --tp-size 8 with --attn-dp-size 2 and --ep-size 4.") == [
        {"tp": 8, "dp": 2, "ep": 4}
    ]


def test_nodes() -> None:
    assert only(BF16, tp=16, nodes=3).endswith("evenly; use --nnodes 2 or 4.")
    assert refusals(BF16, Launch(tp=16, nodes=4)) == []


def test_sizes_that_only_sglang_knows_are_part_of_the_division() -> None:
    assert "--attn-cp-size 3 does not divide --tp-size 8" in only(BF16, tp=8, attention_cp=3)
    assert "--moe-dp-size 4 does not divide --tp-size 8" in only(
        BF16, tp=8, ep=4, moe_dp=4, attention_cp=4
    )


def test_moe_data_parallel_without_context_parallel() -> None:
    assert "--attn-cp-size is 1" in only(BF16, tp=8, moe_dp=2)
    assert refusals(BF16, Launch(tp=8, moe_dp=2, attention_cp=2)) == []


def test_moe_data_parallel_groups_hold_wider_experts() -> None:
    """16 ranks do not divide a width of 1000; with two MoE-DP groups each expert is over 8."""
    wide = replace(BF16, expert_width=1000)
    assert refusals(wide, Launch(tp=16, attention_cp=2, moe_dp=2)) == []
    assert refusals(wide, Launch(tp=16, attention_cp=2)) != []


# --- formats ---

KERNEL = Kernel("cuda", "triton", "layers/quantization/fp8.py", since=90, until=109)
KERNELS = replace(FP8, recipe=replace(FP8.recipe, kernels=(KERNEL,)))


@pytest.mark.parametrize("where", [(None, None), ("cuda", None), ("cuda", 90), ("cuda", 109)])
def test_a_format_runs_where_it_has_a_kernel_and_where_that_is_not_known(where):
    hardware, capability = where
    assert refusals(KERNELS, Launch(hardware=hardware, capability=capability)) == []


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (("cuda", 89), "cuda with compute capability 8.9"),
        (("cuda", 120), "cuda with compute capability 12.0"),
        (("rocm", None), "rocm"),
        (("ascend", None), "ascend"),
    ],
)
def test_a_format_without_a_kernel_is_refused_with_its_name(where, said):
    sentence = only(KERNELS, hardware=where[0], capability=where[1])
    assert f"no expert kernel for FP8 in 128x128 blocks on {said}, only on " in sentence


def test_plain_weights_need_no_kernel_of_a_format():
    assert refusals(BF16, Launch(hardware="rocm")) == []


def test_experts_that_no_kernel_takes_in_parts_must_be_whole():
    whole = replace(FP8, recipe=replace(FP8.recipe, cut_experts="the kernel says so"))
    sentence = only(whole, tp=8, ep=2)
    assert "cannot be shared by 4 ranks: the kernel says so; use --ep-size 8" in sentence
    assert refusals(whole, Launch(tp=8, ep=8)) == []
    assert refusals(whole, Launch(tp=1)) == []
    assert refusals(whole, Launch(tp=8, ep=4, moe_dp=2, attention_cp=2)) == []


def test_the_exchange_is_judged_with_the_rest():
    """Its rules are those of test_moe_plan.py; here is that they are asked."""
    assert "SGLANG_MINIMAX_MOE=nothing names no path" in only(FP8, tp=8, moe_exchange="nothing")
    runner = only(FP8, tp=8, moe_runner_backend="flashinfer_cutlass")
    assert "flashinfer_cutlass has no kernels for FP8" in runner


def test_the_machine_is_asked_for_a_backend():
    gpus = {"tp": 8, "ep": 8, "hardware": "cuda", "capability": 90, "moe_a2a_backend": "deepep"}
    assert refusals(FP8, Launch(**gpus)) == []
    assert "not installed" in only(FP8, **gpus, facts=Facts(missing=frozenset({"deepep"})))


def test_sizes_are_judged_before_the_exchange():
    """A plan for sizes that divide nothing would fail on its own arithmetic."""
    said = refusals(FP8, Launch(tp=8, dp=3, moe_exchange="nothing"))
    assert len(said) == 1
    assert "--attn-dp-size 3" in said[0]


def test_formats_are_not_held_against_the_cpu_platform():
    assert refusals(KERNELS, Launch(hardware="cpu")) == []


@pytest.mark.parametrize("quantization", ["nvfp4_online", "awq", "modelopt_fp4"])
def test_a_checkpoint_is_not_read_as_another_kind(quantization):
    sentence = only(FP8, tp=8, ep=8, quantization=quantization)
    assert f"--quantization {quantization} is for other checkpoints" in sentence
    assert refusals(FP8, Launch(tp=8, ep=8)) == []
    assert refusals(FP8, Launch(tp=8, ep=8, quantization="fp8")) == []


def test_kernels_names_for_a_format_are_understood():
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    arch = Architecture.from_config({"head_dim": 128, "quantization_config": awq})
    for name in ("awq", "awq_marlin", "moe_wna16"):
        assert refusals(arch, Launch(tp=8, ep=8, quantization=name)) == []
